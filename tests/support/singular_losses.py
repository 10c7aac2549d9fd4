"""Losses whose learning coefficient is known, of a network of nothing but weights; and a small one that learns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fekernels as fe
from fekernels.posterior import LearningCoefficient


class Weights(nn.Module):
    """d weights, 0 at first: a minimum of every loss here."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))

    def forward(self) -> Tensor:
        return self.w


def crossing(*powers: int) -> Callable[[Any, Any], Tensor]:
    """prod_i w_i^powers_i, even powers: lambda is the smallest 1 / powers_i (Watanabe 2009)."""

    def loss_fn(model: Any, rows: Any) -> Tensor:
        return torch.stack([w**power for w, power in zip(model(), powers, strict=True)]).prod(0)

    return loss_fn


def expected(powers: tuple[int, ...], n_beta: float, localization: float) -> float:
    """n_beta E[L] under exp(-n_beta L - localization / 2 |w|^2) of one or two weights, by quadrature."""
    # Fine near the axes, where the density of a product does not fall off.
    reach = 9 / math.sqrt(localization)
    axis = np.sinh(np.linspace(0, math.asinh(reach * 1e4), 4000)) / 1e4
    measure = np.gradient(axis)
    losses = axis ** powers[0]
    weights = measure * np.exp(-localization / 2 * axis**2)
    if len(powers) == 2:
        losses = losses[:, None] * axis[None, :] ** powers[1]
        weights = weights[:, None] * weights[None, :]
    weights = weights * np.exp(-n_beta * losses)
    return float(n_beta * (losses * weights).sum() / weights.sum())


# A batch of all the data, which the losses of crossings do not look at.
ONE = [torch.zeros(1000, 1)]


def estimate(model: nn.Module, loss_fn: Any, loader: Any, **changes: Any) -> LearningCoefficient:
    options: dict[str, Any] = {"data_size": 1000, "localization": 1.0, "seed": 1, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fe.local_learning_coefficient(model, loss_fn, loader, **{**options, **changes})


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def regression(rows: int = 50) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(4))
    return x, x.prod(1, keepdim=True)


def squared(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(rows[0]), rows[1])


def masked() -> dict[str, Tensor | None]:
    some = torch.rand(5, 3, generator=torch.Generator().manual_seed(5)) < 0.5
    return {"2.weight": None, "0.weight": some}
