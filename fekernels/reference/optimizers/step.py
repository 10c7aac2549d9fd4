"""What the optimizers' steps share in plain PyTorch: scalars, noise and rounding of one row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fekernels._catalogue.random import LANGEVIN_NOISE, STOCHASTIC_ROUNDING
from fekernels._runtime.pointer_table import Row
from fekernels.reference.random import normals, words

if TYPE_CHECKING:
    from fekernels.ops.optimizers.step import StepSettings

__all__ = ["computing_dtype", "flushed", "noise_like", "scalars", "store"]


def scalars(settings: StepSettings) -> tuple[float, float, float]:
    """lr, temperature and the gradients' scale, read on the host, which a GPU that is to run ahead would wait for."""
    lr, temperature, scale = settings.lr_tensor, settings.temperature_tensor, settings.grad_scale
    return (
        float(lr) if lr is not None else settings.lr,
        float(temperature) if temperature is not None else settings.temperature,
        float(scale) if scale is not None else 1.0,
    )


def computing_dtype(row: Row) -> torch.dtype:
    """float64 for itself, float32 for everything else."""
    return torch.float64 if row.param.dtype == torch.float64 else torch.float32


def global_index(numel: int, shard: tuple[int, int, int], device: torch.device) -> Tensor:
    """Index in the whole parameter of each element of a shard (offset, length, pitch), in logical order."""
    offset, length, pitch = shard
    local = torch.arange(numel, device=device)
    return offset + local // length * pitch + local % length


def flushed(average: Tensor, above: int = 0) -> Tensor:
    """0 for what is below the smallest normal number, or below 2^above times that.

    Averages of a dead unit's gradients decay to denormal numbers, where rounding then holds them for ever, and most
    CPUs take a hundred times as long over one of them.
    """
    return torch.where(average.abs() < torch.finfo(average.dtype).tiny * 2.0**above, 0.0, average)


def _draw(draw, index: Tensor, numel: int, contiguous: bool, *key: int) -> Tensor:  # type: ignore[no-untyped-def]
    """``draw`` at each index: in one piece where the indices are consecutive, else from the span that holds them."""
    if numel == 0:
        return draw(0, *key[:3], 0, key[3], index.device)
    first = int(index[0])
    if contiguous:
        return draw(numel, *key[:3], first, key[3], index.device)
    return draw(int(index[-1]) - first + 1, *key[:3], first, key[3], index.device)[index - first]


def noise_like(row: Row, seed: int, t: int, purpose: int = LANGEVIN_NOISE) -> Tensor:
    """The float32 normals of one parameter shaped like it."""
    numel, shard = row.param.numel(), row.shard
    index = global_index(numel, shard or (0, max(numel, 1), max(numel, 1)), row.param.device)
    whole = shard is None or shard[1] >= numel
    return _draw(normals, index, numel, whole, seed, row.stream, t, purpose).view(row.param.shape)


def store(row: Row, target: Tensor, value: Tensor, which: str, settings: StepSettings, t: int) -> None:
    """Store float32 values; where asked for, round them to bfloat16 up or down, unbiased, with the element's 16 bits.

    The parameter takes the low half of word g of its stream, exp_avg the high half; exp_avg_sq
    takes half g of a second sequence of 16-bit halves, that of the stream with its top bit flipped.
    """
    if not settings.stochastic_rounding or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    numel, shard, seed, stream = value.numel(), row.shard, settings.seed, row.stream
    key = (t, STOCHASTIC_ROUNDING)
    index = global_index(numel, shard or (0, max(numel, 1), max(numel, 1)), value.device)
    if which == "exp_avg_sq":
        half = _draw(words, index // 2, numel, False, seed, stream ^ 0x80000000, *key)
        noise = half >> (16 * (index % 2))
    else:
        drawn = _draw(words, index, numel, shard is None or shard[1] >= numel, seed, stream, *key)
        noise = drawn >> (16 if which == "exp_avg" else 0)
    bits = value.float().contiguous().view(torch.int32).view(-1)
    special = (bits & 0x7FFFFFFF) >= 0x7F800000  # infinities and NaNs round as always
    rounded = torch.where(special, bits, bits + (noise & 0xFFFF).int()) & -0x10000
    rounded = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, rounded | 0x400000, rounded)
    target.copy_(rounded.view(torch.float32).view(value.shape).bfloat16())
