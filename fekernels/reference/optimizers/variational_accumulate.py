"""Sums over draws of a gradient, and of its product with the draw's normal, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fekernels._catalogue.random import WEIGHT_SAMPLE
from fekernels._runtime.pointer_table import Row, step_numbers
from fekernels.reference.optimizers.step import computing_dtype, noise_like

if TYPE_CHECKING:
    from fekernels.ops.optimizers.variational_accumulate import VariationalAccumulateSettings

__all__ = ["variational_accumulate_"]


def variational_accumulate_(rows: Sequence[Row], s: VariationalAccumulateSettings) -> None:
    """exp_avg and exp_avg_sq are the sums; noise_unit has the number of the draw."""
    if s.found_inf is not None and float(s.found_inf) != 0:
        return
    step_numbers([row.step for row in rows])  # which raises where the parameter has no step left
    for row in rows:
        assert row.exp_avg is not None and row.exp_avg_sq is not None and row.noise_unit is not None
        dtype = computing_dtype(row)
        grad = row.grad.to(dtype)
        product = grad * noise_like(row, s.seed, int(row.noise_unit), WEIGHT_SAMPLE).to(dtype)
        first = s.samples == 0
        row.exp_avg.copy_(grad if first else row.exp_avg.to(dtype) + grad)
        row.exp_avg_sq.copy_(product if first else row.exp_avg_sq.to(dtype) + product)
