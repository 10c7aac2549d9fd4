"""Ranks among the squared distances of all pairs of particles that lie on several processes, exact.

Each rank scans a share of the pairs for a bracket and counts those below it and, in bins of their leading bits, those
inside. Integer counts summed over the ranks say which bin holds the rank sought; its distances, kept where they were
found, are counted by their next bits, until a bin is one number. The bracket comes from a sample of pairs, so that one
pass over all of them nearly always does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fekernels._runtime import backends
from fekernels._runtime.ranks import exchange
from fekernels.distributed._rows_of_ranks import Rows

__all__ = ["search"]

INFINITY = 0x7F800000  # the bits of float32's; above it are NaNs
NAN = 0x7FC00000
BINS = 2048
ROOM = 1 << 22  # distances that a rank keeps of a pass: 16 MB
PART = 1 << 15  # of them, that are compared at a time
ERRORS = 4.0  # standard errors of the sample's rank that a bracket has to either side
ROUNDING = 16  # and units in the last place, of distances that are equal but for their rounding


def _shift(low: int, high: int) -> int:
    """The least by which the numbers from low to high fall into as many bins as there are."""
    return max(0, (high - low).bit_length() - BINS.bit_length() + 1)


@dataclass
class _Pass:
    """What is known of the distances from ``low`` to ``high``: how many are smaller, and those in bins, of all ranks;
    this rank's own, where every rank has kept them."""

    low: int
    high: int
    below: int
    ends: Tensor  # [BINS], how many are in a bin or before it
    keys: Tensor | None

    @property
    def inside(self) -> int:
        return int(self.ends[-1])

    def bin(self, rank: int) -> tuple[int, int, int]:
        """The numbers that bin of `rank` begins and ends with, and how many are below it."""
        at = int(torch.searchsorted(self.ends, rank - self.below, right=True))
        shift = _shift(self.low, self.high)
        before = self.below + (int(self.ends[at - 1]) if at else 0)
        first = self.low + (at << shift)
        return first, min(self.high, first + (1 << shift) - 1), before


def search(rows: Rows, own: Tensor, whole: Tensor | None, means: Tensor, ranks: Sequence[int]) -> list[int]:
    """The float32 bits of the distances at ``ranks`` (from 0) among those of pairs i < j, NaN last.

    Args:
        own, whole: [rows of this rank, d] and, where all have been gathered, [n, d]; float32, bfloat16 or float16.
        means: float32 [d].
    """
    scan = _Scan(rows, own, whole, means)
    pairs = rows.n * (rows.n - 1) // 2
    sample = _sample(rows, own, whole, pairs)
    found, last = [], None
    for rank in ranks:
        if last is None or not last.below <= rank < last.below + last.inside:
            last = _around(scan, sample, rank, pairs)
        bits = NAN
        if last is not None:
            bits, last = _settle(scan, rows, last, rank)
        found.append(bits)
    return found


def _around(scan: _Scan, sample: Tensor, rank: int, pairs: int) -> _Pass | None:
    """A pass whose bracket holds `rank`; None where it is a NaN's."""
    low, high = _bracket(sample, rank, pairs)
    while True:
        seen = scan(low, high)
        if rank < seen.below:
            low, high = 0, low - 1
        elif rank < seen.below + seen.inside:
            return seen
        elif high == INFINITY:
            return None
        else:
            low, high = high + 1, INFINITY


def _settle(scan: _Scan, rows: Rows, seen: _Pass, rank: int) -> tuple[int, _Pass]:
    """The distance at a rank that lies in `seen`; and the pass that parts its neighbours best, for the next rank."""
    while True:
        low, high, below = seen.bin(rank)
        if low == high:
            return low, seen
        seen = scan(low, high) if seen.keys is None else _next_bits(rows, seen.keys, low, high, below)


def _next_bits(rows: Rows, keys: Tensor, low: int, high: int, below: int) -> _Pass:
    # NumPy's comparisons take a fifth of torch's time, and of parts that stay in the cache make no memory to fault in.
    numbers = keys.numpy()
    parts = [numbers[begin : begin + PART] for begin in range(0, len(numbers), PART)] or [numbers]
    keys = torch.from_numpy(
        np.concatenate([part[(part - low).view(np.uint32) <= high - low] for part in parts])
    )
    counts = rows.sum(torch.bincount((keys - low) >> _shift(low, high), minlength=BINS))
    return _Pass(low, high, below, counts.cumsum(0), keys)


def _all_of(tiles: int) -> tuple[int, int]:
    return 0, tiles


def _first_half(tiles: int) -> tuple[int, int]:
    return 0, tiles // 2


def _second_half(tiles: int) -> tuple[int, int]:
    return tiles // 2, tiles


