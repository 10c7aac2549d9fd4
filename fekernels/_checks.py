"""Checks of single arguments, with one format of messages: ``function: name must be ...; got ...``.

Whatever carries a number is one: Python's own, NumPy's scalars, arrays without dimensions. Bools are not.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "INTEGERS",
    "boolean",
    "dense",
    "device",
    "floating",
    "integer",
    "number",
    "one_of",
    "pair",
    "same_device",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip


def _python(value: Any) -> Any:
    """A NumPy scalar or an array without dimensions as what it holds; anything else as it is."""
    # All that torch.compile follows, which knows no union of types either.
    if type(value) in (float, int, bool):
        return value
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def number(
    function: str,
    name: str,
    value: Any,
    *,
    least: float = 0.0,
    above: float = -math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """A float that is no less than ``least``, more than ``above`` and less than ``below``.

    NaN is refused, and infinity unless ``infinite`` says that it is right. Most of the package's numbers are scales:
    hence ``least`` is 0 unless it is said.

    Raises:
        TypeError: what is no number, a bool, a tensor. ValueError: one out of its range.
    """
    found, came = _python(value), value
    if isinstance(found, bool) or not isinstance(found, (float, int, numbers.Real)):
        raise TypeError(f"{function}: {name} must be a number; got {type(value).__name__}")
    if type(found) is not float:  # a number that torch.compile traces stays symbolic
        try:
            found = float(found)
        except OverflowError:
            found, came = math.nan, "an int that no float can hold"
    inside = found >= least and (found > above or above == -math.inf) and (found < below or below == math.inf)
    if not inside or (not infinite and (found == math.inf or found == -math.inf)):
        raise ValueError(f"{function}: {name} must be {_range(least, above, below, infinite)}; got {came}")
    return found


def _range(least: float, above: float, below: float, infinite: bool) -> str:
    strict = above >= least
    if below < math.inf:
        return f"in ({above:g}, {below:g})" if strict else f"in [{least:g}, {below:g})"
    bound = "" if max(least, above) == -math.inf else f"> {above:g}" if strict else f">= {least:g}"
    return " and ".join(filter(None, ["" if infinite else "finite", bound])) or "a number"


def pair(function: str, name: str, value: Any) -> Sequence[Any]:
    """A tuple or list of two, whose elements are not looked at. TypeError for anything else."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{function}: {name} must be a pair of numbers; got {value!r}")
    return value


def integer(function: str, name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An int, ``low`` or more and less than ``high``.

    A size or number that torch.export keeps as a symbol passes: a comparison would fix its range in the exported
    program. Operators check it again when its value is known.

    Raises:
        TypeError: what is no whole number by its type, or a bool. ValueError: one out of its range.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    found = _python(value)
    if isinstance(found, bool) or not isinstance(found, (int, numbers.Integral)):
        raise TypeError(f"{function}: {name} must be an int; got {type(value).__name__}")
    found = found if type(found) is int else int(found)
    if (low is not None and found < low) or (high is not None and found >= high):
        expected = (
            f"at least {low}" if high is None else f"below {high}" if low is None else f"in [{low}, {high})"
        )
        raise ValueError(f"{function}: {name} must be {expected}; got {found}")
    return found


def boolean(function: str, name: str, value: Any) -> bool:
    """A bool, Python's or NumPy's.

    Raises:
        TypeError: anything else.
    """
    found = _python(value)
    if not isinstance(found, bool):
        raise TypeError(f"{function}: {name} must be a bool; got {type(value).__name__}")
    return found


def one_of(function: str, name: str, value: Any, options: Sequence[str]) -> str:
    """One of these strings; the message lists them.

    Raises:
        TypeError: what is no string. ValueError: another string.
    """
    if isinstance(value, str) and value in options:
        return value
    error, came = (ValueError, repr(value)) if isinstance(value, str) else (TypeError, type(value).__name__)
    raise error(f"{function}: {name} must be one of {', '.join(options)}; got {came}")


def dense(function: str, name: str, tensor: Any) -> Tensor:
    """A tensor that is neither sparse nor nested.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor; got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else f"layout {str(tensor.layout)[6:]}"
        raise TypeError(f"{function}: {name} must be dense; got {layout}")
    return tensor


def floating(function: str, name: str, tensor: Any) -> Tensor:
    """A dense tensor of one of the four floating-point dtypes.

    Raises:
        TypeError: anything else.
    """
    tensor = dense(function, name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {name} must be float32, bfloat16, float16 or float64; got {str(tensor.dtype)[6:]}"
        )
    return tensor


def device(function: str, name: str, value: Any) -> torch.device:
    """A device, or what ``torch.device`` makes one of.

    Raises:
        TypeError: what is neither. ValueError: a name of none.
    """
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{function}: {name} must be a device; got {value!r}: {error}") from None
    except TypeError:
        raise TypeError(
            f"{function}: {name} must be a device or its name; got {type(value).__name__}"
        ) from None


def same_device(function: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """ValueError for a tensor on another device than ``device``."""
    if tensor.device != device:
        raise ValueError(f"{function}: {name} must be on {device} like the others; got {tensor.device}")
