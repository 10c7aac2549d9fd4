"""The bounds of ``importance_weighted_bound`` where the samples of a data point are split over the ranks of a group."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime.ranks import max_over_ranks, sum_over_ranks

__all__ = ["bound_over_ranks"]


def bound_over_ranks(
    function: str, log_w: Tensor, dim: int, alpha: float | None, group: Any
) -> tuple[Tensor, Tensor | None]:
    """The bound, IWAE's for alpha None and else Renyi's, and for IWAE softmax(log w) of this rank's samples.

    In float64, of which all terms are sums or maxima over the ranks: two all-reduces.
    """
    here = log_w.double()
    if alpha is None:
        top = _finite(_greatest(function, here, dim, group))
        relative = (here - top).exp()
        (total,), count = _sums(function, [relative.sum(dim)], here.shape[dim], group)
        weights = (relative / total.unsqueeze(dim)).detach()
        return (total.log() + top.squeeze(dim) - count.log()).to(log_w.dtype), weights
    return _renyi(function, here, dim, 1 - alpha, group).to(log_w.dtype), None


def _greatest(function: str, values: Tensor, dim: int, group: Any, sign: int = 1) -> Tensor:
    """Over the samples of all ranks (with ``sign`` -1 the least); ``dim`` has length 1."""
    own = (sign * values.detach()).amax(dim, keepdim=True) if values.shape[dim] else None
    if own is None:
        shape = list(values.shape)
        shape[dim] = 1
        own = values.new_full(shape, -math.inf)
    return sign * max_over_ranks(function, own, group)


def _finite(top: Tensor) -> Tensor:
    return torch.where(top.isfinite(), top, 0.0)


def _sums(function: str, own: list[Tensor], samples: int, group: Any) -> tuple[list[Tensor], Tensor]:
    """Sums over the ranks of tensors of one shape, and of the number of samples, by one all-reduce."""
    flat = [each.flatten() for each in own]
    whole = sum_over_ranks(function, torch.cat([*flat, flat[0].new_full((1,), samples)]), group)
    *parts, count = whole.split([*(len(each) for each in flat), 1])
    return [part.view(own[0].shape) for part in parts], count.squeeze()


def _renyi(function: str, log_w: Tensor, dim: int, t: float, group: Any) -> Tensor:
    """log mean exp(t log w) / t, as that of one process."""
    samples = log_w.shape[dim]
    if t == 0:
        (total,), count = _sums(function, [log_w.sum(dim)], samples, group)
        return total / count
    top = _greatest(function, log_w, dim, group, 1 if t > 0 else -1)
    if math.isinf(t):
        # As amax: of equal ones each has its share of the gradient. A NaN is the greatest.
        chosen = (log_w == top) | log_w.isnan()
        largest = torch.where(chosen, log_w, 0.0).sum(dim)
        (total, ties), _ = _sums(function, [largest, chosen.double().sum(dim)], samples, group)
        return total / ties
    top = _finite(top)
    exponent = t * (log_w - top)
    own = [torch.expm1(exponent).sum(dim), exponent.exp().sum(dim)]
    (less_one, total), count = _sums(function, own, samples, group)
    less_one = less_one / count
    near = less_one > -0.5
    log_mean = torch.where(near, torch.log1p(torch.where(near, less_one, 0.0)), total.log() - count.log())
    return log_mean / t + top.squeeze(dim)
