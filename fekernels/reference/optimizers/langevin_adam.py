"""The Langevin-Adam step in plain PyTorch, one tensor after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fekernels._catalogue.optimizers import ABOVE_OF_MOMENTUM
from fekernels._runtime.pointer_table import Row, step_numbers
from fekernels.reference.optimizers.step import computing_dtype, flushed, noise_like, scalars, store

if TYPE_CHECKING:
    from fekernels.ops.optimizers.langevin_adam import LangevinAdamSettings

__all__ = ["langevin_adam_"]


def momentum_noise_start(beta1: float, t: int) -> float:
    """c_t: bias correction divides m, and the noises in it, by 1 - beta1^t; with c_t each noise still counts once."""
    total, weight, power, decay = 0.0, 1.0, beta1, beta1**t
    while weight > 1e-10:
        total += weight * (1 - beta1) / (1 - power)
        weight *= decay
        power *= beta1
    return 1 / total


def momentum_noise_unit(lr: float, beta1: float) -> float:
    """q: noise put into m at every step has the variance 2 T D / q in it."""
    return lr * (1 + beta1) / (1 - beta1)


def langevin_adam_(rows: Sequence[Row], s: LangevinAdamSettings) -> None:
    """One step, in place."""
    if s.found_inf is not None and float(s.found_inf) != 0:
        return
    h, temperature, scale = scalars(s)
    noisy = temperature > 0 and h > 0
    times = step_numbers([row.step for row in rows])

    for row, t in zip(rows, times, strict=True):
        assert row.exp_avg is not None and row.exp_avg_sq is not None
        dtype = computing_dtype(row)
        theta, g = row.param.to(dtype), row.grad.to(dtype) / scale
        m, v = row.exp_avg.to(dtype), row.exp_avg_sq.to(dtype)
        xi = noise_like(row, s.seed, t).to(dtype) if noisy else torch.zeros((), dtype=dtype)

        g = -g if s.maximize else g
        if s.decoupled_weight_decay:
            theta = theta * (1 - h * s.weight_decay)
        elif s.weight_decay:  # 0 times an infinite parameter is NaN
            g = g + s.weight_decay * theta
        if not s.frozen:
            v = flushed(s.beta2 * v + (1 - s.beta2) * g * g)
        anchor = row.anchor.to(dtype) if row.anchor is not None else 0.0
        g_hat = g + s.prior_precision * (theta - anchor) if s.prior_precision else g
        bc1 = 1 - s.beta1**t if s.bias_correction else 1.0
        bc2 = 1 - s.beta2**t if s.bias_correction and not s.frozen else 1.0
        largest = v
        if s.amsgrad:
            assert row.max_exp_avg_sq is not None
            stored = row.max_exp_avg_sq.to(dtype)
            largest = stored if s.frozen else torch.maximum(stored, v)
        D = torch.clamp((largest / bc2).sqrt() + s.eps, min=h * s.prior_precision)

        unit = momentum_noise_unit(h, s.beta1)
        if s.noise == "momentum":
            unit_before = float(row.noise_unit) if row.noise_unit is not None else 0.0
            if unit_before > 0 and h > 0 and unit_before != unit:
                m = m * math.sqrt(unit_before / unit)
            if noisy:
                c = momentum_noise_start(s.beta1, t) if s.bias_correction else 1.0
                g_hat = g_hat + c * (2 * temperature * D / h).sqrt() * xi
        m = flushed(s.beta1 * m + (1 - s.beta1) * g_hat, ABOVE_OF_MOMENTUM)
        theta = theta - h * (m / bc1) / D
        if noisy and s.noise == "preconditioned":
            theta = theta + (2 * temperature * h / D).sqrt() * xi
        if noisy and s.noise == "isotropic":
            theta = theta + math.sqrt(2 * temperature * h) * xi

        store(row, row.param, theta, "param", s, t)
        store(row, row.exp_avg, m, "exp_avg", s, t)
        if not s.frozen:
            store(row, row.exp_avg_sq, v, "exp_avg_sq", s, t)
            if s.amsgrad and row.max_exp_avg_sq is not None:
                row.max_exp_avg_sq.copy_(torch.maximum(row.max_exp_avg_sq, row.exp_avg_sq))
        if row.noise_unit is not None and h > 0:
            row.noise_unit.fill_(unit if noisy and s.noise == "momentum" else 0.0)
        row.step.add_(1)
