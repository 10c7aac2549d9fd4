"""The free energy (negative ELBO): value and gradients from one read of the data.

F = energy + beta KL(q || p), with energy = -log p(x | z) summed over the event. In a reduced ("mean" or "sum") call
whose gradient is wanted, the kernel writes the gradients of energy and KL in the same pass; the first backward scales
them in place by what comes from above, which is 1 for a loss, and hands them over. Any later one computes them again.

Source: Kingma & Welling 2014, arXiv:1312.6114, equation 7; beta: Higgins et al. 2017; free bits: Kingma et al. 2016,
arXiv:1606.04934, appendix C.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fekernels.ops._free_energy_ops  # noqa: F401 (defines the operators)
from fekernels import _backends
from fekernels.ops._operands import Operands, floating, gather
from fekernels.ops._validate import validate_target
from fekernels.reference._likelihoods import SAFE
from fekernels.reference.free_energy import LIKELIHOODS, REDUCTIONS

__all__ = ["FreeEnergyTerms", "energy", "free_energy", "gaussian_kl"]

# name -> {number of parameters: code}
CODES: dict[str, dict[int, int]] = {}
for _code, (_name, _safe) in enumerate(zip(LIKELIHOODS, SAFE, strict=True)):
    CODES.setdefault(_name, {})[len(_safe)] = _code

NONE, MEAN, SUM = range(3)


class FreeEnergyTerms(NamedTuple):
    """The terms of a free energy, each a scalar ("mean", "sum") or of shape [B] ("none"); ``kl`` is before beta."""

    free_energy: Tensor
    energy: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound (at beta = 1): ``-free_energy``."""
        return -self.free_energy


