"""The gate of every kernel: which tensors may be read and written by their address."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["has_plain_memory", "in_plain_memory"]


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` are what lies at ``data_ptr()``, by its strides.

    They are not for: a subclass with a ``__torch_dispatch__`` (a wrapper has no memory of its own: TwoTensor, DTensor,
    fake and quantised tensors); a lazily negated or conjugated view, whose memory holds the other sign; a tensor of
    zeros that autograd never wrote anywhere; one that belongs to a ``torch.func`` transform; sparse and other layouts;
    and tensors on the meta device. To all of these PyTorch's own operators do right: go through ``in_plain_memory``, or
    through the reference, or raise.
    """
    return (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not tensor.is_meta
        and not tensor._is_zerotensor()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def in_plain_memory(tensor: Tensor) -> Tensor:
    """``tensor`` itself where it has plain memory, else its values, copied by operators: contiguous, no subclass.

    Raises:
        RuntimeError, AssertionError: PyTorch's own, where there are no values to copy (a fake tensor, a sparse one).
    """
    if has_plain_memory(tensor):
        return tensor
    tensor = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
