"""Which blocks of particles meet where and when, if every pair is to meet once and every block to keep its order.

One process adds to a block's sums in an order that n and d alone decide: that of the circle method
(`csrc/cpu/stein/block_rounds.h`), a round-robin tournament. Float sums have to keep it if the number of processes is
not to change a bit. In a tournament two teams sit at each table; after a round those at one side move on by a table,
those at the other side back by one. So tables are dealt to ranks, and every pair of particles is still computed once,
for both.

The borders between ranks move along: for some rounds, a stage, with one team and then as many with the other. In a
stage a rank then takes groups from one neighbour alone and hands on others to the other neighbour, each as one message:
with borders that stand, both neighbours had to wait for each other in every round.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

__all__ = ["Move", "Pairings", "Stage", "Tournament"]


@dataclass(frozen=True)
class Move:
    """A group that goes to another rank after a round, or comes from it."""

    rank: int
    group: int


Pairings = tuple[tuple[int, int], ...]  # of groups, low first


@dataclass(frozen=True)
class Stage:
    """Of one rank: some rounds, for which it takes in and hands on groups once.

    Attributes:
        early, free, late: who meets in each of the rounds: those that what leaves waits for, those that nothing waits
            for, and those that wait for what comes.
        leaving, coming: who changes ranks in these rounds or after them, by ascending groups.
    """

    early: tuple[Pairings, ...]
    free: tuple[Pairings, ...]
    late: tuple[Pairings, ...]
    leaving: tuple[Move, ...]
    coming: tuple[Move, ...]


@dataclass(frozen=True)
class Tournament:
    """Of ``groups`` of blocks, whose tables are dealt to ``ranks``; those from ``playing`` on have none.

    ``longest``: the most rounds of a stage.
    """

    groups: int
    ranks: int
    longest: int = 1

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

    @property
    def stride(self) -> int:
        """Rounds of a stage: so few that nothing that leaves a rank within a stage waits for what comes."""
        return max(1, min(self.longest, ((self.tables - self.idle) // self.playing - 2) // 2))

    def _shift(self, round: int) -> int:
        """What the borders have moved by, in parts of a table of which there are ``playing``.

        In a stage by a table each round, with the team that moves to the table before or the one that moves to the
        table after. Where the tables do not divide, ranks take turns in having one more, so that over all rounds their
        work is the same; and so that the borders never move the other way for that.
        """
        ranks, stride = self.playing, self.stride
        if stride == 1:
            return round % ranks
        stage, at = divmod(round, stride)
        turn, half, middle = stage // 2, ranks // 2, (ranks * stride + 1) // 2
        if stage % 2:
            return ranks * (at - stride) + middle + turn % max(1, half)
        return -ranks * at + middle + half + turn % (ranks - half)

    def begin(self, round: int, rank: int) -> int:
        """The first table of a rank."""
        if rank <= 0:
            return 0
        if rank >= self.playing:
            return self.tables
        return self.idle + (rank * (self.tables - self.idle) + self._shift(round)) // self.playing

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
    def plan(self, rank: int) -> tuple[Stage, ...]:
        """All stages of a rank; of one that has no table none."""
        if rank >= self.playing:
            return ()
        return tuple(
            self._stage(range(begin, min(self.rounds, begin + self.stride)), rank)
            for begin in range(0, self.rounds, self.stride)
        )

    def _stage(self, rounds: range, rank: int) -> Stage:
        leaving, coming = zip(*(self._moves(round, rank) for round in rounds), strict=True)
        met = [
            tuple(
                pairing
                for table in self.seats(round, rank)
                if (pairing := self.pairing(round, table)) is not None
            )
            for round in rounds
        ]
        early, needed = list(met), set[int]()
        for i in reversed(range(len(met))):
            needed |= {move.group for move in leaving[i]}
            early[i] = tuple(pairing for pairing in met[i] if needed & set(pairing))
            needed |= {group for pairing in early[i] for group in pairing}
        late, touched = list(met), set[int]()
        for i in range(len(met)):
            late[i] = tuple(pairing for pairing in met[i] if touched & set(pairing))
            touched |= {group for pairing in late[i] for group in pairing}
            touched |= {move.group for move in coming[i]}
        free = tuple(
            tuple(pairing for pairing in all if pairing not in before and pairing not in after)
            for all, before, after in zip(met, early, late, strict=True)
        )
        return Stage(tuple(early), free, tuple(late), _by_groups(leaving), _by_groups(coming))

    def _moves(self, round: int, rank: int) -> tuple[list[Move], list[Move]]:
        """Who leaves a rank after a round, and who comes."""
        if round + 1 == self.rounds:
            return [], []
        leaving = [Move(self.rank_of(round + 1, group), group) for group in self.at(round, rank)]
        coming = [Move(self.rank_of(round, group), group) for group in self.at(round + 1, rank)]
        return [move for move in leaving if move.rank != rank], [move for move in coming if move.rank != rank]

    def most(self, rank: int) -> int:
        """How many groups a rank holds at once, with those that are on their way to it."""
        stages = enumerate(self.plan(rank))
        return max((len(self.at(i * self.stride, rank)) + len(each.coming) for i, each in stages), default=0)

    @functools.lru_cache(16)  # noqa: B019 (as above)
    def busiest(self) -> tuple[int, int]:
        """How many groups the busiest rank hands on in all, and the most that any holds at once, without a plan."""
        tables, ranks = torch.arange(self.tables), self.playing
        handed, most = torch.zeros(ranks, dtype=torch.int64), 0
        now = held = torch.empty(0)
        for round in range(self.rounds):
            borders = torch.tensor([self.begin(round, rank) for rank in range(1, ranks)], dtype=torch.int64)
            before, now = now, torch.bucketize(tables, borders, right=True)
            # To the table before, to the table after, and the other side of the last table.
            teams = ((before[1:], now[:-1]), (before[:-1], now[1:]), (before[-1:], now[-1:]))
            for source, target in teams if round else ():
                moved = source != target
                handed += torch.bincount(source[moved], minlength=ranks)
                held += torch.bincount(target[moved], minlength=ranks)
            most = max(most, int(held.max()) if round else 0)
            if round % self.stride == 0:
                held = 2 * torch.bincount(now, minlength=ranks)
                held[0] -= self.idle
        return int(handed.max()), max(most, int(held.max()))


def _by_groups(moves: Iterable[Iterable[Move]]) -> tuple[Move, ...]:
    return tuple(sorted((move for each in moves for move in each), key=lambda move: move.group))
