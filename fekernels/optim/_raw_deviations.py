"""Deviations of weights as functions of free numbers, which backprop can step: of logarithms, or by softplus."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["SCALES", "deviation_of", "raw_of", "slope_of"]

SCALES = ("softplus", "log")


def raw_of(std: float, scale: str) -> float:
    """The number whose deviation is ``std``."""
    return math.log(math.expm1(std)) if scale == "softplus" else math.log(std)


def deviation_of(raw: Tensor, scale: str) -> Tensor:
    """std of a raw parameter; softplus by the larger part, as log(1 + e^x) loses e^x below -17 in float32.

    By way of float64: PyTorch's float32 functions round otherwise at the ends of a tensor than inside, so that a shard
    would not have the bits of the whole.
    """
    in_float64 = raw.double()
    std = in_float64.exp() if scale == "log" else in_float64.clamp(min=0) + (-in_float64.abs()).exp().log1p()
    return std.to(raw.dtype)


def slope_of(raw: Tensor, std: Tensor, scale: str) -> Tensor:
    """d std / d raw, as ``deviation_of``."""
    return std if scale == "log" else raw.double().sigmoid().to(raw.dtype)
