"""Particles on several ranks: distances of all their pairs, and their Stein direction, to the bit those of one process.

Which exchange a direction takes is the layout's that the kernel has for n and d:

* few particles with few coordinates are gathered, and every rank computes them all;
* few with very many coordinates, such as networks, change hands once: a rank gets some of the columns of all of them,
  whose inner products are summed over the ranks as one process sums them over its segments of columns;
* all others meet in a tournament (`_tournament`): gathered beforehand, so that sums alone are handed on, or ("ring")
  with particles and scores handed on beside them, so that a rank holds its share of everything and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fekernels._catalogue.stein import KERNELS
from fekernels._runtime import backends
from fekernels._runtime.backends import HOST, compiled
from fekernels._runtime.ranks import exchange
from fekernels.distributed._median import search
from fekernels.distributed._records import (
    SMALL,
    WIDE,
    Layout,
    Records,
    layout,
    norms_of_products,
    sq_dists_of_products,
    tournament,
)
from fekernels.distributed._rows_of_ranks import Rows
from fekernels.distributed._tournament import Tournament
from fekernels.ops.stein.particles import compute_dtype, plain
from fekernels.ops.stein.sq_dist_rank import median_sq_dist, select
from fekernels.ops.stein.svgd_direction import Call, direction_of_rows
from fekernels.stein.median import by_convention

__all__ = ["GATHERED_BYTES", "ShardedParticles"]

# Up to which "auto" gathers particles and scores: what every rank then holds of all is about three times as much.
GATHERED_BYTES = 1 << 31


class ShardedParticles:
    """``own`` [rows of this rank, d] of the particles of all ranks, as they are now.

    Args:
        exchange: "all_gather", "ring" or "auto".
    """

    def __init__(self, rows: Rows, own: Tensor, exchange: str) -> None:
        self.rows, self.own, self.n, self.d = rows, plain(own), rows.n, own.shape[1]
        size = 2 * self.n * self.d * own.element_size()
        self.rings = exchange == "ring" or (exchange == "auto" and size > GATHERED_BYTES)

    # What a step needs more than once is made once.

    @functools.cached_property
    def whole(self) -> Tensor:
        return self.rows.gather(self.own)

    @functools.cached_property
    def means(self) -> Tensor:
        """[d] float32: the sum of all rows in their order, rank after rank, as one process adds them up."""
        total = torch.zeros(self.d, dtype=torch.float64)
        if not self.rings:
            compiled("svgd_add_columns")(total, self.whole)
        else:
            self._along_ranks(total)
        return (total / self.n).float()

    @functools.cached_property
    def columns(self) -> list[int]:
        """Where the columns of each rank begin, of few particles with very many: whole segments."""
        segment = self._layout(0).segment
        segments = -(-self.d // segment)
        return [
            min(self.d, rank * segments // self.rows.world * segment) for rank in range(self.rows.world + 1)
        ]

    @functools.cached_property
    def own_columns(self) -> Tensor:
        return self._to_columns(self.own)

    @functools.cached_property
    def inner_products(self) -> Tensor:
        return self._wide_products(False)

    def uses_native(self, kernel: str, *tensors: Tensor) -> bool:
        """Whether the C++ kernels compute it."""
        return (
            compute_dtype(self.own, *tensors) == torch.float32
            and backends.choose(self.own.device.type, kernel=kernel) == HOST
        )

    def _layout(self, kernel: int, sharp: bool = False) -> Layout:
        return layout(self.n, self.d, kernel, sharp)

    def _along_ranks(self, total: Tensor) -> None:
        """Adds the rows of all ranks to float64 sums [d], in their order; all ranks have them then."""
        rows, group = self.rows, self.rows.group
        if rows.rank:
            exchange(rows.function, dist.recv, total, group=group, group_src=rows.rank - 1)
        compiled("svgd_add_columns")(total, self.own)
        if rows.rank + 1 < rows.world:
            exchange(rows.function, dist.send, total, group=group, group_dst=rows.rank + 1)
        exchange(rows.function, dist.broadcast, total, group=group, group_src=rows.world - 1)

    # Distances

    def distances(self, ranks: Sequence[int]) -> Tensor:
        """[1, len(ranks)]: the squared distances at these ranks among those of pairs i < j."""
        if not self.uses_native("sq_dist_rank") or not self.d:
            return select(self.whole.unsqueeze(0), ranks)
        layout = self._layout(0)
        if layout.algorithm == WIDE:
            return sq_dists_of_products(self.inner_products, self.n)[list(ranks)].unsqueeze(0)
        if self.n <= layout.block or layout.algorithm == SMALL:
            return select(self.whole.unsqueeze(0), ranks)
        means = self.means if layout.centred else torch.zeros(self.d)
        found = search(self.rows, self.own, None if self.rings else self.whole, means, ranks)
        return torch.tensor([found], dtype=torch.int32).view(torch.float32)

    def _pick(self, _: Tensor, ranks: Sequence[int], __: Tensor | None) -> Tensor:
        return self.distances(ranks)

    @property
    def _all(self) -> Tensor:
        """[1, n, d] of their dtype and device, and no values: for formulas that ask for no more."""
        return self.own.new_empty(1).expand(1, self.n, self.d)

    def median(self, include_diagonal: bool) -> Tensor:
        """[1]: as `pairwise_sq_dist_median`."""
        return median_sq_dist(self._all, include_diagonal, None, self._pick)

    def bandwidth(self, convention: str) -> Tensor:
        """[1]: as `median_bandwidth`."""
        return by_convention(self._all, convention, None, self._pick)

    # The direction

    def direction(self, scores: Tensor, bandwidth: Tensor, call: Call) -> Tensor:
        """phi of this rank's particles; scores as these, bandwidth [1], the same on every rank."""
        scores = plain(scores)
        native = KERNELS[call[0]].native and self.uses_native("svgd_direction", scores, bandwidth)
        if not self.n * self.d:
            return torch.empty_like(self.own)
        if not native:
            return direction_of_rows(
                self.whole, self.rows.gather(scores), bandwidth, call, self.rows.begin, self.rows.end
            )
        layout = self._layout(call[0])
        if layout.algorithm == SMALL:
            phi = direction_of_rows(self.whole, self.rows.gather(scores), bandwidth, call, 0, self.n)
            return phi[self.rows.own].clone()
        bandwidth = plain(bandwidth)
        return (self._by_columns if layout.algorithm == WIDE else self._by_tiles)(scores, bandwidth, call)

    def _sharp(self, layout: Layout, norms: Tensor, bandwidth: Tensor) -> bool:
        """What `is_sharp` of csrc/cpu/stein/tiles.h says of all squared norms, summed in their order."""
        if not layout.centred:
            return False
        total = torch.zeros(1, dtype=torch.float64)
        compiled("svgd_add_columns")(total, norms.unsqueeze(1))
        return float(total) > 64.0 * self.n * float(bandwidth)

    # Columns

    def _to_columns(self, rows: Tensor) -> Tensor:
        """[n, columns of this rank] of [rows of this rank, d]."""
        widths = [end - begin for begin, end in zip(self.columns, self.columns[1:], strict=False)]
        parts = [part.reshape(-1) for part in rows.split(widths, 1)]
        own = widths[self.rows.rank]
        flat = self.rows.swap(
            torch.cat(parts), [len(part) for part in parts], [count * own for count in self.rows.counts]
        )
        return flat.view(self.n, own)

    def _to_rows(self, columns: Tensor) -> Tensor:
        widths = [end - begin for begin, end in zip(self.columns, self.columns[1:], strict=False)]
        own, count = widths[self.rows.rank], self.rows.counts[self.rows.rank]
        flat = self.rows.swap(
            columns.reshape(-1),
            [each * own for each in self.rows.counts],
            [count * width for width in widths],
        )
        parts = flat.split([count * width for width in widths])
        return torch.cat([part.view(count, width) for part, width in zip(parts, widths, strict=True)], 1)

    def _wide_products(self, differences: bool) -> Tensor:
        own = compiled("svgd_wide_products")(self.own_columns, self.d, differences)
        segment = self._layout(0).segment
        counts = [
            -(-(end - begin) // segment) for begin, end in zip(self.columns, self.columns[1:], strict=False)
        ]
        # Segment after segment: one order, whoever computed them.
        return sum(
            self.rows.gather(own, counts).double().unbind(), torch.zeros(own.shape[1], dtype=torch.float64)
        ).float()

    def _by_columns(self, scores: Tensor, bandwidth: Tensor, call: Call) -> Tensor:
        layout = self._layout(call[0])
        sharp = layout.centred and self._sharp(
            layout, norms_of_products(self.inner_products, self.n), bandwidth
        )
        products = (
            self.inner_products if layout.centred and not sharp else self._wide_products(differences=True)
        )
        phi = compiled("svgd_wide_share")(
            self.own_columns,
            self._to_columns(scores),
            products,
            bandwidth,
            self.d,
            call[0],
            list(call[1:4]),
            sharp,
        )
        return self._to_rows(phi)

    # Tiles

    def _by_tiles(self, scores: Tensor, bandwidth: Tensor, call: Call) -> Tensor:
        layout, rows = self._layout(call[0]), self.rows
        games = tournament(self.n, layout, rows.world, self.rings)
        # What is read of the particles, in the order of the blocks that are prepared here.
        prepared = range(games.groups) if not self.rings else games.at(0, rows.rank)
        if self.rings:
            x, s = (self._to_seats(t, games, layout) for t in (self.own, scores))
        else:
            x, s = self.whole, rows.gather(scores)
        most = games.most(rows.rank) if self.rings else None
        sharp, means = False, self.means if layout.centred else torch.zeros(self.d)
        records = Records(self.n, layout, prepared, most)
        arguments = self.n, call[0], list(call[1:4])
        norms = records.prepare(x, s, means, bandwidth, *arguments, sharp)
        if self.rings and layout.centred:
            norms = self._in_order(norms, games, layout)
        if self._sharp(layout, norms, bandwidth):
            sharp, layout = True, self._layout(call[0], True)
            records = Records(self.n, layout, prepared, most)
            records.prepare(x, s, means, bandwidth, *arguments, sharp)
        del x, s
        settings = self.n, self.d, call[0], list(call[1:4]), sharp
        self._play(games, records, bandwidth, settings)
        last = games.at(games.rounds - 1, rows.rank)
        totals = records.totals(last, bandwidth, settings)
        totals = self._to_owners(totals, games, layout)
        return compiled("svgd_complete")(totals, self.own, scores, bandwidth, *arguments)

    def _play(
        self, games: Tournament, records: Records, bandwidth: Tensor, settings: tuple[Any, ...]
    ) -> None:
        """All stages. What goes to a neighbour is on its way while those meet whom no message concerns."""
        rank, group, function = self.rows.rank, self.rows.group, self.rows.function
        records.meet([tuple((own, own) for own in games.at(0, rank))], bandwidth, settings)
        for stage in games.plan(rank):
            # Asked for before it is sent, it is written where it belongs.
            slots = [records.receiving(move.group) for move in stage.coming]
            coming = [
                exchange(function, dist.irecv, piece, group=group, group_src=source)
                for source, piece in records.pieces(stage.coming, slots)
            ]
            records.meet(stage.early, bandwidth, settings)
            leaving = [
                exchange(function, dist.isend, piece, group=group, group_dst=target)
                for target, piece in records.pieces(
                    stage.leaving, [records.slots[move.group] for move in stage.leaving]
                )
            ]
            records.meet(stage.free, bandwidth, settings)
            for work in coming:
                exchange(function, work.wait)
            records.take_in(stage.coming, slots)
            records.meet(stage.late, bandwidth, settings)
            for work in leaving:
                exchange(function, work.wait)
            records.let_go(stage.leaving)

    def _parts(self, games: Tournament, layout: Layout, round: int) -> list[list[tuple[int, int]]]:
        """By rank the rows of all that lie at its tables, as ascending intervals."""
        size = layout.block * layout.group
        return [
            [(group * size, min(self.n, (group + 1) * size)) for group in games.at(round, rank)]
            for rank in range(self.rows.world)
        ]

    def _overlaps(self, parts: list[tuple[int, int]], rank: int) -> list[slice]:
        """Those of some intervals that a rank owns, as slices of its own rows."""
        begin, end = self.rows.bounds[rank], self.rows.bounds[rank + 1]
        inside = [(max(begin, low), min(end, high)) for low, high in parts]
        return [slice(low - begin, high - begin) for low, high in inside if low < high]

    def _to_seats(self, own: Tensor, games: Tournament, layout: Layout) -> Tensor:
        parts = self._parts(games, layout, 0)
        mine = [self._overlaps(part, self.rows.rank) for part in parts]
        sizes = [_count(slices) for slices in mine]
        out = torch.cat([own[rows] for slices in mine for rows in slices] or [own[:0]])
        received = [_count(self._overlaps(parts[self.rows.rank], rank)) for rank in range(self.rows.world)]
        return self.rows.swap(out, sizes, received)

    def _to_owners(self, totals: Tensor, games: Tournament, layout: Layout) -> Tensor:
        """Ranks' rows follow each other, and so do a table's: what comes from one rank is ascending."""
        parts = self._parts(games, layout, games.rounds - 1)
        sizes = [_count(self._overlaps(parts[self.rows.rank], rank)) for rank in range(self.rows.world)]
        mine = [self._overlaps(part, self.rows.rank) for part in parts]
        came = self.rows.swap(totals, sizes, [_count(slices) for slices in mine])
        result = totals.new_empty(len(self.own), self.d)
        at = 0
        for rows in (rows for slices in mine for rows in slices):
            count = rows.stop - rows.start
            result[rows] = came[at : at + count]
            at += count
        return result

    def _in_order(self, norms: Tensor, games: Tournament, layout: Layout) -> Tensor:
        """[n]: the norms of all rows, from those at the tables."""
        parts = self._parts(games, layout, 0)
        came = self.rows.gather(norms, [sum(high - low for low, high in part) for part in parts])
        result, at = norms.new_empty(self.n), 0
        for low, high in (interval for part in parts for interval in part):
            result[low:high] = came[at : at + high - low]
            at += high - low
        return result


def _count(slices: Sequence[slice]) -> int:
    return sum(rows.stop - rows.start for rows in slices)