class _Call:
    """What a kernel takes beside the differentiable operands (parameters of the likelihood, then latent)."""

    __slots__ = ("backend", "beta", "inplace", "likelihood", "n_params", "needs", "reduction")

    def __init__(
        self,
        backend: str,
        likelihood: int,
        n_params: int,
        reduction: int,
        beta: float,
        needs: int,
        inplace: bool,
    ) -> None:
        self.backend, self.likelihood, self.n_params = backend, likelihood, n_params
        self.reduction, self.beta, self.needs, self.inplace = reduction, beta, needs, inplace

    def run(
        self,
        operands: Sequence[Tensor],
        data: Sequence[Tensor | None],
        upstream: list[Tensor],
        needs: int,
        inplace: bool = False,
    ) -> list[Tensor]:
        """[free_energy, energy, kl, *gradients of those operands whose bit of ``needs`` is set]."""
        target, mask, weight = data
        kernel = _backends.implementation("free_energy", self.backend)
        return kernel(  # type: ignore[return-value]
            list(operands[: self.n_params]), target, mask, list(operands[self.n_params :]), weight, upstream,
            self.likelihood, self.reduction, self.beta, needs, inplace,
        )  # fmt: skip

    def values(
        self, operands: Sequence[Tensor], data: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same in plain PyTorch, for gradients of gradients."""
        from fekernels.reference.free_energy import values

        target, mask, weight = data
        params, latent = list(operands[: self.n_params]), list(operands[self.n_params :])
        return values(params, target, mask, latent, weight, self.likelihood, self.reduction, self.beta)


def _sum(first: Tensor | None, factor: float, second: Tensor | None) -> Tensor | None:
    """factor * first + second, where None is 0."""
    if first is None:
        return second
    scaled = first if factor == 1.0 else first * factor
    return scaled if second is None else scaled + second


def _scale(gradients: Sequence[Tensor | None], factor: Tensor | None, backend: str) -> None:
    """In place, by a scalar tensor that is nearly always 1; a GPU's kernel reads it there."""
    wanted = [gradient for gradient in gradients if gradient is not None]
    if factor is None or not wanted:
        return
    if factor.is_cuda:
        _backends.implementation("scale_", backend)(wanted, factor)
    elif (value := factor.item()) != 1.0:
        for gradient in wanted:
            gradient.mul_(value)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, data: tuple[Tensor | None, ...], *operands: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        early = call.needs if call.reduction != NONE else 0
        free_energy, energy, kl, *gradients = call.run(operands, data, [], early, call.inplace)
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
    def backward(ctx: Any, g_free: Tensor | None, g_energy: Tensor | None, g_kl: Tensor | None) -> Any:
        call: _Call = ctx.call
        gradients, ctx.gradients = ctx.gradients, None
        if call.inplace and (gradients is None or torch.is_grad_enabled()):
            raise RuntimeError(
                "free_energy: with inplace_backward=True the prediction is overwritten by its gradient, so backward"
                " runs once and cannot be differentiated; use inplace_backward=False"
            )
        if torch.is_grad_enabled():
            return None, None, *_differentiable(call, ctx.saved_tensors, (g_free, g_energy, g_kl))
        of_energy, of_kl = _sum(g_free, 1.0, g_energy), _sum(g_free, call.beta, g_kl)
        if gradients is None:
            operands, data = ctx.saved_tensors[:-3], ctx.saved_tensors[-3:]
            upstream = []
            if call.reduction == NONE:
                rows = of_energy if of_energy is not None else of_kl
                assert rows is not None
                upstream = [
                    torch.zeros_like(rows) if g is None else g.contiguous() for g in (of_energy, of_kl)
                ]
            gradients = call.run(operands, data, upstream, call.needs)[3:]
        left = iter(gradients)
        results = [next(left) if call.needs >> i & 1 else None for i in range(len(ctx.needs_input_grad) - 2)]
        params, latent = results[: call.n_params], results[call.n_params :]
        if call.reduction != NONE:
            if of_energy is of_kl:
                _scale(results, of_energy, call.backend)
            else:
                _scale(params, of_energy, call.backend)
                _scale(latent, of_kl, call.backend)
        if of_energy is None:
            params = [None] * len(params)
        if of_kl is None:
            latent = [None] * len(latent)
        return None, None, *params, *latent


def _differentiable(
    call: _Call, saved: Sequence[Tensor], above: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients as functions of operands and of ``above``, by plain PyTorch: for create_graph=True."""
    # Views, so that a path from one operand to another (mean to z to the prediction) is left to the outer graph.
    operands, data = [operand.view_as(operand) for operand in saved[:-3]], saved[-3:]
    values = call.values(operands, data)
    wanted = [operand for i, operand in enumerate(operands) if call.needs >> i & 1]
    given = [(value, g) for value, g in zip(values, above, strict=True) if g is not None]
    gradients = iter(
        torch.autograd.grad(
            [value for value, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True
        )
    )
    return [next(gradients) if call.needs >> i & 1 else None for i in range(len(operands))]


def _traced(operands: Operands, likelihood: int, reduction: int, beta: float, needs: int) -> FreeEnergyTerms:
    energy, kl, _ = torch.ops.fekernels.free_energy(
        operands.params, operands.target, operands.mask, operands.latent, operands.weight, LIKELIHOODS[likelihood],
        REDUCTIONS[reduction], needs,
    )  # fmt: skip
    return FreeEnergyTerms(energy + beta * kl, energy, kl)


def _compute(
    operands: Operands, likelihood: int, reduction: int, beta: float, inplace: bool
) -> FreeEnergyTerms:
    params = operands.params
    tensors = [*params, *operands.latent]
    wide = halves = False
    needs, bit = 0, 1 if torch.is_grad_enabled() else 0
    for tensor in tensors:
        wide |= tensor.dtype is torch.float64
        if tensor.requires_grad:
            needs |= bit
            halves |= tensor.dtype is torch.float16
        bit <<= 1
    if wide or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        from fekernels.reference.free_energy import values

        data = operands.target, operands.mask, operands.latent, operands.weight
        return FreeEnergyTerms(*values(params, *data, likelihood, reduction, beta))
    if halves and needs and reduction != NONE:
        # A gradient stored in float16 before a GradScaler's factor is on it would underflow: it is made in backward.
        rows = _compute(operands, likelihood, NONE, beta, False)
        return FreeEnergyTerms(*(row.mean() if reduction == MEAN else row.sum() for row in rows))
    if torch.compiler.is_compiling():
        return _traced(operands, likelihood, reduction, beta, needs)
    backend = _backends.choose(tensors[0].device.type)
    # Elsewhere than in a plain prediction that nobody else's elements lie between, the gradient gets its own memory.
    inplace = inplace and needs & 1 == 1 and params[0].is_contiguous()
    call = _Call(backend, likelihood, len(params), reduction, beta, needs, inplace)
    known = operands.target, operands.mask, operands.weight
    if not needs:
        return FreeEnergyTerms(*call.run(tensors, known, [], 0))
    return FreeEnergyTerms(*_Terms.apply(call, known, *tensors))


def _reduction(function: str, reduction: str) -> int:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{function}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    return REDUCTIONS.index(reduction)


def _codes(function: str, likelihood: str) -> dict[int, int]:
    codes = CODES.get(likelihood) if isinstance(likelihood, str) else None
    if codes is None:
        raise ValueError(f"{function}: likelihood must be one of {', '.join(CODES)}; got {likelihood!r}")
    return codes


def _nonnegative(function: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be a float; got {type(value).__name__}")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{function}: {name} must be finite and not negative; got {value}")
    return float(value)


def free_energy(
    params: Tensor | Sequence[Tensor],
    target: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    likelihood: str = "gaussian",
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    beta: float = 1.0,
    free_bits: float = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    inplace_backward: bool = False,
    validate: bool = False,
) -> FreeEnergyTerms:
    """Energy -log p(x | z), KL(q || p), and F = energy + beta KL, which a VAE minimises; ELBO = -F at beta = 1.

    Constants are kept, so that values of different likelihoods compare. A sample's energy is the sum over its event,
    its KL the sum over its latents; nothing is averaged but the batch.

    Args:
        params: of the likelihood, one tensor or a tuple in the order of ``fe.likelihoods``: the first of shape
            [B, *event], the others broadcasting to it. For "categorical" logits [B, *event, classes]. float32,
            bfloat16, float16 (computed in float32) or float64 (computed by the reference).
        target: [B, *event], real or integer; for "categorical" class indices. Gets no gradient.
        mean, logvar: of q(z | x), [B, *latent]; log-variances.
        likelihood: a name of ``fe.likelihoods``.
        prior_mean, prior_logvar: of p(z), broadcasting to ``mean``; None is 0, the standard normal.
        beta: factor of the KL, >= 0. ``.kl`` is reported before it.
        free_bits: nats a latent may cost for nothing: the KL becomes sum_j max(free_bits, batch mean of KL_j). Done in
            plain PyTorch on [B, latents]. Not with reduction "none", which has no batch mean.
        mask: bool, like ``target``, True where it was observed. An unobserved element adds exactly 0 and gets a
            gradient of exactly 0, also where it holds NaN.
        weight: [B], multiplies energy and KL of its sample. "mean" still divides by B. Gets no gradient.
        reduction: over the batch: "mean" (default, whose gradients do not grow with the batch), "sum", or "none" for
            [B]. An empty batch gives NaN for "mean" and 0 for "sum".
        inplace_backward: write the gradient over ``params`` (its first tensor) instead of into new memory. Only right
            where the operation that made it does not need its output, as a linear layer or a convolution, unlike a
            sigmoid; autograd's version counter finds the others in backward. "mean" and "sum" only. Backward runs once.
            Nothing is written where no gradient is wanted. Ignored for a prediction that is not contiguous, in float16
            or float64, and under torch.compile.
        validate: check that the target's values are possible (counts whole and not negative, probabilities in
            [0, 1], classes that exist), at the price of reading it once more and, on a GPU, of a synchronisation.

    Returns:
        ``FreeEnergyTerms(free_energy, energy, kl)``, float32 (float64 for float64 operands): scalars, or [B] for
        "none". All three are differentiable, in params, mean, logvar and the prior's.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong value, shape or device; the message has the name, what was expected and what came.
    """
    function = "free_energy"
    codes, how = _codes(function, likelihood), _reduction(function, reduction)
    beta, free_bits = _nonnegative(function, "beta", beta), _nonnegative(function, "free_bits", free_bits)
    if how == NONE and free_bits:
        raise ValueError(
            f"{function}: free_bits needs a batch mean; reduction must be 'mean' or 'sum', got 'none'"
        )
    if how == NONE and inplace_backward:
        raise ValueError(
            f"{function}: inplace_backward needs a gradient known in advance; reduction must be 'mean' or 'sum', got"
            " 'none'"
        )
    floating(function, "mean", mean)  # None would mean: no latent
    operands = gather(
        function,
        params,
        target,
        mean,
        logvar,
        prior_mean,
        prior_logvar,
        mask,
        weight,
        likelihood,
        list(codes),
    )
    if inplace_backward:
        _may_be_overwritten(function, params)
    if validate:
        _validate(function, likelihood, operands)
    code = codes[len(operands.params)]
    if not free_bits:
        return _compute(operands, code, how, beta, inplace_backward)
    latent, operands.latent = operands.latent, []
    energy = _compute(operands, code, how, beta, inplace_backward).energy
    kl = _free_bits_kl(latent, operands.weight, free_bits, how).to(energy.dtype)
    return FreeEnergyTerms(energy + beta * kl, energy, kl)


def energy(
    params: Tensor | Sequence[Tensor],
    target: Tensor,
    likelihood: str = "gaussian",
    mask: Tensor | None = None,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """-log p(target | params), summed over the event: [B], or its sum or mean. Arguments as ``free_energy``."""
    function = "energy"
    codes, how = _codes(function, likelihood), _reduction(function, reduction)
    operands = gather(function, params, target, None, None, None, None, mask, weight, likelihood, list(codes))
    if validate:
        _validate(function, likelihood, operands)
    return _compute(operands, codes[len(operands.params)], how, 1.0, False).energy


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """KL(N(mean, e^logvar) || N(prior_mean, e^prior_logvar)), summed over the latents: [B], or its sum or mean.

    By ``expm1`` and its series, so that it is right to the last digits near the prior, where the usual
    -(1 + v - m^2 - e^v)/2 loses all of them. Arguments as ``free_energy``.
    """
    function = "gaussian_kl"
    how = _reduction(function, reduction)
    operands = gather(function, None, None, mean, logvar, prior_mean, prior_logvar, None, None, "", [])
    return _compute(operands, 0, how, 1.0, False).kl


def _may_be_overwritten(function: str, params: Tensor | Sequence[Tensor]) -> None:
    prediction = params if isinstance(params, Tensor) else params[0]
    if torch.is_grad_enabled() and prediction.requires_grad and prediction.is_leaf:
        raise ValueError(
            f"{function}: params must be the result of an operation with inplace_backward=True; got a leaf that"
            " requires a gradient, whose values the gradient would replace"
        )


def _validate(function: str, likelihood: str, operands: Operands) -> None:
    assert operands.target is not None
    target = operands.target if operands.mask is None else operands.target[operands.mask]
    validate_target(function, likelihood, target, operands.params)


def _free_bits_kl(latent: list[Tensor], weight: Tensor | None, free_bits: float, reduction: int) -> Tensor:
    from fekernels.reference.free_energy import kl_elements

    elements = kl_elements(latent)
    if reduction == SUM and elements.shape[0] == 0:
        return elements.sum()
    if weight is not None:
        elements = elements * weight.double().unsqueeze(1)
    total = elements.mean(0).clamp(min=free_bits).sum()
    return total * len(elements) if reduction == SUM else total
