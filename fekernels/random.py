"""Counter-based noise: any element of any draw, on any device, alone and with the same bits.

A draw is named by (seed, stream, step, purpose); its elements are numbered by their index in the logical, contiguous,
unsharded tensor. Element ``g`` is made from word ``g % 4`` of the Philox4x32-10 block whose counter holds ``g // 4``,
the purpose, the step and the stream, under the key ``seed``. So any slice equals the slice of the whole, whatever the
device, the instruction set, the number of threads or of processes.

Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import fekernels.ops.random  # noqa: F401 (defines the operators)
from fekernels.ops._noise_key import LAST_INDEX, integer, signed_seed

__all__ = ["bits", "normal", "uniform"]

USER = 4  # the purpose tag of draws that no part of this package makes


def _draw(
    kind: str,
    dtype: torch.dtype,
    shape: int | Sequence[int],
    seed: int,
    stream: int,
    step: int,
    offset: int,
    purpose: int,
    device: torch.device | str,
) -> Tensor:
    function = f"random.{kind}"
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    for size in sizes:
        integer(function, "shape", size, 0, LAST_INDEX)
    count = 1
    for size in sizes:
        count *= size
    key = signed_seed(function, seed)
    integer(function, "stream", stream, 0, 1 << 32)
    integer(function, "step", step, 0, 1 << 32)
    integer(function, "purpose", purpose, 0, 1 << 16)
    integer(function, "offset", offset, 0, LAST_INDEX - count + 1)
    out = torch.empty(sizes, dtype=dtype, device=device)
    getattr(
        torch.ops.fekernels,
        {"bits": "philox_bits", "uniform": "philox_uniform", "normal": "philox_normal"}[kind],
    )(out, key, stream, step, offset, purpose)
    return out


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

    Raises:
        TypeError: an argument that is not an int.
        ValueError: one out of its range.
    """
    return _draw("bits", torch.int32, shape, seed, stream, step, offset, purpose, device)


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
    return _draw("uniform", torch.float32, shape, seed, stream, step, offset, purpose, device)


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
    return _draw("normal", torch.float32, shape, seed, stream, step, offset, purpose, device)
