"""The Langevin-Adam step in plain PyTorch, one tensor after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fekernels.reference.random import normals, words

__all__ = ["langevin_adam_"]


def momentum_noise_start(beta1: float, t: int) -> float:
    """c_t: bias correction divides m, and the noises in it, by 1 - beta1^t; with c_t each noise still counts once."""
    total, weight, power, decay = 0.0, 1.0, beta1, beta1**t
    while weight > 1e-10:
        total += weight * (1 - beta1) / (1 - power)
        weight *= decay
        power *= beta1
    return 1 / total


def step_numbers(steps: list[Tensor]) -> list[int]:
    """t of the step to come of each parameter; nothing has changed where one cannot be counted."""
    for step in steps:
        t, bits = float(step), 24 if step.dtype == torch.float32 else 32
        if not 0 <= t < 2**bits - (bits == 32):
            raise RuntimeError(f"step must be below 2^{bits}, where its counter ends; got {t:.17g}")
    return [int(step) + 1 for step in steps]


def momentum_noise_unit(lr: float, beta1: float) -> float:
    """q: noise put into m at every step has the variance 2 T D / q there."""
    return lr * (1 + beta1) / (1 - beta1)


def global_index(numel: int, shard: tuple[int, int, int], device: torch.device) -> Tensor:
    """Index in the whole parameter of each element of a shard (offset, run, pitch), in logical order."""
    offset, run, pitch = shard
    local = torch.arange(numel, device=device)
    return offset + local // run * pitch + local % run


def _draw(draw, index: Tensor, numel: int, contiguous: bool, *key: int) -> Tensor:  # type: ignore[no-untyped-def]
    """``draw`` at each index: in one piece where the indices are consecutive, else from the span that holds them."""
    if numel == 0:
        return draw(0, *key[:3], 0, key[3], index.device)
    first = int(index[0])
    if contiguous:
        return draw(numel, *key[:3], first, key[3], index.device)
    return draw(int(index[-1]) - first + 1, *key[:3], first, key[3], index.device)[index - first]


def noise_like(param: Tensor, shard: tuple[int, int, int] | None, seed: int, stream: int, t: int) -> Tensor:
    """The float32 normals of one parameter (purpose 0), shaped like it."""
    numel = param.numel()
    index = global_index(numel, shard or (0, max(numel, 1), max(numel, 1)), param.device)
    whole = shard is None or shard[1] >= numel
    return _draw(normals, index, numel, whole, seed, stream, t, 0).view(param.shape)


def stochastic_rounding(
    value: Tensor, which: str, shard: tuple[int, int, int] | None, seed: int, stream: int, t: int
) -> Tensor:
    """Round float32 to bfloat16 up or down, unbiased, with the 16 bits that belong to each element (purpose 1).

    The parameter takes the low half of word g of its stream, exp_avg the high half; exp_avg_sq takes half g of a second
    sequence of 16-bit halves, that of the stream with its top bit turned.
    """
    numel = value.numel()
    index = global_index(numel, shard or (0, max(numel, 1), max(numel, 1)), value.device)
    if which == "exp_avg_sq":
        noise = _draw(words, index // 2, numel, False, seed, stream ^ 0x80000000, t, 1) >> (16 * (index % 2))
    else:
        drawn = _draw(words, index, numel, shard is None or shard[1] >= numel, seed, stream, t, 1)
        noise = drawn >> (16 if which == "exp_avg" else 0)
    bits = value.float().contiguous().view(torch.int32).view(-1)
    special = (bits & 0x7FFFFFFF) >= 0x7F800000  # infinities and NaNs round as always
    rounded = torch.where(special, bits, bits + (noise & 0xFFFF).int()) & -0x10000
    rounded = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, rounded | 0x400000, rounded)
    return rounded.view(torch.float32).view(value.shape).bfloat16()


def langevin_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    noise_units: list[Tensor],
    anchors: list[Tensor],
    streams: list[int],
    shards: list[int],
    lr: float,
    lr_tensor: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    prior_precision: float,
    noise: str,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    bias_correction: bool,
    stochastic: bool,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step, in place. Reads its scalars on the host: no place for this on a GPU that is to run ahead."""
    if found_inf is not None and float(found_inf) != 0:
        return
    h = float(lr_tensor) if lr_tensor is not None else lr
    temperature = float(temperature_tensor) if temperature_tensor is not None else temperature
    scale = float(grad_scale) if grad_scale is not None else 1.0
    noisy = temperature > 0 and h > 0
    times = step_numbers(steps)

    for i, param in enumerate(params):
        t = times[i]
        shard = (shards[3 * i], shards[3 * i + 1], shards[3 * i + 2]) if shards else None
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        theta, g = param.to(dtype), grads[i].to(dtype) / scale
        m, v = exp_avgs[i].to(dtype), exp_avg_sqs[i].to(dtype)
        xi = (
            noise_like(param, shard, seed, streams[i], t).to(dtype) if noisy else torch.zeros((), dtype=dtype)
        )

        g = -g if maximize else g
        if decoupled_weight_decay:
            theta = theta * (1 - h * weight_decay)
        elif weight_decay:  # 0 times an infinite parameter is NaN
            g = g + weight_decay * theta
        v = beta2 * v + (1 - beta2) * g * g
        anchor = anchors[i].to(dtype) if anchors else 0.0
        g_hat = g + prior_precision * (theta - anchor) if prior_precision else g
        bc1, bc2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
        largest = torch.maximum(max_exp_avg_sqs[i].to(dtype), v) if amsgrad else v
        D = torch.clamp((largest / bc2).sqrt() + eps, min=h * prior_precision)

        if noise == "momentum":
            unit_before = float(noise_units[i]) if noise_units else 0.0
            if unit_before > 0 and h > 0 and unit_before != momentum_noise_unit(h, beta1):
                m = m * math.sqrt(unit_before / momentum_noise_unit(h, beta1))
            if noisy:
                c = momentum_noise_start(beta1, t) if bias_correction else 1.0
                g_hat = g_hat + c * (2 * temperature * D / h).sqrt() * xi
        m = beta1 * m + (1 - beta1) * g_hat
        theta = theta - h * (m / bc1) / D
        if noisy and noise == "preconditioned":
            theta = theta + (2 * temperature * h / D).sqrt() * xi
        if noisy and noise == "isotropic":
            theta = theta + math.sqrt(2 * temperature * h) * xi

        results = {"param": (param, theta), "exp_avg": (exp_avgs[i], m), "exp_avg_sq": (exp_avg_sqs[i], v)}
        for which, (target, value) in results.items():
            if stochastic and target.dtype == torch.bfloat16:
                value = stochastic_rounding(value, which, shard, seed, streams[i], t)
            target.copy_(value)
        if amsgrad:
            max_exp_avg_sqs[i].copy_(torch.maximum(max_exp_avg_sqs[i], exp_avg_sqs[i]))
        if noise_units and h > 0:
            noise_units[i].fill_(momentum_noise_unit(h, beta1) if noisy and noise == "momentum" else 0.0)
        steps[i].add_(1)
