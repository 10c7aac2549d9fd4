"""The free energy (negative ELBO): value and gradients from one read of the data.

F = energy + beta KL(q || p), with energy = -log p(x | z) summed over the event.

Source: Kingma & Welling 2014, arXiv:1312.6114, equation 7; beta: Higgins et al. 2017; free bits: Kingma et al. 2016,
arXiv:1606.04934, appendix C.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL, MEAN, NONE, REDUCTIONS, SUM
from fekernels._checks import floating, same_device
from fekernels._runtime.ranks import group_of, sum_over_ranks
from fekernels.ops.free_energy.autograd import FreeEnergyTerms, belongs_to_leaf, compute, plain_kernel
from fekernels.ops.free_energy.broadcasting import Operands, gather
from fekernels.ops.free_energy.domains import validate_parameters, validate_target
from fekernels.ops.free_energy.options import check_batch_dims, check_options, check_reduction
from fekernels.reference.free_energy.free_energy import counted, kl_elements, present, result_dtype

__all__ = ["FreeEnergyTerms", "energy", "free_energy", "gaussian_kl"]

ELEMENTS = len(REDUCTIONS)  # a reduction of gaussian_kl


def free_energy(
    params: Tensor | Sequence[Tensor],
    target: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    likelihood: str = "gaussian",
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    beta: float | Tensor = 1.0,
    free_bits: float = 0.0,
    mask: Tensor | None = None,
    latent_mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    inplace_backward: bool = False,
    validate: bool = False,
    batch_dims: int = 1,
    ignore_index: int | None = None,
    process_group: Any = None,
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
        beta: factor of the KL, >= 0: a number (NumPy's too), or a 0-dim tensor, whose value may be scheduled without
            recompiling, is checked only on the CPU, outside torch.compile and transforms, and gets a gradient (the KL)
            if it requires one. ``.kl`` is reported before it.
        free_bits: nats a latent may cost for nothing: the KL becomes sum_j max(free_bits, batch mean of KL_j). Done in
            plain PyTorch on [B, latents]. Not with reduction "none", which has no batch mean. KL_j is weighted first;
            where n of B samples have latent j (``latent_mask`` and a weight of 0 take it away) the bound is n/B of
            free_bits, so that padding changes nothing.
        mask: bool, broadcasting to ``target``, True where it was observed. An unobserved element adds exactly 0 and
            gets a gradient of exactly 0, also where it holds NaN.
        latent_mask: bool, broadcasting to ``mean``, False where there is no latent but padding: it adds exactly 0 to
            the KL and gets a gradient of exactly 0, also where it holds NaN.
        weight: of the batch's shape, multiplies energy and KL of its sample. "mean" still divides by B. Gets no
            gradient. A weight of 0 drops its sample, which adds exactly 0, with gradients of exactly 0, whatever it
            holds.
        reduction: over the batch: "mean" (default, whose gradients do not grow with the batch), "sum", or "none" for
            [B]. An empty batch gives NaN for "mean" and 0 for "sum".
        batch_dims: how many dimensions in front are the batch's and are not summed: with 2, K samples of each of B data
            points, [K, B, *event] and [K, B, *latent], give [K, B] for "none", and "mean" divides by K B.
        inplace_backward: write the gradient over ``params`` (its first tensor) instead of into new memory. Only right
            where the operation that made it does not need its output, as a linear layer or a convolution, unlike a
            sigmoid; autograd's version counter finds the others in backward. "mean" and "sum" only. Backward runs once.
            Nothing is written where no gradient is wanted. Ignored for one with gaps between samples, that shares its
            memory with another argument, or is in float16 or float64, and under torch.compile.
        validate: check that the target's values are possible (whole counts >= 0, values in [0, 1], positive numbers,
            classes that exist) and the parameters in their domain (means, inverse dispersions, shapes and degrees of
            freedom not negative), where they count, at the price of reading them once more and, on a GPU, of a
            synchronisation. Without it, a parameter outside its domain makes energy and gradients NaN.
        ignore_index: "categorical" only: a target equal to it counts as unobserved, as one that ``mask`` leaves out.
            Any other index that is no class makes its position's energy and gradients NaN.
        process_group: a ``torch.distributed.ProcessGroup`` or a DeviceMesh of one dimension over whose ranks the batch
            is split; None is no group. "mean" and "sum" are then those of the whole batch, on every rank, whatever part
            of it, none even, each rank has, and so is the batch mean of ``free_bits``: one all-reduce of three numbers,
            and with free_bits of two numbers a latent. Every rank of the group must call. Gradients are this rank's
            part times the number of ranks, so that their average over ranks, which DDP and FSDP take, is the whole
            batch's; backward sends nothing, and counts on what comes from above to be the same on every rank. With
            "none" nothing is sent.

    Returns:
        ``FreeEnergyTerms(free_energy, energy, kl)``, float32 (float64 for float64 operands): scalars, or [B] for
        "none". All three are differentiable, in params, mean, logvar and the prior's.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong value, shape or device; the message has the name, what was expected and what came.
    """
    function = "free_energy"
    options = check_options(
        function, likelihood, reduction, batch_dims, validate, ignore_index, beta, free_bits, inplace_backward
    )
    codes, beta, free_bits, how, inplace_backward, validate, batch_dims, ignored = options
    factor = 1.0 if isinstance(beta, Tensor) else beta
    group = None if process_group is None or how == NONE else group_of(function, process_group)
    asked = how
    if group is not None and how == MEAN and isinstance(mean, Tensor) and not mean.shape[:batch_dims].numel():
        how = SUM  # a mean of nothing is NaN
    special = how == NONE or free_bits or validate or batch_dims != 1 or codes.get(1) == CATEGORICAL
    special = special or (isinstance(beta, Tensor) and not beta.is_cpu)
    if not special and prior_mean is prior_logvar is mask is latent_mask is weight is None and 1 in codes:
        prediction = params[0] if type(params) is tuple and len(params) == 1 else params
        kernel, found = plain_kernel(prediction), None
        if kernel is not None:
            recorded = torch.is_grad_enabled()
            found = kernel(
                prediction, target, mean, logvar, codes[1], how, factor, recorded, inplace_backward
            )
        if found is not None:
            terms = FreeEnergyTerms(*found)
            if group is not None:
                return _of_all_ranks(function, terms, asked, math.prod(mean.shape[:batch_dims]), beta, group)
            return terms if factor is beta else _with_beta(terms, beta)
    floating(function, "mean", mean)
    operands = gather(
        function, params, target, mean, logvar, prior_mean, prior_logvar, mask, weight, likelihood, list(codes),
        latent_mask, batch_dims,
    )  # fmt: skip
    _leave_out(operands, ignored)
    if isinstance(beta, Tensor) and not beta.is_cpu:  # a number of the CPU is taken everywhere
        same_device(function, "beta", beta, operands.latent[0].device)
    if inplace_backward:
        _may_be_overwritten(function, params)
    if validate:
        _validate(function, likelihood, operands)
    code = codes[len(operands.params)]
    if free_bits:
        if group is None:
            terms = _with_free_bits(operands, code, how, free_bits, inplace_backward)
        else:
            terms = _with_free_bits_of_all_ranks(
                function, operands, code, how, asked, free_bits, inplace_backward, group
            )
        return _with_beta(terms, beta)
    terms = compute(operands, code, how, factor, inplace_backward)
    if group is not None:
        return _of_all_ranks(function, terms, asked, math.prod(operands.batch), beta, group)
    if how == NONE and batch_dims != 1:
        terms = FreeEnergyTerms(*(term.reshape(operands.batch) for term in terms))
    return terms if factor is beta else _with_beta(terms, beta)


