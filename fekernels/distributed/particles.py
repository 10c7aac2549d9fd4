"""Stein's method on particles that lie on the ranks of a process group: `fe.distributed.svgd_direction` and medians."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from fekernels._catalogue.stein import KERNELS
from fekernels._checks import boolean, one_of
from fekernels._runtime.agreement import Agreement
from fekernels._runtime.ranks import group_of, has_ranks
from fekernels.distributed._rows_of_ranks import Rows
from fekernels.distributed._sharded_particles import ShardedParticles
from fekernels.ops.stein.bandwidths import bandwidths, is_median
from fekernels.ops.stein.particles import check_scores, compute_dtype
from fekernels.ops.stein.sq_dist_rank import median_sq_dist
from fekernels.ops.stein.svgd_direction import check_settings, direction_of_rows
from fekernels.stein import median as medians
from fekernels.stein.checks import rows_of_particles
from fekernels.stein.population import EXCHANGES

NAMES = (
    "d",
    "particles' dtype",
    "scores' dtype",
    "kernel",
    "bandwidth",
    "temperature",
    "precision",
    "exchange",
)

__all__ = ["median_bandwidth", "pairwise_sq_dist_median", "svgd_direction"]


def default_group(function: str, process_group: Any) -> Any:
    """The group that an argument means; None for one process alone."""
    group = group_of(function, process_group)
    return dist.group.WORLD if group is None and has_ranks() else group


def svgd_direction(
    particles: Tensor,
    scores: Tensor,
    *,
    process_group: Any = None,
    kernel: object = "rbf",
    bandwidth: Tensor | float | str = "median",
    temperature: float = 1.0,
    precision: str = "fp32",
    exchange: str = "auto",
) -> Tensor:
    """`fe.svgd_direction` of the particles of all ranks, for those of this rank; the same bits on any number of ranks.

    A collective: every rank of the group calls it, with the same settings.

    Args:
        particles: [m, d], this rank's, m >= 0 as many as it has: particle 0 is the first of rank 0, and so on. float32,
            bfloat16, float16, or float64 (computed by the reference).
        scores: grad log p at them, [m, d].
        process_group: a ``ProcessGroup`` or a DeviceMesh of one dimension. None: the default group, or this process.
        kernel, temperature, precision: as `fe.svgd_direction`.
        bandwidth: h: a number >= 0, a tensor without dimensions, or "median" of the particles of all ranks.
        exchange: "all_gather": every rank holds all particles and scores for the time of the call; "ring": its share of
            them, which is handed on from neighbour to neighbour with the sums; "auto" gathers up to 2 GiB of both.
            What they send is told in docs/distributed.md. Few particles of very many coordinates (n <= 512,
            d >= 2048), such as networks, change hands by columns whatever it says. On a GPU all are gathered.

    Returns:
        phi [m, d] of the dtype of ``particles``, of which nothing is differentiated.

    Raises:
        TypeError, ValueError: as `fe.svgd_direction`; ValueError on all ranks where they differ in d, a dtype or a
            setting, naming a rank. RuntimeError on the others where one has raised, or has ended.

    Source: Liu & Wang 2016, arXiv:1608.04471, equation 8.
    """
    function = "distributed.svgd_direction"
    group = default_group(function, process_group)
    with Agreement(function, group, NAMES) as agreement:
        rows_of_particles(function, particles)
        check_scores(function, scores, particles)
        call = check_settings(function, kernel, temperature, precision)
        one_of(function, "exchange", exchange, EXCHANGES)
        dtype = compute_dtype(particles, scores)
        x, h = particles.detach(), None
        if not is_median(function, bandwidth) or KERNELS[call[0]].default_bandwidth is None:
            number = 1.0 if isinstance(bandwidth, str) else bandwidth
            h = bandwidths(function, number, call[0], x.unsqueeze(0), x, dtype)
        told = bandwidth if h is None else float(h)
        agreement.tell(len(x), [x.shape[1], x.dtype, scores.dtype, call[:3], told, *call[3:], exchange])
    if group is None:
        h = medians.by_convention(x.unsqueeze(0), "liu_wang").to(dtype) if h is None else h
        return direction_of_rows(x, scores.detach(), h, call, 0, len(x))
    shared = ShardedParticles(Rows(function, group, agreement.counts), x, exchange)
    h = shared.bandwidth("liu_wang").to(dtype) if h is None else h
    return shared.direction(scores.detach(), h, call)


def _sharded(
    function: str, particles: Tensor, process_group: Any, exchange: str, kind: object
) -> ShardedParticles | None:
    """The particles of all ranks; of one process alone None."""
    group = default_group(function, process_group)
    names = ("d", "particles' dtype", "the kind of median", "exchange")
    with Agreement(function, group, names) as agreement:
        rows_of_particles(function, particles)
        one_of(function, "exchange", exchange, EXCHANGES)
        agreement.tell(len(particles), [particles.shape[1], particles.dtype, kind, exchange])
    if group is None:
        return None
    return ShardedParticles(Rows(function, group, agreement.counts), particles.detach(), exchange)


def median_bandwidth(
    particles: Tensor, convention: str = "liu_wang", *, process_group: Any = None, exchange: str = "auto"
) -> Tensor:
    """`fe.median_bandwidth` of the particles of all ranks, exact: the bits of one process.

    Args:
        particles: [m, d], this rank's, m >= 0.
        convention: as `fe.median_bandwidth`.
        process_group, exchange: as `fe.distributed.svgd_direction`; a collective.

    Returns:
        A scalar, float32 or float64, the same on every rank.

    Raises:
        TypeError, ValueError, RuntimeError: as `fe.median_bandwidth` and `fe.distributed.svgd_direction`.
    """
    function = "distributed.median_bandwidth"
    shared = _sharded(function, particles, process_group, exchange, convention)
    n = len(particles) if shared is None else shared.n
    name = medians.check_convention(function, convention, n)
    if shared is None:
        return medians.by_convention(particles.detach().unsqueeze(0), name)[0]
    return shared.bandwidth(name)[0]


def pairwise_sq_dist_median(
    particles: Tensor, include_diagonal: bool = True, *, process_group: Any = None, exchange: str = "auto"
) -> Tensor:
    """`fe.pairwise_sq_dist_median` of the particles of all ranks; all else as `fe.distributed.median_bandwidth`."""
    function = "distributed.pairwise_sq_dist_median"
    shared = _sharded(function, particles, process_group, exchange, include_diagonal)
    boolean(function, "include_diagonal", include_diagonal)
    n = len(particles) if shared is None else shared.n
    medians.at_least(function, n, *((1, "n") if include_diagonal else (2, "n, for a pair")))
    if shared is None:
        return median_sq_dist(particles.detach().unsqueeze(0), include_diagonal)[0]
    return shared.median(include_diagonal)[0]
