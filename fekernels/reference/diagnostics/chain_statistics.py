"""Rank-normalised split R-hat and effective sample sizes of [elements, chains, draws], by PyTorch.

Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, "Rank-normalization, folding, and localization", arXiv:1903.08008.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["chain_statistics"]

BLOCK = 1 << 22  # elements that are worked on at once: some 200 MB with the copies in float64
TAILS = (0.05, 0.95)
RESOLUTION = 1e-15  # a smaller range is a constant's


def chain_statistics(draws: Tensor, scores: Tensor, wanted: int) -> Tensor:
    """[3, weights]: R-hat, bulk and tail effective sample size of draws [chains, draws, weights].

    Args:
        scores: float64 [2 m - 1], the normal quantiles of half ranks of the m draws that are in halves of chains.
        wanted: a bit for each of the three; the others are NaN.
    """
    chains, count, weights = draws.shape
    found = torch.full((3, weights), math.nan, dtype=torch.float64, device=draws.device)
    step = max(1, BLOCK // (chains * count))
    for begin in range(0, weights, step):
        part = draws[..., begin : begin + step].permute(2, 0, 1).contiguous()
        known = part.isfinite().all(-1).all(-1)
        values = part.double()
        for row, function in enumerate((_rhat_of_ranks, _size_of_bulk, _size_of_tails)):
            if wanted >> row & 1:
                found[row, begin : begin + step] = torch.where(known, function(values, scores), math.nan)
    return found


def _halves(x: Tensor) -> Tensor:
    """[elements, chains, n] -> [elements, 2 chains, n // 2]."""
    half = x.shape[-1] // 2
    return torch.cat((x[..., :half], x[..., -half:]), 1)


def _normal_scores(x: Tensor, scores: Tensor) -> Tensor:
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
    return torch.empty_like(flat).scatter_(1, where, scores[doubled]).view_as(x)


def _rhat(x: Tensor) -> Tensor:
    n = x.shape[-1]
    within = x.var(-1).mean(-1)
    between = n * x.mean(-1).var(-1)
    return ((between / within + n - 1) / n).sqrt()


def _rhat_of_ranks(x: Tensor, scores: Tensor) -> Tensor:
    halves = _halves(x)
    ordered = halves.flatten(1).sort(1).values
    middle = ordered.shape[1] // 2
    # Their mean, not an interpolation: the two in the middle are then as far from it, to the bit, and so of one rank.
    median = (ordered[:, middle - 1] + ordered[:, middle]) / 2
    folded = (halves - median[:, None, None]).abs()
    # Folded draws of two values are a constant, which has no R-hat: that of the bulk counts.
    return torch.fmax(_rhat(_normal_scores(halves, scores)), _rhat(_normal_scores(folded, scores)))


def _size_of_bulk(x: Tensor, scores: Tensor) -> Tensor:
    return _ess(_normal_scores(_halves(x), scores))


def _size_of_tails(x: Tensor, scores: Tensor) -> Tensor:
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
