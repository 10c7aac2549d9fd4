"""Particles that lie on the ranks of a group: who holds which rows, and what of them is sent to whom."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fekernels._runtime.ranks import exchange, gathered_numbers, numbers_device

__all__ = ["Agreement", "Rows"]


MESSAGE = 2048  # bytes of an error that the other ranks are told


def _code(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True)


class Agreement:
    """What every rank does before they go on together: a block, at whose end each knows that all have come so far.

        with Agreement(function, group, names) as agreement:
            ...  # whatever may raise on one rank alone
            agreement.tell(rows, values)

    A collective, one small all-gather, also where the block raises: the other ranks then raise too, with its message,
    instead of waiting for a rank that does not come.

    Args:
        names: of the ``values``, each of which must have the same ``repr`` on every rank.

    Attributes:
        counts: by rank, the rows each has told.
        number: what rank 0 has told beside.

    Raises:
        ValueError: ranks that differ, on all of them, naming one; and for another rank's ValueError.
        RuntimeError: for another rank's other errors.
    """

    def __init__(self, function: str, group: Any, names: Sequence[str] = ()) -> None:
        self._function, self._group, self._names = function, group, names
        self._values: Sequence[Any] = ()
        self._told = [0] * (3 + len(names))
        self.counts: list[int] = []
        self.number = 0

    def tell(self, rows: int, values: Sequence[Any] = (), number: int = 0) -> None:
        self._values, self._told = values, [1, rows, number, *map(_code, values)]

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt: nothing here may wait
        every = gathered_numbers(
            self._function, self._told if error is None else [0] * len(self._told), self._group
        )
        failed = [rank for rank, (fine, *_) in enumerate(every) if not fine]
        if failed:
            self._raise_of(failed[0], error)
            return  # the error of the block goes on
        mine = dist.get_rank(self._group)
        for at, name in enumerate(self._names):
            for rank, (_, _, _, *codes) in enumerate(every):
                if codes[at] != self._told[3 + at]:
                    raise ValueError(
                        f"{self._function}: {name} must be the same on every rank; got {self._values[at]} on rank "
                        f"{mine} and something else on rank {rank}"
                    )
        self.counts = [rows for _, rows, *_ in every]
        self.number = every[0][2]

    def _raise_of(self, rank: int, error: BaseException | None) -> None:
        """Rank `rank` says what it has raised; those that have raised nothing raise that."""
        box = torch.zeros(MESSAGE + 1, dtype=torch.uint8)
        if rank == dist.get_rank(self._group):
            text = f"{type(error).__name__}: {error}".encode()[:MESSAGE]
            box[0] = isinstance(error, ValueError)
            box[1 : 1 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        box = box.to(numbers_device(self._group))
        exchange(self._function, dist.broadcast, box, group=self._group, group_src=rank)
        if error is None:
            data = bytes(box.tolist())
            said = data[1:].rstrip(b"\0").decode(errors="replace")
            raise (ValueError if data[0] else RuntimeError)(
                f"{self._function}: rank {rank} has raised {said}"
            )


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
        """Integers [...] summed over the ranks, in place."""
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