class _Scan:
    """A pass over all pairs, a share of them on each rank."""

    def __init__(self, rows: Rows, own: Tensor, whole: Tensor | None, means: Tensor) -> None:
        self.rows, self.own, self.whole, self.means = rows, own, whole, means

    def __call__(self, low: int, high: int) -> _Pass:
        if self.whole is None:
            found = self._around(low, high)
        else:
            found = [self._native(self.whole, None, low, high, self.rows.share)]
        counts = torch.zeros(2 + BINS, dtype=torch.int64)
        counts[1:] = sum(part for part, _ in found)
        # How many passes had no room.
        counts[0] = sum(int(part[1:].sum()) > len(keys) for part, keys in found)
        inside = [keys[: int(part[1:].sum())] for part, keys in found]
        keys = inside[0] if len(inside) == 1 else torch.cat(inside)  # of gathered particles one, of megabytes
        self.rows.sum(counts)
        return _Pass(low, high, int(counts[1]), counts[2:].cumsum(0), None if counts[0] else keys)

    def _native(
        self, rows: Tensor, others: Tensor | None, low: int, high: int, part: Callable[[int], tuple[int, int]]
    ) -> list[Tensor]:
        tiles = backends.compiled("sq_dist_tiles")(
            self.means, len(rows), -1 if others is None else len(others)
        )
        scan = backends.compiled("sq_dist_scan")
        counts, found = scan(rows, others, self.means, low, high, *part(tiles), ROOM)
        return [counts, found.view(torch.int32)]

    def _around(self, low: int, high: int) -> list[list[Tensor]]:
        """Own pairs, and those with the rows of half the other ranks, which come one after the other."""
        rows, world = self.rows, self.rows.world
        found = [self._native(self.own, None, low, high, _all_of)]
        steps = range(1, world // 2 + 1)
        coming = self._ask(1) if steps else None
        for step in steps:
            assert coming is not None
            others, works = coming
            for work in works:
                exchange(rows.function, work.wait)
            coming = self._ask(step + 1) if step + 1 in steps else None
            if 2 * step < world:
                found.append(self._native(self.own, others, low, high, _all_of))
                continue
            # Of an even number of ranks the one opposite has asked for these rows too: each takes half of the tiles.
            lower, upper = (others, self.own) if rows.rank >= step else (self.own, others)
            half = _second_half if rows.rank >= step else _first_half
            found.append(self._native(lower, upper, low, high, half))
        return found

    def _ask(self, step: int) -> tuple[Tensor, list[Any]]:
        """The rows of the rank that is `step` further, on their way; ours go to the one that is as far before."""
        rows = self.rows
        source, target = (rows.rank + step) % rows.world, (rows.rank - step) % rows.world
        others = self.own.new_empty(rows.counts[source], self.own.shape[1])
        sent, received = (t.view(torch.uint8) if t.element_size() < 4 else t for t in (self.own, others))
        works = []
        if len(self.own):
            works.append(exchange(rows.function, dist.isend, sent, group=rows.group, group_dst=target))
        if len(others):
            works.append(exchange(rows.function, dist.irecv, received, group=rows.group, group_src=source))
        return others, works


def _sample(rows: Rows, own: Tensor, whole: Tensor | None, pairs: int) -> Tensor:
    """Squared distances of random pairs, ascending, the same on every rank: of all particles, or of one rank's each.

    So many that drawing them costs about what sorting those in the bracket does, which is narrower for more of them.
    """
    share = int(0.1 * pairs ** (2 / 3)) // rows.world + 1 if pairs > 1 << 14 else 0
    held, sizes = (own, rows.counts) if whole is None else (whole, [rows.n] * rows.world)
    counts = [share if size > 1 else 0 for size in sizes]
    generator = torch.Generator().manual_seed(rows.rank)
    parts = [own.new_empty(0, dtype=torch.float32)]
    for begin in range(0, counts[rows.rank], 1024):  # whose differences stay in the cache
        size = min(1024, counts[rows.rank] - begin)
        i = torch.randint(len(held), (size,), generator=generator)
        j = (i + torch.randint(1, len(held), (size,), generator=generator)) % len(held)
        difference = held.index_select(0, i).float() - held.index_select(0, j).float()
        parts.append(torch.linalg.vecdot(difference, difference))
    values = rows.gather(torch.cat(parts), counts)
    return torch.from_numpy(np.sort(values[~values.isnan()].numpy()))


def _bracket(sample: Tensor, rank: int, pairs: int) -> tuple[int, int]:
    size = len(sample)
    p = (rank + 0.5) / pairs
    spread = ERRORS * math.sqrt(size * p * (1 - p)) + 2
    first, last = int(size * p - spread), int(size * p + spread)
    low, high = 0, INFINITY
    if size and first >= 0:
        low = max(0, int(sample[first].view(torch.int32)) - ROUNDING)
    if size and last < size:
        high = min(INFINITY, int(sample[last].view(torch.int32)) + ROUNDING)
    return low, max(low, high)
