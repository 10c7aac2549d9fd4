"""How the terms of a free energy are computed and differentiated, on checked operands.

In a reduced ("mean" or "sum") call whose gradient is wanted, the kernel writes the gradients of energy and KL in the
same pass; the first backward scales them in place by what comes from above, which is 1 for a loss, and hands them over.
Any later one computes them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fekernels.ops.free_energy.operators  # noqa: F401 (defines the operators)
from fekernels._catalogue.free_energy import LIKELIHOODS, MEAN, NONE, REDUCTIONS
from fekernels._runtime import backends
from fekernels._runtime.host import host
from fekernels._runtime.torch_internals import (
    apply_directly,
    compiles_backward,
    differentiates_forward,
    dispatch_modes,
    is_batched,
    is_of_transform,
    transforms_active,
    viewed_tensor,
)
from fekernels.ops.free_energy.broadcasting import Operands
from fekernels.ops.free_energy.kernel_call import DATA, KernelCall, PlainKernelCall, by_autograd
from fekernels.ops.plain_memory import has_plain_memory

__all__ = ["FreeEnergyTerms", "belongs_to_leaf", "compute", "plain_kernel", "takes_kernels"]

_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that has operators of its own


class FreeEnergyTerms(NamedTuple):
    """The terms of a free energy, each a scalar ("mean", "sum") or of shape [B] ("none"); ``kl`` is before beta."""

    free_energy: Tensor
    energy: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound (at beta = 1): ``-free_energy``."""
        return -self.free_energy


def _sum(first: Tensor | None, factor: float, second: Tensor | None) -> Tensor | None:
    """factor * first + second, where None is 0."""
    if first is None:
        return second
    scaled = first if factor == 1.0 else first * factor
    return scaled if second is None else scaled + second


def _scaled(
    gradients: Sequence[Tensor | None], factor: Tensor | None, backend: str
) -> Sequence[Tensor | None]:
    """Times a scalar tensor, nearly always 1: in place, by a GPU's kernel where it lies on one; None is no factor.

    A batch of factors (``is_grads_batched``) makes a batch of each gradient.
    """
    wanted = [gradient for gradient in gradients if gradient is not None]
    if factor is None or not wanted:
        return gradients
    if is_batched(factor):
        return [None if each is None else (each * factor).to(each.dtype) for each in gradients]
    if factor.is_cuda:
        backends.implementation("scale_", backend)(wanted, factor)
    elif (value := factor.item()) != 1.0:
        for gradient in wanted:
            gradient.mul_(value)
    return gradients


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: KernelCall,
        data: tuple[Tensor | None, ...],
        results: list[Tensor] | None,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        """``results`` where they have been computed already."""
        ctx.set_materialize_grads(False)
        early = call.needs if call.reduction != NONE else 0
        if results is None:
            results = call.run(operands, data, [], early, call.inplace)
        free_energy, energy, kl, *gradients = results
        ctx.call = call
        ctx.gradients = gradients if early else None
        if call.inplace:
            # As a tensor of its own, autograd may keep it for `.grad`; an input it would copy.
            gradients[0] = gradients[0].detach()
            torch.autograd.graph.increment_version(operands[0])
        else:
            ctx.save_for_backward(*operands, *data)
        return free_energy, energy, kl

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> Any:
        call: KernelCall = ctx.call
        gradients, ctx.gradients = ctx.gradients, None
        operands = len(ctx.needs_input_grad) - 3
        return None, None, None, *_gradients(call, gradients, lambda: ctx.saved_tensors, above, operands)


