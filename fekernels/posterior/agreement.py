"""What the ranks of a process group must have in common, compared before anything is made of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime.parts import local_tensor
from fekernels._runtime.ranks import gathered_numbers

__all__ = ["WORD", "agree", "bits_of", "place_of", "tensors_digest", "word"]

SHOWN = 96  # bytes of a value that a message tells
WORD = 1 << 63
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def place_of(directory: Any) -> Any:
    """The whole path of a directory, which may have been given relative to where a process is."""
    return os.path.abspath(directory) if isinstance(directory, (str, os.PathLike)) else directory


def agree(owner: str, values: Mapping[str, Any], group: Any, digests: Iterable[str] = ()) -> None:
    """ValueError on every rank where one of ``values`` is not the same on all. A collective, of as many on each.

    Args:
        values: by the argument's name; two are the same where their ``repr`` is.
        digests: names of those that a message need not show.
    """
    if group is None:
        return
    told = {name: repr(value) for name, value in values.items()}
    found = gathered_numbers(owner, [word(text) for text in told.values()], group)
    for name, of_ranks in zip(told, zip(*found, strict=True), strict=True):
        if len(set(of_ranks)) == 1:
            continue
        rank = next(rank for rank, of_rank in enumerate(of_ranks) if of_rank != of_ranks[0])
        if name in set(digests):
            raise ValueError(
                f"{owner}: {name} must be the same on every rank; got another on rank {rank} than on 0"
            )
        shown = gathered_numbers(owner, list(told[name].encode()[:SHOWN].ljust(SHOWN, b"\0")), group)
        texts = ", ".join(bytes(line).rstrip(b"\0").decode(errors="replace") for line in shown)
        raise ValueError(
            f"{owner}: {name} must be the same on every rank; got {texts}, on rank {rank} not what rank 0 has"
        )
