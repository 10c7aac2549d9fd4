"""Tensors in every layout, and what two of them have in common to the bit."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

UNIT = 2.0**-24  # the largest relative error of one rounding to float32
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same logical elements in another memory layout."""
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack((values, torch.full_like(values, math.nan)), dim=-1).flatten(-2)[..., ::2]
    if layout == "misaligned":  # starts in the middle of a vector, and of a 16-byte word
        return torch.cat((values.new_full((1,), math.nan), values.flatten()))[1:].view(values.shape)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "padded":  # the first dimension's parts are apart
        parts = values.reshape(values.shape[0], -1)
        gap = values.new_full((len(parts), 5), math.nan)
        return torch.cat((parts, gap), 1)[:, : parts.shape[1]].view(values.shape)
    if layout == "permuted":
        return values.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "expanded":  # every row the same memory
        return values[:1].expand(values.shape)
    return values.contiguous()


GUARD = 64  # elements on either side of a guarded tensor: whole vectors, so that its alignment stays


def guarded(tensor: Tensor) -> Tensor:
    """A copy with the same strides and alignment, and NaNs (of integers, -1234567) before and behind its memory."""
    memory = whole(tensor)
    guard = tensor.new_full((GUARD,), math.nan if tensor.is_floating_point() else -1234567)
    return torch.cat((guard, memory, guard)).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset() + GUARD
    )


def whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of, as one row of elements."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.detach().untyped_storage())


def clone(tensor: Tensor, device: str | None = None) -> Tensor:
    """A copy of all the memory that a tensor is a view of, seen as it was."""
    memory = whole(tensor).to(device or tensor.device, copy=True)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def read_only(tensor: Tensor) -> Tensor:
    """A contiguous copy in pages that cannot be written: who tries, dies. See ``survives``."""
    pages = mmap.mmap(-1, tensor.numel() * tensor.element_size())
    copy = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_void_p(copy.data_ptr()), ctypes.c_size_t(len(pages)), ctypes.c_int(mmap.PROT_READ))
    assert libc.mprotect(*arguments) == 0, os.strerror(ctypes.get_errno())
    return copy


def freed(tensor: Tensor, ahead: int = 0) -> Tensor:
    """One like ``tensor`` whose storage was freed, as FSDP1 and offloading do, so many elements into it.

    With an offset its address is not null. PyTorch's own operators read there all the same: see ``survives``.
    """
    memory = torch.cat((tensor.new_zeros(ahead), tensor.detach().flatten()))
    view = memory[ahead:].view(tensor.shape)
    memory.untyped_storage().resize_(0)
    return view


def survives(run: Callable[[], object]) -> bool:
    """Whether ``run`` ends well in a process of its own."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """The same bits, NaNs included (torch.equal calls NaNs unequal and zeros of either sign equal)."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(
        a.detach().cpu().contiguous().view(words), b.detach().cpu().contiguous().view(words)
    )


@dataclass
class Frozen:
    """What a list of tensors held, to prove later that nothing has changed."""

    tensors: list[Tensor]
    before: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = [t.detach().clone() for t in self.tensors]

    def unchanged(self) -> bool:
        return all(bits_equal(now, then) for now, then in zip(self.tensors, self.before, strict=True))