def _gradients(
    call: KernelCall,
    early: Sequence[Tensor] | None,
    saved: Callable[[], Sequence[Any]],
    above: Sequence[Tensor | None],
    operands: int,
) -> list[Tensor | None]:
    """Of the operands; ``early``: those that the forward pass made, of which no second pass may have the memory."""
    if call.inplace and (early is None or torch.is_grad_enabled()):
        raise RuntimeError(
            "free_energy: with inplace_backward=True the prediction is overwritten by its gradient, so backward"
            " runs once and cannot be differentiated; use inplace_backward=False"
        )
    if torch.is_grad_enabled():
        return by_autograd(call, saved(), above)
    g_free, g_energy, g_kl = above
    of_energy, of_kl = _sum(g_free, 1.0, g_energy), _sum(g_free, call.beta, g_kl)
    if early is None:
        tensors = saved()
        upstream = []
        if call.reduction == NONE:
            rows = [g for g in (of_energy, of_kl) if g is not None]
            if any(map(is_batched, rows)):  # no kernel takes them
                return by_autograd(call, tensors, above)
            upstream = [
                torch.zeros_like(rows[0]) if g is None else g.contiguous() for g in (of_energy, of_kl)
            ]
        early = call.run(tensors[:-DATA], tensors[-DATA:], upstream, call.needs)[3:]
    left = iter(early)
    results: Sequence[Tensor | None] = [next(left) if call.needs >> i & 1 else None for i in range(operands)]
    if call.reduction != NONE and of_energy is of_kl:
        results = _scaled(results, of_energy, call.backend)
    params, latent = results[: call.n_params], results[call.n_params :]
    if call.reduction != NONE and of_energy is not of_kl:
        params = _scaled(params, of_energy, call.backend)
        latent = _scaled(latent, of_kl, call.backend)
    if of_energy is None:
        params = [None] * len(params)
    if of_kl is None:
        latent = [None] * len(latent)
    return [*params, *latent]


