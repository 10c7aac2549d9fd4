"""Weights drawn from their mean-field Gaussian, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fekernels._catalogue.random import WEIGHT_SAMPLE
from fekernels._runtime.pointer_table import Row, step_numbers
from fekernels.reference.optimizers.step import computing_dtype, noise_like, scalars

if TYPE_CHECKING:
    from fekernels.ops.optimizers.variational_draw import VariationalDrawSettings

__all__ = ["variational_draw_"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def variational_draw_(rows: Sequence[Row], s: VariationalDrawSettings) -> None:
    """One draw, in place; exp_avg keeps the mean."""
    _, temperature, _ = scalars(s)
    times = step_numbers([row.step for row in rows])
    for row, t in zip(rows, times, strict=True):
        assert row.exp_avg is not None and row.exp_avg_sq is not None
        dtype = computing_dtype(row)
        param, mean, spread = row.param, row.exp_avg, row.exp_avg_sq.to(dtype)
        if mean.dtype == param.dtype or param.dtype in (torch.float32, torch.float64):
            mean.copy_(param)
        else:  # the parameter is the mean's rounding, or somebody has set it
            bits = _BITS[param.element_size()]
            known = mean.to(param.dtype).view(bits) == param.view(bits)
            mean.copy_(torch.where(known, mean, param.to(mean.dtype)))
        if temperature > 0:
            deviation = spread
            if not s.deviations:
                deviation = (temperature / s.ess / (spread + s.weight_decay)).sqrt()
            param.copy_(mean.to(dtype) + deviation * noise_like(row, s.seed, t, WEIGHT_SAMPLE).to(dtype))
        else:
            param.copy_(mean)
        row.step.add_(1)
