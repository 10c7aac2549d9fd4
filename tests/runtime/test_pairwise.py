"""The rows that stand for a full product: every pair of values is in one, and few rows are needed."""

from itertools import combinations, product
from typing import Any

import pytest

from tests.support.pairwise import pairwise

FACTORS: list[dict[str, list[Any]]] = [
    {"a": [1, 2], "b": [3]},
    {"a": [1, 2, 3], "b": ["x", "y"], "c": [None, 0.5]},
    {"a": list(range(11)), "b": list(range(5)), "c": list(range(4)), "d": [True, False], "e": [True, False]},
    {name: [0, 1] for name in "abcdefghijk"},
]


def pairs(rows: list[tuple[Any, ...]]) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@pytest.mark.parametrize(
    "factors", FACTORS, ids=lambda factors: "x".join(str(len(v)) for v in factors.values())
)
def test_every_pair_of_values_is_in_a_row(factors: dict[str, list[Any]]) -> None:
    rows = pairwise(**factors)
    assert pairs(rows) == pairs(list(product(*factors.values())))
    assert rows == pairwise(**factors)
    assert len(set(rows)) == len(rows)
    assert rows[0]._fields == tuple(factors)


def test_few_rows_are_needed() -> None:
    assert len(pairwise(**FACTORS[2])) <= 60  # 55 is the least, 880 the product
    assert len(pairwise(**FACTORS[3])) <= 12  # of 2048


def test_rows_that_are_kept_come_first_and_count() -> None:
    kept = [(2, "y", None), (2, "y", 0.5)]
    rows = pairwise(*kept, **FACTORS[1])
    assert rows[:2] == kept
    assert pairs(rows) == pairs(list(product(*FACTORS[1].values())))
    with pytest.raises(ValueError, match="not in list"):
        pairwise((4, "y", None), **FACTORS[1])


def test_rows_that_are_not_allowed_are_left_out() -> None:
    def allowed(a: int, b: str, c: float | None) -> bool:
        return not (a == 1 and b == "x") and not (b == "y" and c is None and a == 3)

    rows = pairwise(allowed=allowed, **FACTORS[1])
    assert all(allowed(*row) for row in rows)
    assert pairs(rows) == pairs([row for row in product(*FACTORS[1].values()) if allowed(*row)])