def _again(
    likelihood: int,
    reduction: int,
    beta: float,
    needs: int,
    inplace: bool,
    early: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    above: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """What the native node leaves to Python; ``saved``: the operands and the target, where they are needed."""
    call = PlainKernelCall(backends.HOST, likelihood, 1, reduction, beta, needs, inplace)
    return _gradients(call, early or None, lambda: (*saved, None, None, None), above, 3)


@functools.cache
def _native() -> Callable[..., tuple[Tensor, Tensor, Tensor] | None] | None:
    """``_plain_in_python`` by csrc/torch/host; None where there is no such module."""
    module = host()
    if module is None:
        return None
    address = backends.implementation("free_energy", backends.HOST, "plain_address")()
    try:
        module.connect_free_energy(address, _again, Tensor, torch.nn.Parameter, torch.empty(0))
    except TypeError:  # tensors are laid out otherwise than it looks for them
        return None
    function: Callable[..., tuple[Tensor, Tensor, Tensor] | None] = module.free_energy
    return function


_apply = apply_directly(_Terms)


def _traced(operands: Operands, likelihood: int, reduction: int, beta: float, needs: int) -> FreeEnergyTerms:
    energy, kl, _ = torch.ops.fekernels.free_energy(
        operands.params, operands.target, operands.mask, operands.latent, operands.weight, LIKELIHOODS[likelihood].name,
        REDUCTIONS[reduction], needs, operands.latent_mask,
    )  # fmt: skip
    return FreeEnergyTerms(energy + beta * kl, energy, kl)


def is_dispatched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a mode is to see operators, or one of the tensors has no plain memory for a kernel to read."""
    if dispatch_modes():
        return True
    return not all(tensor is None or has_plain_memory(tensor) for tensor in tensors)


def _share_memory(tensor: Tensor, others: Sequence[Tensor | None]) -> bool:
    memory = tensor.untyped_storage().data_ptr()
    return any(other is not None and other.untyped_storage().data_ptr() == memory for other in others)


def belongs_to_leaf(prediction: Tensor) -> bool:
    """Whether it is, or is a view of, a tensor whose values an optimizer would step from."""
    base = viewed_tensor(prediction)
    base = prediction if base is None else base
    return base.is_leaf and base.requires_grad


def compute(
    operands: Operands, likelihood: int, reduction: int, beta: float, inplace: bool
) -> FreeEnergyTerms:
    params = operands.params
    tensors = [*params, *operands.latent]
    double = half = False
    needs, bit = 0, 1 if torch.is_grad_enabled() else 0
    for tensor in tensors:
        double |= tensor.dtype is torch.float64
        if tensor.requires_grad:
            needs |= bit
            half |= tensor.dtype is torch.float16
        bit <<= 1
    weight = operands.weight
    if weight is not None:
        weight = weight.double() if double else weight.float()
    known = operands.target, operands.mask, weight, operands.latent_mask
    if double or transforms_active() or differentiates_forward():
        from fekernels.reference.free_energy.free_energy import values

        target, mask, _, latent_mask = known
        terms = values(
            params, target, mask, operands.latent, weight, likelihood, reduction, beta, latent_mask
        )
        return FreeEnergyTerms(*terms)
    if half and needs and reduction != NONE:
        # A gradient stored in float16 before a GradScaler's factor is on it would underflow: it is made in backward.
        rows = compute(operands, likelihood, NONE, beta, False)
        return FreeEnergyTerms(*(row.mean() if reduction == MEAN else row.sum() for row in rows))
    if torch.compiler.is_compiling() or is_dispatched((*tensors, *known)):
        return _traced(operands, likelihood, reduction, beta, needs)
    backend = backends.choose(tensors[0].device.type)
    # Elsewhere than in a plain prediction that nobody else's elements lie between, and from which no other operand is
    # read, the gradient gets its own memory.
    inplace = inplace and needs & 1 == 1 and params[0].is_contiguous()
    inplace = inplace and not _share_memory(params[0], (*tensors[1:], *known))
    call = KernelCall(backend, likelihood, len(params), reduction, beta, needs, inplace)
    if not needs:
        return FreeEnergyTerms(*call.run(tensors, known, [], 0))
    return FreeEnergyTerms(*_Terms.apply(call, known, None, *tensors))


def takes_kernels(operand: Any) -> bool:
    """Whether a call on plain tensors beside this one may go straight to the CPU's compiled kernels."""
    if torch.compiler.is_compiling() or transforms_active() or dispatch_modes():
        return False
    # Of another device the CPU's backend is not asked for, which may have none of the name that was chosen.
    on_cpu = getattr(operand, "is_cpu", False)
    return on_cpu and not differentiates_forward() and backends.choose("cpu") == backends.HOST


def plain_kernel(prediction: Any) -> Callable[..., Any] | None:
    """What most calls take, with operands as they came: checks and lists of tensors took longer than a small kernel.

    A function of (prediction, target, mean, logvar, likelihood, reduction, beta, whether gradients are recorded,
    inplace) that gives (free_energy, energy, kl), or None where anything is not as expected: ``gather`` and
    ``compute`` take the call then, or say what is wrong. They take every call where there is no such function.
    """
    if not takes_kernels(prediction):
        return None
    native = None if compiles_backward() else _native()
    return _plain_in_python if native is None else native


def _plain_in_python(
    prediction: Any,
    target: Tensor,
    mean: Tensor,
    logvar: Tensor,
    likelihood: int,
    reduction: int,
    beta: float,
    recorded: bool,
    inplace: bool,
) -> Any:
    operands = prediction, mean, logvar
    for tensor in (*operands, target):
        if (
            type(tensor) not in _PLAIN
            or not tensor.is_cpu
            or tensor.dtype is not torch.float32
            or tensor.layout is not torch.strided
            or tensor.is_nested
            or tensor.is_neg()
            or is_of_transform(tensor)  # one that outlived its transform
        ):
            return None
    if target.requires_grad:
        return None
    needs = prediction.requires_grad | mean.requires_grad << 1 | logvar.requires_grad << 2 if recorded else 0
    inplace = inplace and needs & 1 == 1
    if inplace and belongs_to_leaf(prediction):
        return None
    kernel = backends.implementation("free_energy", backends.HOST, "plain")
    results = kernel(prediction, target, mean, logvar, likelihood, reduction, beta, needs, inplace)
    if not results:
        return None
    if needs:
        call = PlainKernelCall(backends.HOST, likelihood, 1, reduction, beta, needs, inplace)
        results = _apply(call, (target, None, None, None), results, *operands)
    return results
