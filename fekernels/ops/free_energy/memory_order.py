"""The order in which a sample's elements lie in memory, which a sum over all of them may follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["arranged", "in_memory_order", "memory_order", "restored"]

CHANNELS_LAST = {4: (torch.channels_last, (0, 2, 3, 1)), 5: (torch.channels_last_3d, (0, 2, 3, 4, 1))}


def memory_order(tensor: Tensor, batch_dims: int = 1) -> tuple[int, ...] | None:
    """Dimensions of ``tensor``, the batch's first, in the order in which a sample's elements lie without a gap.

    None where that is their own order, or where there are gaps. It follows from a sample's sizes and strides alone, and
    so is the same whatever batch the sample is in.
    """
    if tensor.dim() < batch_dims + 2 or tensor.is_contiguous():
        return None
    if torch.compiler.is_compiling():  # comparing sizes that are symbols would add guards
        memory_format, order = CHANNELS_LAST.get(tensor.dim(), (None, ()))
        last = (
            batch_dims == 1
            and memory_format is not None
            and tensor.is_contiguous(memory_format=memory_format)
        )
        return order if last else None
    sizes, strides = tensor.shape, tensor.stride()
    # A dimension of one element may have any stride; in front it disturbs no order.
    event = sorted(range(batch_dims, tensor.dim()), key=lambda d: (sizes[d] != 1, -strides[d], d))
    step = 1
    for d in reversed(event):
        if sizes[d] != 1 and strides[d] != step:
            return None
        step *= sizes[d]
    longer = [d for d in event if sizes[d] != 1]
    return None if step == 0 or longer == sorted(longer) else (*range(batch_dims), *event)


def arranged(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The dimensions in that order, those that broadcasting would put in front included."""
    missing = len(order) - tensor.dim()
    return tensor[(None,) * missing].permute(*order) if missing else tensor.permute(*order)


def restored(rows: Tensor, like: Tensor, order: Sequence[int] | None) -> Tensor:
    """[B, D] with the elements of a sample in ``order``, as a view of the shape of ``like``."""
    if order is None:
        return rows.view(like.shape)
    back = [0] * len(order)
    for at, dim in enumerate(order):
        back[dim] = at
    return rows.view([like.shape[d] for d in order]).permute(back)


def in_memory_order(
    first: Any, same: Any, others: Sequence[Any], batch_dims: int = 1
) -> tuple[Any, Any, Sequence[Any]]:
    """All operands with their dimensions in the order in which those of ``first`` lie in memory.

    ``first`` is a tensor or a tuple of them, the first of which gives the order; ``same`` has its shape and ``others``
    broadcast to it. What shares its layout (channels_last images) is then taken as it lies, and what does not is copied
    into it. Operands that do not fit are left alone, for the checks to say so.
    """
    several = first if isinstance(first, (tuple, list)) else (first,)
    leader = several[0] if several else None
    if not isinstance(leader, Tensor) or leader.is_nested or leader.layout is not torch.strided:
        return first, same, others
    order = memory_order(leader, batch_dims)
    if order is None or not isinstance(same, Tensor) or same.shape != leader.shape:
        return first, same, others
    if not all(tensor is None or _fits(tensor, leader) for tensor in (*several, same, *others)):
        return first, same, others
    moved = [arranged(tensor, order) for tensor in several]
    others = [None if tensor is None else arranged(tensor, order) for tensor in others]
    return tuple(moved) if isinstance(first, (tuple, list)) else moved[0], arranged(same, order), others


def _fits(tensor: Any, leader: Tensor) -> bool:
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout is not torch.strided:
        return False
    pairs = zip(reversed(tensor.shape), reversed(leader.shape), strict=False)
    return tensor.dim() <= leader.dim() and all(size in (1, full) for size, full in pairs)
