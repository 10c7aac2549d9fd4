"""How many examples the fuzz tests get, and from where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DEFAULT = 2000
total = DEFAULT  # of all of them together; `pytest --fuzz-examples N` sets it before they are collected


def examples(share: float) -> Callable[[Any], Any]:
    """This share of all examples. Of the default number the same ones in every run, so that only a change makes a test
    red; of another number new ones every time, as a search wants."""
    from hypothesis import HealthCheck, settings

    return settings(
        max_examples=max(1, round(share * total)),
        derandomize=total == DEFAULT,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
