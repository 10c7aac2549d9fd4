"""The gate of every kernel: which tensors may be read and written by their address."""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._runtime.torch_internals import is_unwritten_zeros

__all__ = ["SharedElements", "has_plain_memory", "in_plain_memory", "needed_bytes", "overlaps_itself"]


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
        address = tensor.data_ptr()
    except RuntimeError:  # no memory at all, or not of this transform's
        return False
    return address != 0 or (tensor.numel() == 0 and not tensor.is_meta)


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
    if _is_freed(tensor):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} must hold values; its storage has "
            f"{tensor.untyped_storage().nbytes()} of the {needed_bytes(tensor)} bytes needed"
        )
    tensor = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _is_freed(tensor: Tensor) -> bool:
    """Of a tensor without plain memory, whether it had some."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or tensor.is_meta:
        return False
    try:
        return tensor.data_ptr() == 0 and tensor.numel() > 0 and not is_unwritten_zeros(tensor)
    except RuntimeError:  # no memory at all, or not of this transform's
        return False
