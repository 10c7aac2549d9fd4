"""Stochastic gradient Langevin dynamics (Welling & Teh 2011) in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fekernels._runtime.pointer_table import Row, step_numbers
from fekernels.reference.optimizers.step import computing_dtype, noise_like, scalars, store

if TYPE_CHECKING:
    from fekernels.ops.optimizers.sgld import SgldSettings

__all__ = ["sgld_"]


def sgld_(rows: Sequence[Row], s: SgldSettings) -> None:
    """One step, in place."""
    if s.found_inf is not None and float(s.found_inf) != 0:
        return
    h, temperature, scale = scalars(s)
    times = step_numbers([row.step for row in rows])
    for row, t in zip(rows, times, strict=True):
        dtype = computing_dtype(row)
        theta, g = row.param.to(dtype), row.grad.to(dtype) / scale
        g = -g if s.maximize else g
        if s.weight_decay:  # 0 times an infinite parameter is NaN
            g = g + s.weight_decay * theta
        anchor = row.anchor.to(dtype) if row.anchor is not None else 0.0
        g_hat = g + s.prior_precision * (theta - anchor) if s.prior_precision else g
        theta = theta - h * g_hat
        if temperature > 0 and h > 0:
            theta = theta + math.sqrt(2 * temperature * h) * noise_like(row, s.seed, t).to(dtype)
        store(row, row.param, theta, "param", s, t)
        row.step.add_(1)
