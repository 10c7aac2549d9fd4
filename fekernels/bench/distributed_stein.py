"""Particles of SVGD on two processes, a thread each, beside one process, and beside half of the pairs in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fekernels.bench import processes
from fekernels.bench import stein as alone
from fekernels.bench.case import Case, Row, Shape
from fekernels.bench.timing import Contestant
from fekernels.distributed.particles import median_bandwidth, svgd_direction
from fekernels.stein import median as medians

__all__ = ["CASES"]

WORLD = 2
ONE, HALVES = "one process", "half of the pairs in each process"
GATHERED, RING = "all-gather", "ring"
EXCHANGES = {GATHERED: "all_gather", RING: "ring"}


def _contestants(shape: Shape, median: bool) -> Sequence[Contestant]:
    """``HALVES`` is as many pairs at once as each rank has, of particles that it has for itself: nothing is sent."""
    import torch.distributed as dist

    def whole(x: Tensor, s: Tensor) -> partial[Tensor]:
        return partial(medians.median_bandwidth, x) if median else partial(alone.ours, x, s, h)

    x, s, h = alone.problem(shape)
    rank, n = dist.get_rank(), len(x)
    own = slice(rank * n // WORLD, (rank + 1) * n // WORLD)
    mine, scores, found = x[own].clone(), s[own].clone(), []
    for name, exchange in EXCHANGES.items():
        if median:
            run = partial(median_bandwidth, mine, exchange=exchange)
        else:
            run = partial(svgd_direction, mine, scores, bandwidth=h, exchange=exchange)
        found.append(Contestant(name, run))
    few = round(n / math.sqrt(WORLD))
    found.append(Contestant(HALVES, whole(x[:few].clone(), s[:few].clone())))
    if rank == 0:
        found.append(Contestant(ONE, whole(x, s)))
    return found


def _case(name: str, what: str, median: bool, aim: float) -> Case:
    return Case(
        f"distributed/{name}",
        lambda shape: f"{what}, {WORLD} processes, n = {shape[0]:,}, d = {shape[1]}",
        ((20_000, 64), (2_000, 64), (150, 9)),
        partial(processes.group, WORLD, partial(_contestants, median=median), (GATHERED, RING, ONE, HALVES)),
        (
            Row(GATHERED, ONE, aim, GATHERED),
            Row(RING, ONE, aim, RING),
            Row(GATHERED, HALVES, None, GATHERED),
            Row(RING, HALVES, None, RING),
        ),
        lambda shape: shape[0] ** 2,
        pairs=True,
        rounds=7,
        seconds=5.0,
    )


CASES = (
    _case("svgd", "sharded SVGD direction", False, 0.55),
    _case("median", "exact median", True, 0.6),
)
