"""``torch.ops.fekernels.free_energy``, its backward and ``gaussian_kl``: what torch.compile sees.

Eager calls go around these, by ``autograd.py``: an operator with registered autograd costs 300 us per call more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL, CODES, NONE, REDUCTIONS
from fekernels._runtime import backends
from fekernels._runtime.torch_internals import is_batched
from fekernels.ops._library import LIBRARY, define_functional
from fekernels.ops.free_energy.checks import check_gradients, check_operands, has_float64
from fekernels.ops.free_energy.kernel_call import KernelCall, by_autograd
from fekernels.ops.plain_memory import in_plain_memory

# A kernel's, as checks.py asks for them; latent_mask comes last, where it may be left out.
OPERANDS = "Tensor[] params, Tensor? target, Tensor? mask, Tensor[] latent, Tensor? weight"
LAST = "Tensor? latent_mask=None"


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
    latent_mask: Tensor | None,
) -> list[Tensor]:
    """On checked operands, of which a kernel then takes the addresses."""
    operands = [*params, *latent]
    double = has_float64(operands)
    backend = "reference" if double else backends.choose(operands[0].device.type)
    number = CODES[likelihood][len(params)] if params else 0
    operands = [_in_rows(tensor) for tensor in operands]
    if target is not None:
        target = in_plain_memory(target).contiguous() if number == CATEGORICAL else _in_rows(target)
    mask, latent_mask = (
        None if each is None else in_plain_memory(each).contiguous() for each in (mask, latent_mask)
    )
    dtype = torch.float64 if double else torch.float32
    if weight is not None:
        weight = in_plain_memory(weight).to(dtype).contiguous()
    upstream = [in_plain_memory(tensor).to(dtype).contiguous() for tensor in upstream]
    return backends.implementation("free_energy", backend)(
        operands[: len(params)], target, mask, operands[len(params) :], weight, upstream, number,
        REDUCTIONS.index(reduction), 1.0, needs, False, latent_mask,
    )  # fmt: skip


def _in_rows(tensor: Tensor) -> Tensor:
    """With the elements of a row in order, as a kernel takes them; logits [B, P, K] without any gap."""
    tensor = in_plain_memory(tensor)
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
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    check_operands(
        "free_energy", params, target, mask, latent, weight, latent_mask, likelihood, reduction, needs
    )
    early = 0 if reduction == "none" else needs
    _, energy, kl, *gradients = _run(
        params, target, mask, latent, weight, likelihood, reduction, early, [], latent_mask
    )
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
    latent_mask: Tensor | None = None,
) -> list[Tensor]:
    _check_backward(g_energy, g_kl, params, target, mask, latent, weight, likelihood, needs, latent_mask)
    upstream = [g_energy, g_kl]
    return _run(params, target, mask, latent, weight, likelihood, "none", needs, upstream, latent_mask)[3:]


def _check_backward(
    g_energy: Tensor,
    g_kl: Tensor,
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    likelihood: str,
    needs: int,
    latent_mask: Tensor | None,
) -> None:
    function = "free_energy_backward"
    rows = check_operands(
        function, params, target, mask, latent, weight, latent_mask, likelihood, "none", needs
    )
    check_gradients(function, {"g_energy": g_energy, "g_kl": g_kl}, rows, (params or latent)[0])


def _wanted(operands: Sequence[Any], needs: int) -> list[Any]:
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
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows = check_operands(
        "free_energy", params, target, mask, latent, weight, latent_mask, likelihood, reduction, needs
    )
    operands = [*params, *latent]
    shape = (rows,) if reduction == "none" else ()
    value = operands[0].new_empty(shape, dtype=torch.float64 if has_float64(operands) else torch.float32)
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
    latent_mask: Tensor | None = None,
) -> list[Tensor]:
    _check_backward(g_energy, g_kl, params, target, mask, latent, weight, likelihood, needs, latent_mask)
    return [_empty(tensor) for tensor in _wanted([*params, *latent], needs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    params, target, mask, latent, weight, likelihood, reduction, needs, latent_mask = inputs
    ctx.call = likelihood, reduction, needs, len(params), len(latent)
    operands = enumerate([*params, *latent])
    ctx.left_out = [i for i, tensor in operands if tensor.requires_grad and not needs >> i & 1]
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(*output[2])
    # A reduced call has its gradients and needs its inputs no more.
    if reduction == "none":
        ctx.save_for_backward(*params, *latent, target, mask, weight, latent_mask)
    else:
        ctx.save_for_backward(*output[2])


def _autograd(ctx: Any, g_energy: Tensor, g_kl: Tensor, _: Any) -> tuple[Any, ...]:
    likelihood, reduction, needs, n_params, n_latent = ctx.call
    if torch.is_grad_enabled():
        raise RuntimeError(
            "torch.ops.fekernels.free_energy cannot be differentiated twice; fekernels.free_energy can, outside"
            " torch.compile"
        )
    if ctx.left_out:
        raise RuntimeError(
            "torch.ops.fekernels.free_energy: needs must have the bit of each operand that requires a gradient; that of"
            f" operand {ctx.left_out[0]} is 0"
        )
    if reduction == "none" and (is_batched(g_energy) or is_batched(g_kl)):
        code = CODES[likelihood][n_params] if n_params else 0
        call = KernelCall("reference", code, n_params, NONE, 1.0, needs, False)
        computed = _wanted(by_autograd(call, ctx.saved_tensors, (None, g_energy, g_kl)), needs)
    elif reduction == "none":
        *operands, target, mask, weight, latent_mask = ctx.saved_tensors
        computed = torch.ops.fekernels.free_energy_backward(
            g_energy, g_kl, operands[:n_params], target, mask, operands[n_params:], weight, likelihood, needs,
            latent_mask,
        )  # fmt: skip
    else:
        factors = [g_energy] * n_params + [g_kl] * n_latent
        computed = [
            gradient * factor
            for gradient, factor in zip(ctx.saved_tensors, _wanted(factors, needs), strict=True)
        ]
    gradients = iter(computed)
    results = [next(gradients) if needs >> i & 1 else None for i in range(n_params + n_latent)]
    gradients_of_inputs = results[:n_params], None, None, results[n_params:], None, None, None, None, None
    # The dispatcher leaves out a last argument of None.
    return gradients_of_inputs[: len(ctx.needs_input_grad)]


def _gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    reduction: str,
    latent_mask: Tensor | None = None,
) -> Tensor:
    latent = [mean, logvar]
    if prior_mean is not None and prior_logvar is not None:
        latent += [prior_mean, prior_logvar]
    elif prior_mean is not None or prior_logvar is not None:
        raise ValueError("gaussian_kl: prior_mean and prior_logvar must be given together")
    check_operands("gaussian_kl", [], None, None, latent, None, latent_mask, "mse", reduction, 0)
    needs = 0
    if torch.is_grad_enabled():
        needs = sum(tensor.requires_grad << i for i, tensor in enumerate(latent))
    return torch.ops.fekernels.free_energy(
        [], None, None, latent, None, "mse", reduction, needs, latent_mask
    )[1]


_name = define_functional(
    f"free_energy({OPERANDS}, str likelihood, str reduction, int needs, {LAST}) -> (Tensor, Tensor, Tensor[])",
    _forward,
    _fake_forward,
)
torch.library.register_autograd(_name, _autograd, setup_context=_setup, lib=LIBRARY)
define_functional(
    f"free_energy_backward(Tensor g_energy, Tensor g_kl, {OPERANDS}, str likelihood, int needs, {LAST}) -> Tensor[]",
    _backward,
    _fake_backward,
)
LIBRARY.define(
    "gaussian_kl(Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, str reduction,"
    f" {LAST}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("gaussian_kl", _gaussian_kl, "CompositeImplicitAutograd")
