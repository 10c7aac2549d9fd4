"""Few rows instead of a full product: every pair of values of two factors meets in one of them."""

import heapq
from collections import namedtuple
from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(
    *kept: tuple[Any, ...], allowed: Callable[..., bool] | None = None, **factors: Sequence[Any]
) -> list[Any]:
    """Rows of a covering array of strength two: each pair of values of two factors, in at least one row.

    A mistake that takes two options to show is found as by the full product, in about as many rows as the two longest
    factors have pairs. One that takes three is not: rows that broke once are named in `kept`, whole, and come first.
    Greedy, by the most pairs not yet met, the first of equals: the same arguments always give the same rows.

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

    def decoded(row: tuple[int, ...]) -> Any:
        return row_type(*(each[i] for each, i in zip(values, row, strict=True)))

    candidates = [tuple(each.index(value) for each, value in zip(values, row, strict=True)) for row in kept]
    candidates += [
        row
        for row in product(*(range(len(each)) for each in values))
        if allowed is None or allowed(**decoded(row)._asdict())
    ]
    pairs = [set(combinations(enumerate(row), 2)) for row in candidates]
    chosen = list(range(len(kept)))
    missing = set().union(*pairs).difference(*(pairs[i] for i in chosen))
    # What a row would add only shrinks, so a stale count is an upper bound and few are counted again.
    heap = [(-len(pairs[i]), i) for i in range(len(kept), len(candidates))]
    while missing:
        bound, i = heapq.heappop(heap)
        gain = len(pairs[i] & missing)
        if gain == -bound:
            chosen.append(i)
            missing -= pairs[i]
        else:
            heapq.heappush(heap, (-gain, i))
    return [decoded(candidates[i]) for i in chosen]
