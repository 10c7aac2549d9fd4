"""Draws of PyTorch's random numbers, of the shape, dtype and device of what they are drawn for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fekernels._runtime.torch_internals import standard_gamma

__all__ = ["exponential_draw", "gamma_draw", "normal_draw", "poisson_draw", "uniform_draw"]


def normal_draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def uniform_draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """In [0, 1)."""
    return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def exponential_draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).exponential_(generator=generator)


def gamma_draw(shape: Tensor, generator: torch.Generator | None) -> Tensor:
    return standard_gamma(shape, generator=generator)


def poisson_draw(rate: Tensor, generator: torch.Generator | None) -> Tensor:
    """NaN at rates for which PyTorch's sampler has no int64: of those it makes any number."""
    possible = (rate >= 0) & (rate < 2.0**62)
    return torch.where(
        possible, torch.poisson(torch.where(possible, rate, 0.0), generator=generator), math.nan
    )
