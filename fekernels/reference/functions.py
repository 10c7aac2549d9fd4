"""Elementary functions in float32, bit for bit those of csrc/core/functions.h: each operation is rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels.reference.random import fma

__all__ = ["exp"]


def power_of_two(n: Tensor) -> Tensor:
    """2^n of int32 -126 <= n <= 127."""
    return ((n + 127) << 23).view(torch.float32)


def exp(x: Tensor) -> Tensor:
    """x = n log 2 + r with |r| <= log(2)/2, and e^r - 1 - r = r^2 Q(r), Q minimax; log 2 in two parts."""
    bounded = torch.where(x < -176.0, -176.0, x)
    bounded = torch.where(bounded > 176.0, 176.0, bounded)
    shifted = fma(bounded, 1.44269504, 12582912.0)  # the magic number leaves n in the low bits of the sum
    n = shifted - 12582912.0
    r = fma(n, -1.42860677e-06, fma(n, -0.693145752, bounded))
    r2 = r * r
    q = fma(r2, 0.0013820136, fma(r, 0.008368686, 0.041668274))
    q = fma(q, r2, fma(r, 0.16666521, 0.49999994))
    exp_r = fma(r2, q, r) + 1.0
    power = shifted.view(torch.int32) - 0x4B400000
    half = power >> 1  # two factors: one would leave the range of a normal number
    return exp_r * power_of_two(half) * power_of_two(power - half)
