"""Blocks of particles in the memory that the C++ kernels compute on, and what they are made of."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime.backends import compiled
from fekernels.distributed._tournament import Move, Pairings, Tournament

__all__ = [
    "SMALL",
    "WIDE",
    "Layout",
    "Records",
    "layout",
    "norms_of_products",
    "sq_dists_of_products",
    "tournament",
]

SMALL, WIDE = range(2)  # algorithms of `SvgdLayout`; the third is by tiles


class Layout:
    """`SvgdLayout` of csrc/cpu/stein/svgd_direction.h."""

    def __init__(self, values: Sequence[int]) -> None:
        (
            self.algorithm, self.block, self.group, self.fixed, self.sums, self.centred, self.segment, self.products
        ) = values  # fmt: skip


@functools.lru_cache(64)
def layout(n: int, d: int, kernel: int, sharp: bool) -> Layout:
    return Layout(compiled("svgd_layout")(torch.empty(0), n, d, kernel, sharp))


# Rounds of a stage. More make fewer messages, of which each waits until more has been computed; what is on its way to a
# rank takes memory beside what it holds, which a ring is there to save.
LONGEST, LONGEST_OF_RING = 8, 6


def tournament(n: int, layout: Layout, ranks: int, rings: bool) -> Tournament:
    """Of n particles; ``rings``: all that is computed from is handed on with the sums."""
    blocks = -(-n // layout.block)
    return Tournament(-(-blocks // layout.group), ranks, LONGEST_OF_RING if rings else LONGEST)


class Records:
    """The records of groups of blocks at this rank: of all ``groups``, or of ``most`` at once, these the first."""

    def __init__(self, n: int, layout: Layout, groups: Sequence[int], most: int | None = None) -> None:
        self.n, self.layout, self.slots = n, layout, {group: slot for slot, group in enumerate(groups)}
        self.everything, count = most is None, len(self.slots) if most is None else most
        self.spare = list(range(len(self.slots), count))
        blocks, widths = count * layout.group, (layout.fixed, layout.sums)
        memory = compiled("svgd_memory")(torch.empty(0), blocks * sum(widths))
        if self.everything:
            parts = memory.split([blocks * width for width in widths])
            self.fixed, self.sums = (
                part.view(blocks, width) for part, width in zip(parts, widths, strict=True)
            )
        else:  # side by side
            self.fixed, self.sums = memory.view(blocks, sum(widths)).split(widths, 1)
        # What is handed on of a group, one piece: its sums, or all of it where the rest does not lie everywhere.
        handed_on = self.sums if self.everything else memory
        self._handed_on = handed_on.view(count, handed_on.numel() // max(1, count))

    def _blocks(self, groups: Sequence[int]) -> tuple[list[int], int]:
        """(record, number, first row) of the blocks of some groups whose rows follow each other; and how many rows."""
        layout, numbers, row = self.layout, [], 0
        blocks = -(-self.n // layout.block)
        for group in groups:
            for k in range(min(layout.group, blocks - group * layout.group)):
                number = group * layout.group + k
                numbers += [self.slots[group] * layout.group + k, number, row]
                row += min(layout.block, self.n - number * layout.block)
        return numbers, row

    def prepare(self, x: Tensor, s: Tensor, means: Tensor, bandwidth: Tensor, *settings: Any) -> Tensor:
        blocks, _ = self._blocks(list(self.slots))
        return compiled("svgd_prepare")(x, s, means, bandwidth, self.fixed, self.sums, blocks, *settings)

    def meet(self, rounds: Iterable[Pairings], bandwidth: Tensor, settings: tuple[Any, ...]) -> None:
        """Pairings of one round after those of another."""
        slots, meet = self.slots, compiled("svgd_meet")
        for pairings in rounds:
            if pairings:
                numbers = [
                    number for low, high in pairings for number in (low, high, slots[low], slots[high])
                ]
                meet(bandwidth, self.fixed, self.sums, numbers, *settings)

    def totals(self, groups: Sequence[int], bandwidth: Tensor, settings: tuple[Any, ...]) -> Tensor:
        blocks, rows = self._blocks(groups)
        return compiled("svgd_totals")(bandwidth, self.fixed, self.sums, blocks, rows, *settings)

    def receiving(self, group: int) -> int:
        """The record that a group which comes is to be written into: its own, or a spare one."""
        return self.slots[group] if self.everything else self.spare.pop()

    def pieces(self, moves: Sequence[Move], slots: Sequence[int]) -> list[tuple[int, Tensor]]:
        """What moves take along, ranks beside: of groups side by side one piece, as far as they lie so everywhere."""
        runs: list[tuple[int, int, int]] = []
        for move, slot in zip(moves, slots, strict=True):
            if self.everything and runs and (runs[-1][0], runs[-1][2]) == (move.rank, slot):
                runs[-1] = (move.rank, runs[-1][1], slot + 1)
            else:
                runs.append((move.rank, slot, slot + 1))
        return [(rank, self._handed_on[begin:end]) for rank, begin, end in runs]

    def take_in(self, moves: Sequence[Move], slots: Sequence[int]) -> None:
        """What has come lies in ``slots``."""
        self.slots.update((move.group, slot) for move, slot in zip(moves, slots, strict=True))

    def let_go(self, moves: Sequence[Move]) -> None:
        """What has left makes room."""
        if not self.everything:
            self.spare += [self.slots.pop(move.group) for move in moves]


def _square(products: Tensor, n: int) -> Tensor:
    """[n, n] from tiles a <= b of 64 x 64, of which number b (b + 1) / 2 + a is the one."""
    blocks = -(-n // 64)
    tiles, whole = products.view(-1, 64, 64), products.new_empty(blocks * 64, blocks * 64)
    for b in range(blocks):
        for a in range(b + 1):
            whole[64 * a : 64 * (a + 1), 64 * b : 64 * (b + 1)] = tiles[b * (b + 1) // 2 + a]
    return whole[:n, :n]


def norms_of_products(products: Tensor, n: int) -> Tensor:
    return _square(products, n).diagonal().contiguous()


def sq_dists_of_products(products: Tensor, n: int) -> Tensor:
    """[n (n - 1) / 2]: the squared distances of pairs i < j, ascending, NaN last; by `sq_dist` of csrc/cpu/stein."""
    above = torch.triu_indices(n, n, 1)
    square = _square(products, n)
    norms = square.diagonal()
    # -2 times a product is exact, so that this is one rounding, as an fma's.
    t = (norms[above[0]] + norms[above[1]]) - 2 * square[above[0], above[1]]
    return torch.where(t < 0, 0.0, t).sort().values