def energy(
    params: Tensor | Sequence[Tensor],
    target: Tensor,
    likelihood: str = "gaussian",
    mask: Tensor | None = None,
    reduction: str = "none",
    batch_dims: int = 1,
    *,
    weight: Tensor | None = None,
    validate: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    """-log p(target | params), summed over the event: [B], or its sum or mean. Arguments as ``free_energy``.

    Of K samples per data point, [K, B, *event], ``batch_dims=2`` gives [K, B], which is what
    ``fe.importance_weighted_bound`` takes; without it K counts as the batch and B is summed.
    """
    function = "energy"
    options = check_options(function, likelihood, reduction, batch_dims, validate, ignore_index)
    codes, how, batch_dims = options.codes, options.reduction, options.batch_dims
    operands = gather(
        function, params, target, None, None, None, None, mask, weight, likelihood, list(codes), None, batch_dims
    )  # fmt: skip
    _leave_out(operands, options.ignored)
    if options.validate:
        _validate(function, likelihood, operands)
    result = compute(operands, codes[len(operands.params)], how, 1.0, False).energy
    return result.reshape(operands.batch) if how == NONE else result


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    reduction: str = "none",
    batch_dims: int = 1,
    *,
    latent_mask: Tensor | None = None,
) -> Tensor:
    """KL(N(mean, e^logvar) || N(prior_mean, e^prior_logvar)), summed over the latents: [B], or its sum or mean.

    By ``expm1`` and its series, so that it is right to the last digits near the prior, where the usual
    -(1 + v - m^2 - e^v)/2 loses all of them. Arguments as ``free_energy``; reduction "elements" sums nothing and gives
    every latent's own KL, of the shape of ``mean``.
    """
    function = "gaussian_kl"
    how, batch_dims = (
        check_reduction(function, reduction, ("elements",)),
        check_batch_dims(function, batch_dims),
    )
    if how == ELEMENTS:  # each is a row of its own
        how, batch_dims = NONE, floating(function, "mean", mean).dim()
    operands = gather(
        function, None, None, mean, logvar, prior_mean, prior_logvar, None, None, "", [], latent_mask, batch_dims
    )  # fmt: skip
    result = compute(operands, 0, how, 1.0, False).kl
    return result.reshape(operands.batch) if how == NONE else result


