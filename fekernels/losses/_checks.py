"""The check of a tensor that PyTorch's own operators will compute with, as the losses word it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fekernels._checks import FLOATS, dense

__all__ = ["floating_tensor"]


def floating_tensor(function: str, name: str, value: Any) -> Tensor:
    """A dense tensor of float32, bfloat16, float16 or float64.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a Tensor; got {type(value).__name__}")
    dense(function, name, value)
    if value.dtype not in FLOATS:
        expected = "float32, bfloat16, float16 or float64" if value.is_floating_point() else "floating"
        raise TypeError(f"{function}: {name} must be {expected}; got {value.dtype}")
    return value
