"""The gradients of chains that are called one by one, each written to its place in the stacked one as it comes.

``torch.stack`` after all of them reads what has left the caches, into memory that a system hands out anew page by page
on every step: of 16 chains of 1e6 weights a third of the backward pass (20 of 59 ms, two threads).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime.torch_internals import shares_storage, transforms_active

__all__ = ["StackedGradients"]

SMALL = 1 << 14  # elements a chain: two functions of Python a chain and pass cost more than a copy of less


class _Unbind(torch.autograd.Function):
    """``tensor.unbind(0)``, whose gradient is already in one piece where ``_Slices`` took the parts of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, slices: _Slices) -> tuple[Tensor, ...]:
        ctx.slices = slices
        ctx.set_materialize_grads(False)
        return tensor.unbind(0)

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.slices.joined(parts), None


class _Slices:
    """The stacked gradient of one tensor in one backward pass."""

    def __init__(self, owner: StackedGradients, name: str, tensor: Tensor) -> None:
        self.owner, self.name, self.like = owner, name, tensor.detach()
        self.whole: Tensor | None = None

    def put(self, k: int, part: Tensor) -> Tensor | None:
        """A hook of part k: its slice, written; None, which leaves it, where it is to be differentiated, or sparse."""
        if part.requires_grad or type(part) is not Tensor or part.layout is not torch.strided:
            return None
        if self.whole is None:
            self.whole = self.owner.memory(self.name, self.like)
        place = self.whole[k]
        return place.copy_(part)

    def joined(self, parts: tuple[Tensor | None, ...]) -> Tensor | None:
        whole, self.whole = self.whole, None
        if whole is None or any(p is not None and p.requires_grad for p in parts):
            return torch.stack([torch.zeros_like(self.like[0]) if p is None else p for p in parts])
        for place, part in zip(whole.unbind(0), parts, strict=True):
            if part is None:
                place.zero_()
            elif part.data_ptr() != place.data_ptr():
                place.copy_(part)
        return whole


class StackedGradients:
    """The memory of the stacked gradients, by the tensors' names: kept for the next pass once nobody else holds it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}  # memory that holds nothing to save or copy

    def memory(self, name: str, like: Tensor) -> Tensor:
        kept = self._kept.pop(name, None)
        fits = kept is not None and (kept.shape, kept.dtype, kept.device) == (
            like.shape,
            like.dtype,
            like.device,
        )
        if kept is None or not fits or shares_storage(kept):
            kept = torch.empty_like(like, memory_format=torch.contiguous_format)
        # Another tensor of the same memory: autograd makes a gradient that nobody else holds the parameter's own,
        # and copies any other.
        self._kept[name] = kept.detach()
        return kept

    def unbind(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        """``tensor.unbind(0)``; its gradient comes in the memory that is kept, where that is worth it."""
        plain = (
            tensor.device.type != "cpu" or tensor.numel() < SMALL * len(tensor) or not tensor.requires_grad
            or not torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active()
        )  # fmt: skip
        if plain:
            return tensor.unbind(0)
        slices = _Slices(self, name, tensor)
        parts: tuple[Tensor, ...] = _Unbind.apply(tensor, slices)
        for k, part in enumerate(parts):
            part.register_hook(partial(slices.put, k))
        return parts