def _with_beta(terms: FreeEnergyTerms, beta: float | Tensor) -> FreeEnergyTerms:
    if isinstance(beta, Tensor):  # or two numbers without dimensions would promote each other
        beta = beta.to(terms.kl.dtype)
    return FreeEnergyTerms(terms.energy + beta * terms.kl, terms.energy, terms.kl)


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
    target, seen = operands.target, counted(operands.mask, operands.weight)
    if seen is not None:
        target = target[seen.expand_as(target)]
    validate_target(function, likelihood, target, operands.params)
    validate_parameters(function, likelihood, operands.params, seen)


def _of_all_ranks(
    function: str, terms: FreeEnergyTerms, reduction: int, rows: int, beta: float | Tensor, group: Any
) -> FreeEnergyTerms:
    """The reductions of the whole batch from those of this rank's ``rows`` rows: of none, 0; else as ``reduction``."""
    own = torch.stack([terms.energy.double(), terms.kl.double()])
    if reduction == MEAN and rows:
        own = own * rows
    whole = sum_over_ranks(function, torch.cat([own, own.new_full((1,), rows)]), group)
    energy, kl = (whole[:2] / whole[2] if reduction == MEAN else whole[:2]).to(terms.energy.dtype)
    return _with_beta(FreeEnergyTerms(energy, energy, kl), beta)


def _with_free_bits(
    operands: Operands, code: int, how: int, free_bits: float, inplace: bool
) -> FreeEnergyTerms:
    latent, operands.latent = operands.latent, []
    if result_dtype(latent) is torch.float64:  # which is then the dtype of all terms
        operands.params = [param.double() for param in operands.params]
    energy = compute(operands, code, how, 1.0, inplace).energy
    elements, counts = _kl_of_latents(latent, operands.weight, operands.latent_mask)
    kl = _free_bits_kl(elements, counts, free_bits, how).to(energy.dtype)
    return FreeEnergyTerms(energy, energy, kl)


def _with_free_bits_of_all_ranks(
    function: str,
    operands: Operands,
    code: int,
    how: int,
    reduction: int,
    free_bits: float,
    inplace: bool,
    group: Any,
) -> FreeEnergyTerms:
    """``how`` the energies of this rank's rows are reduced, ``reduction`` those of all."""
    latent, operands.latent = operands.latent, []
    if result_dtype(latent) is torch.float64:
        operands.params = [param.double() for param in operands.params]
    energy = compute(operands, code, how, 1.0, inplace).energy
    elements, counts = _kl_of_latents(latent, operands.weight, operands.latent_mask)
    rows, latents = elements.shape
    own = energy.double().reshape(1) * (rows if how == MEAN else 1)
    present_here = (
        own.new_full((latents,), rows) if counts is None else counts.expand_as(elements).double().sum(0)
    )
    whole = sum_over_ranks(
        function, torch.cat([own, own.new_full((1,), rows), elements.sum(0), present_here]), group
    )
    of_energy, of_all, kl, present_anywhere = whole.split([1, 1, latents, latents])
    sums = torch.cat([of_energy, kl.clamp(min=free_bits * present_anywhere).sum(0, keepdim=True)])
    of_energy, kl = (sums / of_all if reduction == MEAN else sums).to(energy.dtype)
    return FreeEnergyTerms(of_energy, of_energy, kl)


def _kl_of_latents(
    latent: list[Tensor], weight: Tensor | None, latent_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[B, latents] KL of each, weighted, and which count; None where all do."""
    counts = counted(latent_mask, weight)
    elements = kl_elements(present(latent, counts))
    if counts is not None:
        elements = torch.where(counts, elements, 0.0)
    if weight is not None:
        elements = elements * weight.double().unsqueeze(1)
    return elements, counts


def _free_bits_kl(elements: Tensor, counts: Tensor | None, free_bits: float, reduction: int) -> Tensor:
    if reduction == SUM and elements.shape[0] == 0:
        return elements.sum()
    if counts is None:
        total = elements.mean(0).clamp(min=free_bits).sum()
    else:
        total = elements.mean(0).clamp(min=free_bits * counts.double().mean(0)).sum()
    return total * len(elements) if reduction == SUM else total
