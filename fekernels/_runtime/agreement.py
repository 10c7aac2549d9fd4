"""What the ranks of a process group must have in common, compared before anything is made of it."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fekernels._runtime.parts import local_tensor
from fekernels._runtime.ranks import exchange, gathered_numbers, numbers_device
from fekernels._runtime.torch_internals import version

__all__ = ["NOTHING", "WORD", "Agreement", "BatchDigest", "agree", "bits_of", "tensors_digest", "word"]

WORD = 1 << 63
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MESSAGE = 2048  # bytes of a value or an error that the other ranks are told
NOTHING = object()  # the value of a rank that has no say in it: of a batch, one without particles or chains


def word(text: str) -> int:
    """63 bits of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % WORD


def bits_of(tensor: Tensor) -> int:
    """The sum of a tensor's elements read as integers: exact, so that neither threads nor the order change it."""
    tensor = local_tensor(tensor.detach())
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return int(tensor.contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)) % WORD


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, dtypes, shapes and bits."""
    parts = [f"{name} {t.dtype} {tuple(t.shape)} {bits_of(t)}" for name, t in tensors]
    return f"{word(' '.join(parts)):016x}"


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Those of nested tuples, lists and mappings; arrays of numbers too. Whatever else a batch holds says nothing."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, np.ndarray):
        if batch.dtype.kind in "biufc":
            yield torch.tensor(batch)
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


class BatchDigest:
    """A digest of each step's batch, by which ranks tell whether theirs are the same: of shapes, and bits in any order.

    Of tensors that come again unchanged, as all the data at every step, nothing is read twice.
    """

    def __init__(self) -> None:
        self._last: tuple[list[tuple[Any, int]], str] | None = None

    def __call__(self, batch: Any) -> str:
        tensors = [tensor for tensor in _tensors(batch) if not tensor.is_meta]
        if self._last is not None:
            known, digest = self._last
            if len(known) == len(tensors) and all(
                ref() is tensor and known_version == version(tensor) and not tensor.is_inference()
                for (ref, known_version), tensor in zip(known, tensors, strict=True)
            ):
                return digest
        digest = tensors_digest((str(i), tensor) for i, tensor in enumerate(tensors))
        self._last = [(weakref.ref(tensor), version(tensor)) for tensor in tensors], digest
        return digest


class Agreement:
    """What every rank does before they go on together: a block, at whose end each knows that all have come so far.

        with Agreement(function, group, names) as agreement:
            ...  # whatever may raise on one rank alone
            agreement.tell(rows, values)

    A collective, one small all-gather, also where the block raises: the other ranks then raise too, with its message,
    instead of waiting for a rank that does not come. Without a group it is a block like any other.

    Args:
        names: of the ``values``, each of which must have the same ``repr`` on every rank; but for NOTHING.
        digests: the names of those that a message need not show.

    Attributes:
        counts: by rank, the rows each has told.
        number: what rank 0 has told beside.

    Raises:
        ValueError: ranks that differ, on all of them, naming one; and for another rank's ValueError.
        RuntimeError: for another rank's other errors.
    """

    def __init__(
        self, function: str, group: Any, names: Sequence[str] = (), digests: Iterable[str] = ()
    ) -> None:
        self._function, self._group, self._names, self._digests = function, group, names, set(digests)
        self._texts: list[str] = []
        self._told = [0] * (3 + len(names))
        self.counts: list[int] = []
        self.number = 0

    def tell(self, rows: int = 0, values: Iterable[Any] = (), number: int = 0) -> None:
        said = [] if self._group is None else list(values)
        self._texts = [repr(value) for value in said]
        codes = (
            -1 if value is NOTHING else word(text) for value, text in zip(said, self._texts, strict=True)
        )
        self._told = [1, rows, number, *codes]

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt: nothing here may wait
        if self._group is None:
            self.counts, self.number = [self._told[1]], self._told[2]
            return
        told = self._told if error is None else [0] * len(self._told)
        every = gathered_numbers(self._function, told, self._group)
        failed = [rank for rank, (fine, *_) in enumerate(every) if not fine]
        if failed:
            self._raise_of(failed[0], error)
            return  # the error of the block goes on
        for at, name in enumerate(self._names):
            said = {rank: codes[at] for rank, (_, _, _, *codes) in enumerate(every) if codes[at] >= 0}
            first = next(iter(said), 0)
            other = next((rank for rank, code in said.items() if code != said[first]), None)
            if other is not None:
                self._differ(name, self._texts[at], first, other)
        self.counts = [rows for _, rows, *_ in every]
        self.number = every[0][2]

    def _differ(self, name: str, text: str, first: int, other: int) -> None:
        told = f"{self._function}: {name} must be the same on every rank; got"
        if name in self._digests:
            raise ValueError(f"{told} another on rank {other} than on {first}")
        said = [self._said(rank, text) for rank in (first, other)]
        raise ValueError(f"{told} {said[0]} on rank {first} and {said[1]} on rank {other}")

    def _raise_of(self, rank: int, error: BaseException | None) -> None:
        """Rank `rank` says what it has raised; those that have raised nothing raise that."""
        text = f"{'V' if isinstance(error, ValueError) else ' '}{type(error).__name__}: {error}"
        told = self._said(rank, text)
        if error is None:
            kind = ValueError if told[0] == "V" else RuntimeError
            raise kind(f"{self._function}: rank {rank} has raised {told[1:]}")

    def _said(self, rank: int, text: str) -> str:
        """The text of one rank, on all of them."""
        box = torch.zeros(MESSAGE, dtype=torch.uint8)
        if rank == dist.get_rank(self._group):
            data = text.encode()[:MESSAGE]
            box[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        box = box.to(numbers_device(self._group))
        exchange(self._function, dist.broadcast, box, group=self._group, group_src=rank)
        return bytes(box.tolist()).rstrip(b"\0").decode(errors="replace")


def agree(owner: str, values: Mapping[str, Any], group: Any, digests: Iterable[str] = ()) -> None:
    """An `Agreement` on values that are there already, by the argument's name."""
    with Agreement(owner, group, tuple(values), digests) as agreement:
        agreement.tell(values=values.values())
