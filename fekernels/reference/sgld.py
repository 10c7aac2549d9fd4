"""Stochastic gradient Langevin dynamics (Welling & Teh 2011) in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fekernels.reference.langevin_adam import noise_like, step_numbers, stochastic_rounding

__all__ = ["sgld_"]


def sgld_(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    anchors: list[Tensor],
    streams: list[int],
    shards: list[int],
    lr: float,
    lr_tensor: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    weight_decay: float,
    prior_precision: float,
    maximize: bool,
    stochastic: bool,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step, in place."""
    if found_inf is not None and float(found_inf) != 0:
        return
    h = float(lr_tensor) if lr_tensor is not None else lr
    temperature = float(temperature_tensor) if temperature_tensor is not None else temperature
    scale = float(grad_scale) if grad_scale is not None else 1.0
    times = step_numbers(steps)
    for i, param in enumerate(params):
        t = times[i]
        shard = (shards[3 * i], shards[3 * i + 1], shards[3 * i + 2]) if shards else None
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        theta, g = param.to(dtype), grads[i].to(dtype) / scale
        g = -g if maximize else g
        if weight_decay:  # 0 times an infinite parameter is NaN
            g = g + weight_decay * theta
        anchor = anchors[i].to(dtype) if anchors else 0.0
        g_hat = g + prior_precision * (theta - anchor) if prior_precision else g
        theta = theta - h * g_hat
        if temperature > 0 and h > 0:
            theta = theta + math.sqrt(2 * temperature * h) * noise_like(param, shard, seed, streams[i], t).to(
                dtype
            )
        if stochastic and param.dtype == torch.bfloat16:
            theta = stochastic_rounding(theta, "param", shard, seed, streams[i], t)
        param.copy_(theta)
        steps[i].add_(1)
