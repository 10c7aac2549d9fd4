"""Which blocks of particles meet where and when, if every pair is to meet once and every block to keep its order.

One process adds to a block's sums in an order that n and d alone decide: that of the circle method
(`csrc/cpu/stein/block_rounds.h`), a round-robin tournament. Float sums have to keep it if the number of processes is
not to change a bit. In a tournament two teams sit at each table; after a round those at one side move on by a table,
those at the other side back by one. So tables are dealt to ranks, and each rank hands on one group of blocks to either
neighbour a round: every pair of particles is still computed once, for both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Move", "Round", "Tournament"]


@dataclass(frozen=True)
class Move:
    """After a round one group goes to a neighbour of the rank, and one comes from it."""

    neighbour: int
    leaving: int
    coming: int


@dataclass(frozen=True)
class Round:
    """Of one rank: who meets, those first whose pairing a move waits for; and who moves then."""

    first: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Tournament:
    """Of ``groups`` of blocks, whose tables are dealt to ``ranks``; those from ``playing`` on have none."""

    groups: int
    ranks: int

    @property
    def rounds(self) -> int:
        """Odd: with an even number of groups one of them stays at table 0, with an odd number it stays empty."""
        return self.groups + self.groups % 2 - 1

    @property
    def tables(self) -> int:
        return (self.rounds + 1) // 2

    @property
    def playing(self) -> int:
        return min(self.ranks, self.tables)

    def seats(self, rank: int) -> range:
        """The tables of a rank."""
        if rank >= self.playing:
            return range(0)
        return range(rank * self.tables // self.playing, (rank + 1) * self.tables // self.playing)

    def sides(self, round: int, table: int) -> tuple[int, int]:
        """Who sits there: the one that moves to the table before, and the one that moves to the table after.

        At table 0 the first stays. It is ``rounds``, no group where the number of groups is odd. The other side of the
        last table stays too, and is then the first.
        """
        if table == 0:
            return self.rounds, round
        return (round + table) % self.rounds, (round - table) % self.rounds

    def pairing(self, round: int, table: int) -> tuple[int, int] | None:
        """The groups that meet there, low first; None where one has nobody to meet."""
        low, high = sorted(self.sides(round, table))
        return (low, high) if high < self.groups else None

    def at(self, round: int, rank: int) -> list[int]:
        """The groups at a rank's tables, ascending."""
        there = {side for table in self.seats(rank) for side in self.sides(round, table)}
        return sorted(group for group in there if group < self.groups)

    def _moves(self, round: int, rank: int) -> Iterator[tuple[int, Move]]:
        """After a round, with the tables that they leave; at most two."""
        seats = self.seats(rank)
        if not seats or round + 1 == self.rounds:
            return
        if seats[0] > 0:
            goes, comes = self.sides(round, seats[0])[0], self.sides(round, seats[0] - 1)[1]
            yield seats[0], Move(rank - 1, goes, comes)
        if seats[-1] + 1 < self.tables:
            goes, comes = self.sides(round, seats[-1])[1], self.sides(round, seats[-1] + 1)[0]
            yield seats[-1], Move(rank + 1, goes, comes)

    @functools.lru_cache(16)  # noqa: B019 (it is a value, of which a program has few)
    def plan(self, rank: int) -> tuple[Round, ...]:
        """All rounds of a rank; of one that has no table none."""
        rounds = []
        for round in range(self.rounds if self.seats(rank) else 0):
            moves = list(self._moves(round, rank))
            tables = dict.fromkeys(table for table, _ in moves)
            first = [self.pairing(round, table) for table in tables]
            others = [self.pairing(round, table) for table in self.seats(rank) if table not in tables]
            rounds.append(
                Round(
                    tuple(filter(None, first)), tuple(filter(None, others)), tuple(move for _, move in moves)
                )
            )
        return tuple(rounds)
