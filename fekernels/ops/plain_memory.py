"""The gate of every kernel: which tensors may be read and written by their address."""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._runtime.torch_internals import is_unwritten_zeros

__all__ = [
    "LOWEST",
    "SharedElements",
    "check_storage",
    "has_plain_memory",
    "in_plain_memory",
    "lost_memory",
    "needed_bytes",
    "overlaps_itself",
]

# The address of a view into freed storage is its offset, in bytes from 0. From here on an address is none of these; of
# one below, as some systems give too, the storage is asked, which takes longer.
LOWEST = 1 << 40


class SharedElements(RuntimeError, ValueError):
    """A tensor that is to be written has elements at one address: torch's own operators raise RuntimeError then."""


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` are what lies at ``data_ptr()``, by its strides.

    They are not for: a subclass with a ``__torch_dispatch__`` (a wrapper has no memory of its own: TwoTensor, DTensor,
    fake and quantised tensors); a lazily negated or conjugated view, whose memory holds the other sign; a tensor of
    zeros that autograd never wrote anywhere; one that belongs to a ``torch.func`` transform; sparse, nested and other
    layouts; tensors on the meta device; and those whose storage was freed. To nearly all of these PyTorch's own
    operators do right: go through ``in_plain_memory``, or through the reference, or raise.
    """
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or tensor.is_nested:
        return False
    if tensor.is_neg() or tensor.is_conj():
        return False
    try:
        if tensor.data_ptr() >= LOWEST:
            return True
        return tensor.untyped_storage().data_ptr() != 0 or (tensor.numel() == 0 and not tensor.is_meta)
    except RuntimeError:  # no memory at all, or not of this transform's
        return False


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of ``tensor``, which has plain memory, share an address, as after ``expand``."""
    steps = sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1
    )
    if tensor.numel() < 2 or not steps:
        return False
    reach = 0  # from the first element to the last, in the dimensions seen so far
    for stride, size in steps:
        if stride == 0:
            return True
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False
    offsets = torch.zeros((), dtype=torch.int64)
    for stride, size in steps:
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.unique().numel() < offsets.numel()


def needed_bytes(tensor: Tensor) -> int:
    """Of its storage, up to the last element."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for stride, size in steps)
    return (int(last) + 1) * tensor.element_size()


def in_plain_memory(tensor: Tensor) -> Tensor:
    """``tensor`` itself where it has plain memory, else its values, copied by operators: contiguous, no subclass.

    Raises:
        ValueError: a tensor whose storage was freed, which PyTorch's operators would read all the same.
        RuntimeError, AssertionError: PyTorch's own, where there are no values to copy (a fake tensor, a sparse one).
    """
    if has_plain_memory(tensor):
        return tensor
    check_storage(f"a tensor of shape {tuple(tensor.shape)}", tensor)
    tensor = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def lost_memory(tensor: Tensor) -> bool:
    """Whether its storage was freed, or has become too small for it."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    try:
        have = tensor.untyped_storage().nbytes()
        if have >= tensor.nbytes and tensor.is_contiguous() and tensor.storage_offset() == 0:
            return False
        return have < needed_bytes(tensor) and not tensor.is_meta and not is_unwritten_zeros(tensor)
    except RuntimeError:  # of another layout, or of a transform
        return False


def check_storage(what: str, tensor: Tensor) -> None:
    """ValueError where ``tensor``, which the message calls ``what``, has lost its memory."""
    if lost_memory(tensor):
        have, need = tensor.untyped_storage().nbytes(), needed_bytes(tensor)
        raise ValueError(f"{what} must hold values; its storage has {have} of the {need} bytes needed")
