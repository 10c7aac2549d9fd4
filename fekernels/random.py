"""Counter-based noise: any element of any draw, on any device, alone and with the same bits.

A draw is named by (seed, stream, step, purpose); its elements are numbered by their index in the logical, contiguous,
unsharded tensor. Element ``g`` is made from word ``g % 4`` of the Philox4x32-10 block whose counter holds ``g // 4``,
the purpose, the step and the stream, under the key ``seed``. So any slice equals the slice of the whole, whatever the
device, the instruction set, the number of threads or of processes.

Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fekernels._catalogue.random import USER
from fekernels._checks import device as as_device
from fekernels._checks import integer
from fekernels.ops.noise_key import COUNTERS, LAST_INDEX, PURPOSES, signed_seed
from fekernels.ops.random import draw

__all__ = ["bits", "normal", "uniform"]


def _sizes(function: str, shape: object) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes, bytearray)) or not isinstance(shape, Sequence):
        try:
            return (integer(function, "shape", shape, 0, LAST_INDEX),)
        except TypeError:
            kind = type(shape).__name__
            raise TypeError(f"{function}: shape must be an int or a sequence of ints; got {kind}") from None
    if torch.compiler.is_compiling():  # where a comparison would fix the range of a size that is a symbol
        return tuple(shape)
    return tuple(integer(function, f"shape[{i}]", size, 0, LAST_INDEX) for i, size in enumerate(shape))


def _device(function: str, device: object) -> torch.device:
    return torch.get_default_device() if device is None else as_device(function, "device", device)


def _draw(
    kind: str,
    shape: int | Sequence[int],
    seed: int,
    stream: int,
    step: int,
    offset: int,
    purpose: int,
    device: torch.device | str,
) -> Tensor:
    function = f"random.{kind}"
    sizes = _sizes(function, shape)
    # Of sizes that are symbols the operator sees the numbers.
    count = 0 if torch.compiler.is_compiling() else math.prod(sizes)
    if count > LAST_INDEX:
        raise ValueError(f"{function}: shape must have at most 2^50 elements; got {sizes}")
    return draw(
        kind,
        sizes,
        signed_seed(function, seed),
        integer(function, "stream", stream, 0, COUNTERS),
        integer(function, "step", step, 0, COUNTERS),
        integer(function, "offset", offset, 0, LAST_INDEX - count + 1),
        integer(function, "purpose", purpose, 0, PURPOSES),
        _device(function, device),
    )


def bits(
    shape: int | Sequence[int],
    *,
    seed: int,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    purpose: int = USER,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random words: int32 of ``shape``, each with 32 random bits.

    Args:
        shape: of the result, an int or a sequence of ints.
        seed: 64 bits, 0 .. 2^64 - 1 (or negative, as two's complement): the key.
        stream: 0 .. 2^32 - 1; independent sequences under one seed.
        step: 0 .. 2^32 - 1; independent again, for what repeats in time.
        offset: index of the first element in the logical tensor, so that a slice of a larger draw is made on its own.
        purpose: 0 .. 65535; 0 to 3 are this package's own (Langevin noise, stochastic rounding, weight samples,
            latents).
        device: of the result. The bits do not depend on it.

    Every number may be a NumPy scalar. Under ``torch.vmap`` it is a random operation, as ``torch.randn`` is: an error
    unless ``randomness`` is "same" (one draw for all) or "different", where the draws of the instances continue each
    other: that of instance i begins at ``offset + i * numel``.

    Raises:
        TypeError: an argument that is not an int.
        ValueError: one out of its range.
    """
    return _draw("bits", shape, seed, stream, step, offset, purpose, device)


def uniform(
    shape: int | Sequence[int],
    *,
    seed: int,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    purpose: int = USER,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform numbers in (0, 1], float32 of ``shape``: ``fma(float32(word), 2^-32, 2^-33)``. Arguments as ``bits``."""
    return _draw("uniform", shape, seed, stream, step, offset, purpose, device)


def normal(
    shape: int | Sequence[int],
    *,
    seed: int,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    purpose: int = USER,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal numbers, float32 of ``shape``, by Box and Muller on pairs of words; \\|z\\| <= 6.77.

    Arguments as ``bits``. The tail ends where the smallest uniform, 2^-33, puts it; beyond lies 1.3e-11 of the normal.
    """
    return _draw("normal", shape, seed, stream, step, offset, purpose, device)
