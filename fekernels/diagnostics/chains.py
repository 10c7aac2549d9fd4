"""Whether chains have converged and how many draws they are worth: rank-normalised split R-hat, effective sample size.

Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, "Rank-normalization, folding, and localization", arXiv:1903.08008.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fekernels._checks import one_of

__all__ = ["effective_sample_size", "split_rhat"]

BLOCK = 1 << 22  # elements that are worked on at once: some 200 MB with the copies in float64
TAILS = (0.05, 0.95)
RESOLUTION = 1e-15  # a smaller range is a constant's


def split_rhat(draws: Any) -> Tensor:
    """Rank-normalised split R-hat: the larger one of the draws' own and of the folded draws' (the paper, section 4).

    Draws above 1.01 are not to be believed yet. It compares chains with each other: those that all miss a mode agree,
    so start them apart.

    Args:
        draws: [chains, draws, ...], at least 4 draws of each chain, a tensor or an array. A single chain is compared
            with itself, first half and second. Of an odd number of draws the one in the middle is left out.

    Returns:
        [...], float64 on the draws' device. NaN where a draw is not finite, or where all are the same.

    Raises:
        TypeError: draws that are not numbers. ValueError: fewer than two dimensions, or than 4 draws of each chain.
    """
    return _by_element("split_rhat", draws, _rhat_of_ranks)


def effective_sample_size(draws: Any, kind: Literal["bulk", "tail"] = "bulk") -> Tensor:
    """How many independent draws know as much, from the autocorrelation of all chains together.

    Of the bulk: of the mean of the rank-normalised draws. Of the tail: the smaller one of the 5% and the 95% quantile.
    Fewer than 100 in all for each chain make no interval and no R-hat to rely on (section 4 of the paper). Chains that
    disagree have few.

    Args:
        draws: as in :func:`split_rhat`.
        kind: "bulk" or "tail".

    Returns:
        [...], float64 on the draws' device, more than the number of draws where they alternate. NaN where a draw is not
        finite; the number of draws where all are the same.

    Raises:
        TypeError, ValueError: as :func:`split_rhat`, and for another kind.
    """
    one_of("effective_sample_size", "kind", kind, ("bulk", "tail"))
    return _by_element("effective_sample_size", draws, _ess_of_bulk if kind == "bulk" else _ess_of_tails)


def _by_element(owner: str, draws: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of [elements, chains, draws], for as many elements at a time as fit a block."""
    values = torch.as_tensor(draws).detach()
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{owner}: draws must be real numbers; got {values.dtype}")
    if values.ndim < 2 or values.shape[0] < 1 or values.shape[1] < 4:
        raise ValueError(
            f"{owner}: draws must have shape (chains, draws, ...) with at least 4 draws; got {tuple(values.shape)}"
        )
    chains, count = values.shape[:2]
    flat = values.reshape(chains, count, values.shape[2:].numel())
    found = flat.new_empty(flat.shape[2], dtype=torch.float64)
    step = max(1, BLOCK // (chains * count))
    for begin in range(0, flat.shape[2], step):
        part = flat[..., begin : begin + step].permute(2, 0, 1).contiguous()
        known = part.isfinite().all(-1).all(-1)
        found[begin : begin + step] = torch.where(known, function(part.double()), math.nan)
    return found.reshape(values.shape[2:])


def _halves(x: Tensor) -> Tensor:
    """[elements, chains, n] -> [elements, 2 chains, n // 2]."""
    half = x.shape[-1] // 2
    return torch.cat((x[..., :half], x[..., -half:]), 1)


def _normal_scores(x: Tensor) -> Tensor:
    """Ranks among all draws of an element, ties at their mean, as normal quantiles (equation 14 of the paper)."""
    flat = x.flatten(1)
    size = flat.shape[1]
    ordered, where = flat.sort(1)
    # Twice the mean rank of each run of ties: the first and the last place that it has.
    places = torch.arange(size, device=x.device)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    if bool(begins.all()):
        doubled = (2 * places).expand_as(where)
    else:
        first = torch.where(begins, places, 0).cummax(1).values
        ends = begins.roll(-1, 1)
        ends[:, -1] = True
        last = torch.where(ends, places, size).flip(1).cummin(1).values.flip(1)
        doubled = first + last
    # There are as many different scores as half ranks: quantiles of a table instead of every draw's.
    half_ranks = torch.arange(2 * size - 1, device=x.device, dtype=torch.float64) / 2 + 1
    scores = torch.special.ndtri((half_ranks - 0.375) / (size + 0.25))
    return torch.empty_like(flat).scatter_(1, where, scores[doubled]).view_as(x)


def _rhat(x: Tensor) -> Tensor:
    n = x.shape[-1]
    within = x.var(-1).mean(-1)
    between = n * x.mean(-1).var(-1)
    return ((between / within + n - 1) / n).sqrt()


def _rhat_of_ranks(x: Tensor) -> Tensor:
    halves = _halves(x)
    ordered = halves.flatten(1).sort(1).values
    middle = ordered.shape[1] // 2
    # Their mean, not an interpolation: the two in the middle are then as far from it, to the bit, and so of one rank.
    median = (ordered[:, middle - 1] + ordered[:, middle]) / 2
    folded = (halves - median[:, None, None]).abs()
    # Folded draws of two values are a constant, which has no R-hat: that of the bulk counts.
    return torch.fmax(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))


def _ess_of_bulk(x: Tensor) -> Tensor:
    return _ess(_normal_scores(_halves(x)))


def _ess_of_tails(x: Tensor) -> Tensor:
    low, high = x.flatten(1).quantile(torch.tensor(TAILS, dtype=x.dtype, device=x.device), 1)
    return torch.minimum(*(_ess(_halves((x <= q[:, None, None]).double())) for q in (low, high)))


def _ess(x: Tensor) -> Tensor:
    """Of [elements, chains, n]: Geyer's initial monotone sequence (section 3.2 of the paper; Geyer 1992)."""
    chains, n = x.shape[1:]
    means = x.mean(-1)
    centred = x - means.unsqueeze(-1)
    # Autocovariances with divisor n, averaged over chains: one inverse transform for all chains of an element.
    power = torch.fft.rfft(centred, 2 * n).abs().square().mean(1)
    covariance = torch.fft.irfft(power, 2 * n)[:, :n] / n
    within = covariance[:, :1] * n / (n - 1)
    total = covariance[:, :1] + (means.var(-1, keepdim=True) if chains > 1 else 0.0)
    rho = 1 - (within - covariance) / total
    rho[:, 0] = 1.0
    # Sums of neighbours are positive and fall in theory; the first that is not positive ends the sequence at pair J.
    pairs = rho[:, : n // 2 * 2].view(len(x), -1, 2).sum(-1)
    most = max(0, (n - 1) // 2 - 1)
    end = torch.where((pairs <= 0).any(1), (pairs <= 0).int().argmax(1), most).clamp_max(most).unsqueeze(1)
    falling = pairs.cummin(1).values.cumsum(1)
    before = torch.where(end > 0, falling.gather(1, (end - 1).clamp_min(0)), 0.0)
    last = rho.gather(1, 2 * end)
    last = torch.where(pairs.gather(1, end) >= 0, last, last.clamp_min(0.0))
    draws = chains * n
    # Chains that alternate would have any number: at most draws log10(draws).
    tau = (2 * before + last - 1).clamp_min(1 / math.log10(draws)).squeeze(1)
    constant = x.flatten(1).amax(1) - x.flatten(1).amin(1) < RESOLUTION
    return torch.where(constant, float(draws), draws / tau)
