"""The natural-gradient step of a mean-field Gaussian in plain PyTorch: IVON (Shen et al. 2024, arXiv:2402.17641)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fekernels._catalogue.optimizers import ABOVE_OF_MOMENTUM
from fekernels._catalogue.random import WEIGHT_SAMPLE
from fekernels._runtime.pointer_table import Row, step_numbers
from fekernels.reference.optimizers.step import computing_dtype, flushed, noise_like, scalars

if TYPE_CHECKING:
    from fekernels.ops.optimizers.variational_adam import VariationalAdamSettings

__all__ = ["variational_adam_"]


def variational_adam_(rows: Sequence[Row], s: VariationalAdamSettings) -> None:
    """One step, in place; exp_avg_sq is h. max_exp_avg_sq: the mean, where the parameter is its rounding."""
    if s.found_inf is not None and float(s.found_inf) != 0:
        return
    lr, temperature, scale = scalars(s)
    scale *= s.samples or 1
    times = step_numbers([row.step for row in rows])
    for row, t in zip(rows, times, strict=True):
        assert row.exp_avg is not None and row.exp_avg_sq is not None
        dtype = computing_dtype(row)
        rounded = row.param.element_size() == 2 and not s.samples
        kept = row.max_exp_avg_sq if rounded else row.param
        assert kept is not None
        mean, gm, h, g = (tensor.to(dtype) for tensor in (kept, row.exp_avg, row.exp_avg_sq, row.grad))
        g = g / scale
        gm = flushed(s.beta1 * gm + (1 - s.beta1) * g, ABOVE_OF_MOMENTUM)
        if temperature > 0:
            if s.samples:
                assert row.anchor is not None
                product = row.anchor.to(dtype) / scale
            else:
                assert row.noise_unit is not None
                product = g * noise_like(row, s.seed, int(row.noise_unit), WEIGHT_SAMPLE).to(dtype)
            precision = h + s.weight_decay
            h_hat = product * (s.ess / temperature * precision).sqrt()
            change = (1 - s.beta2) * (h_hat - h)
            h = h + change + 0.5 * change**2 / precision
        step = (gm / (1 - s.beta1**t) + s.weight_decay * mean) / (h + s.weight_decay)
        mean = mean - lr * s.lr_scale * step.clamp(-s.clip_radius, s.clip_radius)
        row.exp_avg.copy_(gm)
        row.exp_avg_sq.copy_(h)
        kept.copy_(mean)
        if rounded:
            row.param.copy_(mean)
        row.step.add_(1)
