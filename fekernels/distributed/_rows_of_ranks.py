"""Particles that lie on the ranks of a group: who holds which rows, and what of them is sent to whom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fekernels._runtime.ranks import exchange

__all__ = ["Rows"]


class Rows:
    """Rows 0 .. n - 1 of one matrix: rank after rank, as many on each as ``counts`` says, none of them too."""

    def __init__(self, function: str, group: Any, counts: Sequence[int]) -> None:
        self.function, self.group, self.counts = function, group, list(counts)
        self.rank, self.world = dist.get_rank(group), len(self.counts)
        self.bounds = [sum(self.counts[:rank]) for rank in range(self.world + 1)]
        self.begin, self.end, self.n = self.bounds[self.rank], self.bounds[self.rank + 1], self.bounds[-1]

    @property
    def own(self) -> slice:
        return slice(self.begin, self.end)

    def share(self, count: int) -> tuple[int, int]:
        """The part of as many equal tasks that is this rank's, as [begin, end)."""
        return self.rank * count // self.world, (self.rank + 1) * count // self.world

    def gather(self, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """[n, ...]: the rows of all ranks, of which ``own`` are this one's; ``counts``: of another matrix's rows."""
        counts = self.counts if counts is None else counts
        rows, most = _sendable(own), max(counts)
        if len(own) < most:
            padded = rows.new_zeros(most, *rows.shape[1:])
            padded[: len(own)] = rows
            rows = padded
        whole = rows.new_empty(self.world * most, *rows.shape[1:])
        if whole.numel():
            exchange(self.function, _all_gather(), whole, rows, group=self.group)
        if min(counts) < most:
            whole = torch.cat([whole[rank * most : rank * most + count] for rank, count in enumerate(counts)])
        return _received(whole, own)

    def sum(self, counts: Tensor) -> Tensor:
        """Numbers [...] summed over the ranks, in place."""
        exchange(self.function, dist.all_reduce, counts, group=self.group)
        return counts

    def swap(self, out: Tensor, sizes: Sequence[int], received: Sequence[int]) -> Tensor:
        """[sum(received), ...]: ``out`` holds sizes[rank] rows for each rank, in their order, as the result does."""
        rows = _sendable(out)
        result = rows.new_empty(sum(received), *rows.shape[1:])
        exchange(
            self.function, dist.all_to_all_single, result, rows, list(received), list(sizes), group=self.group
        )
        return _received(result, out)


def _all_gather() -> Any:
    """Of two names for one function, torch 2.13 calls the older one deprecated."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _sendable(rows: Tensor) -> Tensor:
    """Contiguous; of two bytes an element, which not every backend sends as such, by bytes."""
    rows = rows.contiguous()
    return (
        rows
        if rows.element_size() >= 4
        else rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
    )


def _received(rows: Tensor, like: Tensor) -> Tensor:
    return rows if rows.dtype == like.dtype else rows.view(like.dtype).reshape(len(rows), *like.shape[1:])
