"""The free energy (negative ELBO): value and gradients from one read of the data.

F = energy + beta KL(q || p), with energy = -log p(x | z) summed over the event.

Source: Kingma & Welling 2014, arXiv:1312.6114, equation 7; beta: Higgins et al. 2017; free bits: Kingma et al. 2016,
arXiv:1606.04934, appendix C.8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fekernels._checks import floating, integer, number
from fekernels.ops._free_energy_autograd import (
    NONE,
    SUM,
    FreeEnergyTerms,
    belongs_to_leaf,
    compute,
    compute_plain,
)
from fekernels.ops._operands import Operands, gather
from fekernels.ops._validate import validate_target
from fekernels.reference.free_energy import LIKELIHOODS, N_PARAMS, REDUCTIONS

__all__ = ["FreeEnergyTerms", "energy", "free_energy", "gaussian_kl"]

# name -> {number of parameters: code}
CODES: dict[str, dict[int, int]] = {}
for _code, (_name, _count) in enumerate(zip(LIKELIHOODS, N_PARAMS, strict=True)):
    CODES.setdefault(_name, {})[_count] = _code


def _reduction(function: str, reduction: str) -> int:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{function}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    return REDUCTIONS.index(reduction)


def _codes(function: str, likelihood: str) -> dict[int, int]:
    codes = CODES.get(likelihood) if isinstance(likelihood, str) else None
    if codes is None:
        raise ValueError(f"{function}: likelihood must be one of {', '.join(CODES)}; got {likelihood!r}")
    return codes


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
    ignore_index: int | None = None,
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
            Nothing is written where no gradient is wanted. Ignored for one with gaps between samples, that shares its
            memory with another argument, or is in float16 or float64, and under torch.compile.
        validate: check that the target's values are possible (counts whole and not negative, probabilities in
            [0, 1], classes that exist), at the price of reading it once more and, on a GPU, of a synchronisation.
        ignore_index: "categorical" only: a target equal to it counts as unobserved, as one that ``mask`` leaves out.
            Any other index that is no class makes its position's energy and gradients NaN.

    Returns:
        ``FreeEnergyTerms(free_energy, energy, kl)``, float32 (float64 for float64 operands): scalars, or [B] for
        "none". All three are differentiable, in params, mean, logvar and the prior's.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong value, shape or device; the message has the name, what was expected and what came.
    """
    function = "free_energy"
    codes, how = _codes(function, likelihood), _reduction(function, reduction)
    beta, free_bits = number(function, "beta", beta), number(function, "free_bits", free_bits)
    if how == NONE and free_bits:
        raise ValueError(
            f"{function}: free_bits needs a batch mean; reduction must be 'mean' or 'sum', got 'none'"
        )
    if how == NONE and inplace_backward:
        raise ValueError(
            f"{function}: inplace_backward needs a gradient known in advance; reduction must be 'mean' or 'sum', got"
            " 'none'"
        )
    ignored = None if ignore_index is None else _ignored(function, likelihood, ignore_index)
    special = how == NONE or free_bits or validate or likelihood == "categorical"
    if not special and prior_mean is prior_logvar is mask is weight is None and 1 in codes:
        prediction = params[0] if type(params) is tuple and len(params) == 1 else params
        terms = compute_plain(prediction, target, mean, logvar, codes[1], how, beta, inplace_backward)
        if terms is not None:
            return terms
    floating(function, "mean", mean)
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
    _leave_out(operands, ignored)
    if inplace_backward:
        _may_be_overwritten(function, params)
    if validate:
        _validate(function, likelihood, operands)
    code = codes[len(operands.params)]
    if not free_bits:
        return compute(operands, code, how, beta, inplace_backward)
    latent, operands.latent = operands.latent, []
    energy = compute(operands, code, how, beta, inplace_backward).energy
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
    ignore_index: int | None = None,
) -> Tensor:
    """-log p(target | params), summed over the event: [B], or its sum or mean. Arguments as ``free_energy``."""
    function = "energy"
    codes, how = _codes(function, likelihood), _reduction(function, reduction)
    ignored = None if ignore_index is None else _ignored(function, likelihood, ignore_index)
    operands = gather(function, params, target, None, None, None, None, mask, weight, likelihood, list(codes))
    _leave_out(operands, ignored)
    if validate:
        _validate(function, likelihood, operands)
    return compute(operands, codes[len(operands.params)], how, 1.0, False).energy


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
    return compute(operands, 0, how, 1.0, False).kl


def _ignored(function: str, likelihood: str, ignore_index: object) -> int:
    if likelihood != "categorical":
        raise ValueError(
            f"{function}: ignore_index is a class of likelihood 'categorical'; got likelihood {likelihood!r}"
        )
    return integer(function, "ignore_index", ignore_index)


def _leave_out(operands: Operands, ignored: int | None) -> None:
    if ignored is None:
        return
    assert operands.target is not None
    seen = operands.target != ignored
    operands.mask = seen if operands.mask is None else operands.mask & seen


def _may_be_overwritten(function: str, params: Tensor | Sequence[Tensor]) -> None:
    prediction = params if isinstance(params, Tensor) else params[0]
    if torch.is_grad_enabled() and prediction.requires_grad and belongs_to_leaf(prediction):
        which = "a leaf" if prediction.is_leaf else "a view of a leaf"
        raise ValueError(
            f"{function}: params must be the result of an operation with inplace_backward=True; got {which} that"
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
