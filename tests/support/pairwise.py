"""Few rows instead of a full product: every pair of values of two factors meets in one of them."""

from __future__ import annotations

from collections import Counter, namedtuple
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any


def pairwise(
    *kept: tuple[Any, ...], allowed: Callable[..., bool] | None = None, **factors: Sequence[Any]
) -> list[Any]:
    """Rows of a covering array of strength two: each pair of values of two factors, in at least one row.

    A mistake that takes two options to show is found as by the full product, in about as many rows as the two longest
    factors have pairs. One that takes three is not: rows that broke once are named in `kept`, whole, and come first.
    Greedy, and no full product is made: a pair that is missing begins a row, and each further factor takes the value
    that adds most pairs to it. The same arguments always give the same rows.

    Args:
        kept: rows that must be there, values in the order of `factors`.
        allowed: called with a row as keyword arguments; False for one that must not be. Pairs that no allowed row has
            are not asked for.
        factors: the values of each factor, two factors at least.

    Returns:
        Named tuples with the fields of `factors`, so that `parametrize(rows[0]._fields, rows)` names its cases.
    """
    row_type = namedtuple("row_type", list(factors))  # type: ignore[misc]
    values = [list(each) for each in factors.values()]
    longest_first = sorted(range(len(values)), key=lambda k: -len(values[k]))
    cells = [[(k, v) for v in range(len(each))] for k, each in enumerate(values)]
    pairs = [(a, b) for left, right in combinations(cells, 2) for a in left for b in right]
    missing, partners = set(pairs), Counter(cell for pair in pairs for cell in pair)
    used: Counter[tuple[int, int]] = Counter()
    rows = []

    def decoded(row: dict[int, int]) -> Any:
        return row_type(*(each[row[k]] for k, each in enumerate(values)))

    def completed(row: dict[int, int]) -> dict[int, int] | None:
        """`row` with values for the factors that it lacks, the best ones that are allowed."""
        k = next((k for k in longest_first if k not in row), None)
        if k is None:
            return row if allowed is None or allowed(**decoded(row)._asdict()) else None

        def worth(cell: tuple[int, int]) -> tuple[int, int, int]:
            new = sum((min(cell, x), max(cell, x)) in missing for x in row.items())
            return (
                new,
                partners[cell],
                -used[cell],
            )  # of equals the rarest: values share what is left to choose

        choices = sorted(cells[k], key=worth, reverse=True)
        return next((full for k, v in choices if (full := completed({**row, k: v})) is not None), None)

    def take(row: dict[int, int]) -> None:
        for pair in missing.intersection(combinations(sorted(row.items()), 2)):
            missing.remove(pair)
            partners.subtract(pair)
        used.update(row.items())
        rows.append(decoded(row))

    for row in kept:
        take({k: each.index(value) for k, (each, value) in enumerate(zip(values, row, strict=True))})
    for pair in pairs:
        if pair in missing and (full := completed(dict(pair))) is not None:
            take(full)
    return rows
