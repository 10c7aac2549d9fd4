"""Which blocks of particles meet where and when, if every pair is to meet once and every block to keep its order.

One process adds to a block's sums in an order that n and d alone decide: that of the circle method
(`csrc/cpu/stein/block_rounds.h`), a round-robin tournament. Float sums have to keep it if the number of processes is
not to change a bit. In a tournament two teams sit at each table; after a round those at one side move on by a table,
those at the other side back by one. So tables are dealt to ranks, and each rank hands on one group of blocks to either
neighbour a round: every pair of particles is still computed once, for both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["Move", "Round", "Tournament"]


@dataclass(frozen=True)
class Move:
    """A group that goes to another rank after a round, or comes from it."""

    rank: int
    group: int


@dataclass(frozen=True)
class Round:
    """Of one rank: who meets, those first whom a move waits for; and who moves then, by ascending groups."""

    first: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]
    leaving: tuple[Move, ...]
    coming: tuple[Move, ...]


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
    def idle(self) -> int:
        """1 where nobody meets at table 0."""
        return self.groups % 2

    @property
    def playing(self) -> int:
        return max(1, min(self.ranks, self.tables - self.idle))

    def begin(self, round: int, rank: int) -> int:
        """The first table of a rank.

        Where they do not divide, ranks take turns in having one more, so that over all rounds their work is the same.
        """
        if rank <= 0:
            return 0
        if rank >= self.playing:
            return self.tables
        return self.idle + (rank * (self.tables - self.idle) + round % self.playing) // self.playing

    def seats(self, round: int, rank: int) -> range:
        """The tables of a rank."""
        return range(
            self.begin(round, rank), self.begin(round, rank + 1) if rank < self.playing else self.tables
        )

    def sides(self, round: int, table: int) -> tuple[int, int]:
        """Who sits there: the one that moves to the table before, and the one that moves to the table after.

        At table 0 the first stays. It is ``rounds``, no group where the number of groups is odd. The other side of the
        last table stays too, and is then the first.
        """
        if table == 0:
            return self.rounds, round
        return (round + table) % self.rounds, (round - table) % self.rounds

    def rank_of(self, round: int, group: int) -> int:
        """Where a group is."""
        table = 0 if group == self.rounds else (group - round) % self.rounds
        table = table if table < self.tables else self.rounds - table
        rank = min(self.playing - 1, table * self.playing // self.tables)
        while self.begin(round, rank) > table:
            rank -= 1
        while self.begin(round, rank + 1) <= table:
            rank += 1
        return rank

    def pairing(self, round: int, table: int) -> tuple[int, int] | None:
        """The groups that meet there, low first; None where one has nobody to meet."""
        low, high = sorted(self.sides(round, table))
        return (low, high) if high < self.groups else None

    def at(self, round: int, rank: int) -> list[int]:
        """The groups at a rank's tables, ascending."""
        there = {side for table in self.seats(round, rank) for side in self.sides(round, table)}
        return sorted(group for group in there if group < self.groups)

    @functools.lru_cache(16)  # noqa: B019 (it is a value, of which a program has few)
    def plan(self, rank: int) -> tuple[Round, ...]:
        """All rounds of a rank; of one that has no table none."""
        rounds = []
        for round in range(self.rounds if rank < self.playing else 0):
            last = round + 1 == self.rounds
            here, there = self.at(round, rank), [] if last else self.at(round + 1, rank)
            goes = [] if last else [Move(self.rank_of(round + 1, group), group) for group in here]
            leaving = tuple(move for move in goes if move.rank != rank)
            comes = [Move(self.rank_of(round, group), group) for group in there]
            gone = {move.group for move in leaving}
            pairings = [self.pairing(round, table) for table in self.seats(round, rank)]
            met = [pairing for pairing in pairings if pairing is not None]
            rounds.append(
                Round(
                    tuple(pairing for pairing in met if gone & set(pairing)),
                    tuple(pairing for pairing in met if not gone & set(pairing)),
                    leaving,
                    tuple(move for move in comes if move.rank != rank),
                )
            )
        return tuple(rounds)

    def most(self, rank: int) -> int:
        """How many groups a rank holds at once, with those that are on their way to it."""
        rounds = self.plan(rank)
        return max((len(self.at(i, rank)) + len(each.coming) for i, each in enumerate(rounds)), default=0)
