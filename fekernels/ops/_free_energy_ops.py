"""``torch.ops.fekernels.free_energy``, its backward and ``gaussian_kl``: what torch.compile sees.

Eager calls take the shorter way of ``free_energy.py``: an operator with registered autograd costs 300 us a call more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fekernels import _backends
from fekernels.ops._library import LIBRARY, define_functional
from fekernels.reference.free_energy import REDUCTIONS, code

OPERANDS = "Tensor[] params, Tensor? target, Tensor? mask, Tensor[] latent, Tensor? weight"


def _run(
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    likelihood: str,
    reduction: str,
    needs: int,
    upstream: list[Tensor],
) -> list[Tensor]:
    operands = [*params, *latent]
    wide = any(tensor.dtype == torch.float64 for tensor in operands)
    backend = "reference" if wide else _backends.choose(operands[0].device.type)
    number = code(likelihood, len(params)) if params else 0
    operands = [_in_rows(tensor) for tensor in operands]
    rows = (latent[0] if target is None else target).shape[0]
    if target is not None:
        target = target.contiguous() if likelihood == "categorical" else _in_rows(target)
    if mask is not None:
        if target is None or mask.shape != target.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"free_energy: mask must be bool, of target's shape; got {mask.dtype} {tuple(mask.shape)}"
            )
        mask = mask.contiguous()
    for name, tensor in (("weight", weight), *(("upstream", tensor) for tensor in upstream)):
        if tensor is not None and tensor.shape != (rows,):
            raise ValueError(f"free_energy: {name} must have shape ({rows},); got {tuple(tensor.shape)}")
    if weight is not None:
        weight = weight.to(torch.float64 if wide else torch.float32).contiguous()
    upstream = [tensor.to(torch.float64 if wide else torch.float32).contiguous() for tensor in upstream]
    return _backends.implementation("free_energy", backend)(
        operands[: len(params)], target, mask, operands[len(params) :], weight, upstream, number,
        REDUCTIONS.index(reduction), 1.0, needs, False,
    )  # fmt: skip


def _in_rows(tensor: Tensor) -> Tensor:
    """With the elements of a row in order, as a kernel takes them; logits [B, P, K] without any gap."""
    if tensor.dim() == 2 and (tensor.stride(1) == 1 or tensor.shape[1] <= 1):
        return tensor
    return tensor.contiguous()


def _forward(
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    likelihood: str,
    reduction: str,
    needs: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    early = 0 if reduction == "none" else needs
    _, energy, kl, *gradients = _run(params, target, mask, latent, weight, likelihood, reduction, early, [])
    return energy, kl, gradients


def _backward(
    g_energy: Tensor,
    g_kl: Tensor,
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    likelihood: str,
    needs: int,
) -> list[Tensor]:
    return _run(params, target, mask, latent, weight, likelihood, "none", needs, [g_energy, g_kl])[3:]


def _wanted(operands: list[Tensor], needs: int) -> list[Tensor]:
    return [tensor for i, tensor in enumerate(operands) if needs >> i & 1]


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _fake_forward(
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    likelihood: str,
    reduction: str,
    needs: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    operands = [*params, *latent]
    rows = (latent[0] if target is None else target).shape[0]
    wide = any(tensor.dtype == torch.float64 for tensor in operands)
    shape = (rows,) if reduction == "none" else ()
    value = operands[0].new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    early = [] if reduction == "none" else _wanted(operands, needs)
    return value, torch.empty_like(value), [_empty(tensor) for tensor in early]


def _fake_backward(
    g_energy: Tensor,
    g_kl: Tensor,
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    likelihood: str,
    needs: int,
) -> list[Tensor]:
    return [_empty(tensor) for tensor in _wanted([*params, *latent], needs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    params, target, mask, latent, weight, likelihood, reduction, needs = inputs
    ctx.call = likelihood, reduction, needs, len(params), len(latent)
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(*output[2])
    # A reduced call has its gradients and needs its inputs no more.
    if reduction == "none":
        ctx.save_for_backward(*params, *latent, target, mask, weight)
    else:
        ctx.save_for_backward(*output[2])


def _autograd(ctx: Any, g_energy: Tensor, g_kl: Tensor, _: Any) -> tuple[Any, ...]:
    likelihood, reduction, needs, n_params, n_latent = ctx.call
    if torch.is_grad_enabled():
        raise RuntimeError(
            "torch.ops.fekernels.free_energy cannot be differentiated twice; fekernels.free_energy can, outside"
            " torch.compile"
        )
    if reduction == "none":
        *operands, target, mask, weight = ctx.saved_tensors
        computed = torch.ops.fekernels.free_energy_backward(
            g_energy, g_kl, operands[:n_params], target, mask, operands[n_params:], weight, likelihood, needs
        )
    else:
        factors = [g_energy] * n_params + [g_kl] * n_latent
        computed = [
            gradient * factor
            for gradient, factor in zip(ctx.saved_tensors, _wanted(factors, needs), strict=True)
        ]
    gradients = iter(computed)
    results = [next(gradients) if needs >> i & 1 else None for i in range(n_params + n_latent)]
    return results[:n_params], None, None, results[n_params:], None, None, None, None


def _gaussian_kl(
    mean: Tensor, logvar: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None, reduction: str
) -> Tensor:
    latent = [mean, logvar]
    if prior_mean is not None and prior_logvar is not None:
        latent += [prior_mean, prior_logvar]
    elif prior_mean is not None or prior_logvar is not None:
        raise ValueError("gaussian_kl: prior_mean and prior_logvar must be given together")
    needs = 0
    if torch.is_grad_enabled():
        needs = sum(tensor.requires_grad << i for i, tensor in enumerate(latent))
    return torch.ops.fekernels.free_energy([], None, None, latent, None, "mse", reduction, needs)[1]


_name = define_functional(
    f"free_energy({OPERANDS}, str likelihood, str reduction, int needs) -> (Tensor, Tensor, Tensor[])",
    _forward,
    _fake_forward,
)
torch.library.register_autograd(_name, _autograd, setup_context=_setup, lib=LIBRARY)
define_functional(
    f"free_energy_backward(Tensor g_energy, Tensor g_kl, {OPERANDS}, str likelihood, int needs) -> Tensor[]",
    _backward,
    _fake_backward,
)
LIBRARY.define(
    "gaussian_kl(Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, str reduction) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("gaussian_kl", _gaussian_kl, "CompositeImplicitAutograd")
