"""The gradients of chains that are called one by one, each written to its place in the stacked one as it comes.

``torch.stack`` after all of them reads what has left the caches, into memory that a system hands out anew page by page
on every step: of 16 chains of 1e6 weights a third of the backward pass (20 of 59 ms, two threads).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fekernels._runtime.torch_internals import (
    differentiates_forward,
    is_legacy_batched,
    is_of_transform,
    saves_by_hooks,
    shares_storage,
    transforms_active,
)

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
        self.taken: set[int] = set()

    def slice(self, k: int) -> Tensor:
        if self.whole is None:
            self.whole, self.taken = self.owner.memory(self.name, self.like), set()
        return self.whole[k]

    def take(self, k: int) -> Tensor | None:
        """Slice k, for the first gradient of part k in this pass; None for those that are added to it."""
        place = self.slice(k)
        if k in self.taken:
            return None
        self.taken.add(k)
        return place

    def put(self, k: int, part: Tensor) -> Tensor | None:
        """A hook of part k: its slice, written; None, which leaves it, where it is to be differentiated, or sparse."""
        if not _is_plain(part) or part.requires_grad:
            return None
        place = self.slice(k)
        return None if part.data_ptr() == place.data_ptr() else place.copy_(part)

    def joined(self, parts: tuple[Tensor | None, ...]) -> Tensor | None:
        whole, self.whole = self.whole, None
        if whole is None or any(p is not None and (p.requires_grad or not _is_plain(p)) for p in parts):
            return torch.stack([torch.zeros_like(self.like[0]) if p is None else p for p in parts])
        for place, part in zip(whole.unbind(0), parts, strict=True):
            if part is None:
                place.zero_()
            elif part.data_ptr() != place.data_ptr():
                place.copy_(part)
        return whole


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own, no more than its shape says."""
    batched = transforms_active() or is_of_transform(tensor) or is_legacy_batched(tensor)
    return type(tensor) is Tensor and tensor.layout is torch.strided and not batched


class _Linear(torch.autograd.Function):
    """``F.linear``, whose weight's gradient is written to its slice by the matrix product that makes it."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, slices: _Slices, k: int
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.slices, ctx.k = slices, k
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        rows, columns = above.reshape(-1, above.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        of_inputs, of_weight, of_bias = ctx.needs_input_grad[:3]
        gradient = None
        if of_weight:
            taken = _is_plain(above) and not torch.is_grad_enabled()
            gradient = torch.mm(rows.t(), columns, out=ctx.slices.take(ctx.k) if taken else None)
        return (
            above.matmul(weight) if of_inputs else None,
            gradient,
            rows.sum(0) if of_bias else None,
            None,
            None,
        )


class _Linears(TorchFunctionMode):
    """Calls ``_Linear`` for layers whose weights are parts of stacked ones, by the identity of these."""

    def __init__(self, parts: list[tuple[Tensor, _Slices, int]]) -> None:
        super().__init__()
        self.parts = {id(part): (part, slices, k) for part, slices, k in parts}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.linear and len(args) in (2, 3) and not kwargs:
            part, slices, k = self.parts.get(id(args[1]), (None, None, None))
            if part is not None and self.takes(args[0], part):
                return _Linear.apply(args[0], part, args[2] if len(args) == 3 else None, slices, k)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def takes(inputs: Any, weight: Tensor) -> bool:
        # A checkpoint computes again outside of this mode, and what is saved must be what was saved.
        return (
            isinstance(inputs, Tensor) and _is_plain(inputs) and inputs.dtype == weight.dtype and weight.dim() == 2
            and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and not differentiates_forward()
            and not saves_by_hooks()
        )  # fmt: skip


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

    def unbind(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[Tensor, ...]], contextlib.AbstractContextManager[Any]]:
        """``tensor.unbind(0)`` of each, and what a model is called in with a part of each.

        The gradients come in the memory that is kept, where that is worth it; those of linear layers' weights, the
        larger part of most networks, without a copy.
        """
        unbound, own = {}, []
        for name, tensor in tensors.items():
            plain = (
                tensor.device.type != "cpu" or tensor.numel() < SMALL * len(tensor) or not tensor.requires_grad
                or not torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active()
            )  # fmt: skip
            if plain:
                unbound[name] = tensor.unbind(0)
                continue
            slices = _Slices(self, name, tensor)
            unbound[name] = parts = _Unbind.apply(tensor, slices)
            for k, part in enumerate(parts):
                part.register_hook(partial(slices.put, k))
                own.append((part, slices, k))
        return unbound, _Linears(own) if own else contextlib.nullcontext()
