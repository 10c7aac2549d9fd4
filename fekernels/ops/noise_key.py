"""What names a draw of counter-based noise: checks of seed, stream, step, offset and purpose."""

from __future__ import annotations

from fekernels._checks import integer

__all__ = ["COUNTERS", "LAST_INDEX", "PURPOSES", "check_key", "signed_seed"]

LAST_INDEX = 1 << 50  # elements are numbered by 48-bit counters of four words each
COUNTERS = 1 << 32  # streams, and steps
PURPOSES = 1 << 16


def signed_seed(function: str, seed: object) -> int:
    """A 64-bit seed as the signed integer that operators take; negative seeds are their two's complement."""
    value = integer(function, "seed", seed, -(1 << 63), 1 << 64)
    return value - (1 << 64) if value >= 1 << 63 else value


def check_key(
    function: str,
    stream: int,
    step: int,
    offset: int,
    purpose: int = 0,
    *,
    streams: int = 1,
    last: int = LAST_INDEX,
) -> None:
    """ValueError where an operator's numbers name no draw of ``streams`` streams, or an offset beyond ``last``."""
    for name, value, high in (
        ("stream", stream, COUNTERS - streams + 1),
        ("step", step, COUNTERS),
        ("purpose", purpose, PURPOSES),
        ("offset", offset, last + 1),
    ):
        if not 0 <= value < high:
            raise ValueError(f"{function}: {name} must be in [0, {high}); got {value}")
