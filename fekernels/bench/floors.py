"""What a run is held to beside its peers: moving the same bytes, and bare arithmetic of the same count.

Both are timed in the same rounds as what they are a floor of: the machines differ from one day to the next, and with
them which of the two binds. Bytes are moved by a copy, and by a sum in place: where the copy goes to memory it also
reads the lines that it overwrites, which a step in place has read anyway; the faster of the two counts. They have the
footprint of the data, so that they run in the cache where the data is. The arithmetic is that of operands in the
nearest cache, by torch's own functions but for random numbers: what is made of cheaper ones goes below that floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from fekernels.bench.case import Cost
from fekernels.bench.timing import Contestant, Timing

__all__ = ["COPY", "MOVERS", "UNITS", "Floor", "contestants", "moved_bytes", "copy", "floor"]

COPY, SUM = "copy", "sum in place"
MOVERS = {COPY: 8, SUM: 12}  # bytes per element

LARGEST_COPY = 1 << 28  # bytes; more than any cache, and what is larger takes its time in proportion
CACHED = 1 << 17  # floats, half a megabyte: in the cache of one core, and enough for every thread
STEPS = 8  # of a unit in one run, as a single one is near the clock's own error


@dataclass(frozen=True)
class Floor:
    """The larger of the two times, and which it is; of several passes their sum, and which the longest waits for."""

    kind: str  # "memory" or "arithmetic"
    seconds: float


def _normal(numel: int) -> tuple[Callable[[], object], int]:
    out = torch.empty(numel)
    return partial(torch.ops.fekernels.philox_normal, out, 1, 0, 1, 0, 4), numel


def _word(numel: int) -> tuple[Callable[[], object], int]:
    out = torch.empty(numel, dtype=torch.int32)
    return partial(torch.ops.fekernels.philox_bits, out, 1, 0, 1, 0, 4), numel


def _root(numel: int) -> tuple[Callable[[], object], int]:
    x = torch.rand(numel).add_(0.5)
    out = torch.empty_like(x)

    def run() -> None:
        torch.sqrt(x, out=out)
        torch.div(x, out, out=out)

    return run, numel


def _exponential(numel: int) -> tuple[Callable[[], object], int]:
    x = torch.randn(numel)
    return partial(torch.exp, x, out=torch.empty_like(x)), numel


def _logarithm(numel: int) -> tuple[Callable[[], object], int]:
    x = torch.rand(numel).add_(0.5)
    return partial(torch.log, x, out=torch.empty_like(x)), numel


def _multiply_add(numel: int) -> tuple[Callable[[], object], int]:
    side = math.isqrt(2 * numel)
    a, b = torch.randn(side, side), torch.randn(side, side)
    return partial(torch.mm, a, b, out=torch.empty(side, side)), side**3


# An operation -> what makes a run of many of them on so many floats, and how many they are.
UNITS: dict[str, Callable[[int], tuple[Callable[[], object], int]]] = {
    "normal": _normal,  # ten rounds of Philox and Box-Muller for each
    "random word": _word,  # 32 bits
    "root": _root,  # a square root and a division
    "exponential": _exponential,
    "logarithm": _logarithm,
    "multiply-add": _multiply_add,
}


def copy(elements: int) -> Contestant:
    """A copy of one float32 tensor onto another."""
    source = torch.randn(elements)
    target = torch.empty_like(source)
    return Contestant(COPY, partial(target.copy_, source))


def _sum_in_place(elements: int) -> Contestant:
    """A tensor added to another. The source is 0: what is added to for seconds must not leave float32."""
    source, target = torch.zeros(elements), torch.randn(elements)
    return Contestant(SUM, partial(target.add_, source))


def moved_bytes(costs: Iterable[Cost], mover: str = COPY) -> int:
    """Bytes that a mover among the ``contestants`` of these costs reads and writes."""
    most = max((cost.bytes for cost in costs), default=0.0)
    each = MOVERS[mover]
    return each * math.ceil(min(most, LARGEST_COPY) / each)


def contestants(costs: Iterable[Cost], numel: int = CACHED) -> list[Contestant]:
    """What has to take its turn among the others, so that the floors of the costs are known after it.

    Args:
        costs: of one step of each contestant of ours.
        numel: floats on which the bare arithmetic runs.
    """
    costs = list(costs)
    found: list[Contestant] = []
    for mover, each in ((copy, COPY), (_sum_in_place, SUM)):
        if moved := moved_bytes(costs, each):
            found.append(mover(moved // MOVERS[each]))
    for unit in sorted({unit for cost in costs for unit in cost.operations}):
        run, count = UNITS[unit](numel)
        found.append(Contestant(unit, partial(_repeat, run), prepare=run, steps=STEPS * count))
    return found


def _repeat(run: Callable[[], object]) -> None:
    for _ in range(STEPS):
        run()


def floor(cost: Cost, costs: Collection[Cost], times: Mapping[str, Timing]) -> Floor | None:
    """The floor of one contestant, of the best rounds of copy and arithmetic; None where neither is known.

    Args:
        cost: of one of its steps.
        costs: with which ``contestants`` was called.
        times: of all contestants, by name.
    """
    if cost.passes:
        by_pass = [each for part in cost.passes if (each := floor(part, costs, times)) is not None]
        longest = max(by_pass, key=lambda each: each.seconds)
        return Floor(longest.kind, sum(each.seconds for each in by_pass))
    found = []
    if cost.bytes:
        each_byte = min(times[mover].best / moved_bytes(costs, mover) for mover in MOVERS)
        found.append(Floor("memory", each_byte * cost.bytes))
    if cost.operations:
        seconds = sum(times[unit].best * count for unit, count in cost.operations.items())
        found.append(Floor("arithmetic", seconds))
    return max(found, key=lambda each: each.seconds, default=None)
