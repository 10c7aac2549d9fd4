"""What names a draw of counter-based noise: checks of seed, stream, step and offset."""

from __future__ import annotations

__all__ = ["LAST_INDEX", "integer", "signed_seed"]

LAST_INDEX = 1 << 50  # elements are numbered by 48-bit counters of four words each


def integer(function: str, name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: {name} must be an int; got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{function}: {name} must be in [{low}, {high}); got {value}")
    return value


def signed_seed(function: str, seed: object) -> int:
    """A 64-bit seed as the signed integer that operators take; negative seeds are their two's complement."""
    value = integer(function, "seed", seed, -(1 << 63), 1 << 64)
    return value - (1 << 64) if value >= 1 << 63 else value
