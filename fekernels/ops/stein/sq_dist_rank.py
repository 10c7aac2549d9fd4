"""Order statistics of the squared distances between pairs of particles: what a median bandwidth is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._checks import floating, same_device
from fekernels._runtime import backends
from fekernels.ops._library import define_functional
from fekernels.ops.stein.particles import compute_dtype, dispatched, plain, transformed
from fekernels.reference.stein.kernels import centred, square_distances

__all__ = ["Pick", "liu_wang", "median_ranks", "median_sq_dist", "middle_two", "select"]


def _check_particles(particles: Tensor) -> None:
    floating("sq_dist_rank", "particles", particles)
    if particles.dim() != 3:
        raise ValueError(f"sq_dist_rank: particles must have shape (B, n, d); got {tuple(particles.shape)}")


def _run(particles: Tensor, ranks: Sequence[int], hint: Tensor | None) -> Tensor:
    _check_particles(particles)
    batch, n, _ = particles.shape
    pairs = n * (n - 1) // 2
    for rank in ranks:
        if not 0 <= rank < pairs:
            raise ValueError(f"sq_dist_rank: ranks must be in [0, {pairs}), the pairs of {n}; got {rank}")
    if hint is not None:
        floating("sq_dist_rank", "hint", hint)
        same_device("sq_dist_rank", "hint", hint, particles.device)
    if hint is not None and hint.shape != (batch, len(ranks)):
        raise ValueError(f"sq_dist_rank: hint must have shape {(batch, len(ranks))}; got {tuple(hint.shape)}")
    if not batch or not len(ranks):
        return _fake(particles, ranks, hint)
    double = particles.dtype == torch.float64
    backend = "reference" if double else backends.choose(particles.device.type, kernel="sq_dist_rank")
    if hint is not None:
        hint = plain(hint.to(compute_dtype(particles)))
    kernel = backends.implementation("sq_dist_rank", backend)
    return kernel(plain(particles), list(ranks), hint)


def _fake(particles: Tensor, ranks: Sequence[int], hint: Tensor | None) -> Tensor:
    _check_particles(particles)
    return particles.new_empty((particles.shape[0], len(ranks)), dtype=compute_dtype(particles))


def _plain(particles: Tensor, ranks: Sequence[int]) -> Tensor:
    """By a sort of all distances, out of place: under torch.func, where the operator has no rule."""
    n = particles.shape[1]
    x = centred(particles)
    above = torch.triu_indices(n, n, 1, device=particles.device)
    t = square_distances(x, x).to(compute_dtype(particles))[:, above[0], above[1]]
    return torch.stack([t.sort(1).values[:, rank] for rank in ranks], 1)


def select(particles: Tensor, ranks: Sequence[int], hint: Tensor | None = None) -> Tensor:
    """[B, len(ranks)]: the distances at ``ranks`` (from 0) among those of pairs i < j; never differentiated."""
    with torch.no_grad():
        if transformed():
            return _plain(particles.detach(), ranks)
        if dispatched(particles):
            return torch.ops.fekernels.sq_dist_rank(particles.detach(), ranks, hint)
        return _run(particles.detach(), ranks, hint)


Pick = Callable[[Tensor, Sequence[int], "Tensor | None"], Tensor]


def median_ranks(n: int, include_diagonal: bool) -> list[int]:
    """The ranks, among pairs i < j, of the two middle ones of all distances; n >= 2.

    With the diagonal all n^2 distances count: n zeros, then each pair's twice. The lower rank is then -1 for n = 2,
    a zero of the diagonal.
    """
    if include_diagonal:
        return [((n * n - 1) // 2 - n) // 2, (n * n // 2 - n) // 2]
    pairs = n * (n - 1) // 2
    return [(pairs - 1) // 2, pairs // 2]


def middle_two(
    particles: Tensor, include_diagonal: bool, hint: Tensor | None = None, pick: Pick = select
) -> Tensor:
    """[B, 2]: the two middle distances; n >= 3, or 2 without the diagonal or under torch.compile and export."""
    lower, upper = median_ranks(particles.shape[1], include_diagonal)
    if not include_diagonal or not torch.compiler.is_compiling():
        return pick(particles, [lower, upper], hint)
    # A symbolic n may be 2, and a branch on that would keep torch.export from leaving n open.
    first: Any = torch.sym_max(lower, 0)  # int or SymInt
    distances = pick(particles, [first, upper], hint)
    return distances.masked_fill(torch.arange(2, device=particles.device) < -lower, 0)


def median_sq_dist(
    particles: Tensor, include_diagonal: bool, hint: Tensor | None = None, pick: Pick = select
) -> Tensor:
    """[B]: the median of the squared distances, the mean of the two middle ones of an even count.

    ``hint`` [B]: about the result. Without the diagonal one particle has no distance: NaN. ``pick``: where not all
    particles lie here, what finds distances among those of all; ``particles`` then says no more than their shape.
    """
    n = particles.shape[1]
    if n < 2:
        value = 0.0 if include_diagonal else torch.nan
        return torch.full(
            (particles.shape[0],), value, dtype=compute_dtype(particles), device=particles.device
        )
    if not torch.compiler.is_compiling() and n == 2:
        distance = pick(particles, [0], None)[:, 0]
        return distance / 2 if include_diagonal else distance
    if hint is not None:
        hint = hint.unsqueeze(1).expand(-1, 2)
    return (middle_two(particles, include_diagonal, hint, pick) / 2).sum(1)


def liu_wang(particles: Tensor, hint: Tensor | None = None) -> Tensor:
    """[B]: h = median of all n^2 squared distances / log(n + 1) (Liu & Wang 2016, their code)."""
    n = particles.shape[1]
    if not n:
        return torch.zeros(particles.shape[0], dtype=compute_dtype(particles), device=particles.device)
    return median_sq_dist(particles, True, hint) / log(n + 1, particles)


def log(count: int, like: Tensor) -> Tensor | float:
    """log(count); under torch.compile on a tensor, since Python's would make a constant of a symbolic size."""
    if not torch.compiler.is_compiling():
        return math.log(count)
    return torch.full((), count, dtype=torch.float64, device=like.device).log().to(compute_dtype(like))


define_functional("sq_dist_rank(Tensor particles, SymInt[] ranks, Tensor? hint) -> Tensor", _run, _fake)
