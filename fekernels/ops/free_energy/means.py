"""Expectations that plain PyTorch has no stable operator for, for `fekernels.losses.likelihoods`."""

from __future__ import annotations

from torch import Tensor

from fekernels.reference.free_energy.special_functions import langevin

__all__ = ["continuous_bernoulli_mean"]


def continuous_bernoulli_mean(logit: Tensor) -> Tensor:
    """1/2 + L(l / 2) / 2 with Langevin's L(y) = coth y - 1/y; differentiable."""
    return 0.5 + langevin(logit / 2) / 2
