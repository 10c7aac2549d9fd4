"""The table of cases of `sq_dist_rank`: where particles lie, how many, of which dtype, and what hint is given."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.pairwise import pairwise
from tests.support.stein import DTYPES, Size

KINDS = ("normal", "offset", "lattice", "coincident", "clusters", "sorted", "nan", "inf", "huge", "tiny")
EXACT = (
    "normal",
    "offset",
    "lattice",
    "clusters",
)  # of which float64 has the same distances, but for rounding
# Pairs, tiles of 64 give or take one, differences in 8 coordinates and 9, more coordinates than are packed at once.
SIZES = [
    Size(*size)
    for size in ((1, 2, 1), (2, 37, 3), (1, 63, 2), (1, 64, 8), (3, 65, 1), (1, 66, 9), (1, 300, 37), (1, 65, 2100))
]  # fmt: skip
HINTS = {
    "none": lambda exact: None,
    "exact": lambda exact: exact,
    "near": lambda exact: exact * 1.001,
    "off": lambda exact: exact * 3,
    "swapped": lambda exact: exact.flip(1),
    "zero": torch.zeros_like,
    "negative": lambda exact: torch.full_like(exact, -1.0),
    "huge": lambda exact: torch.full_like(exact, 1e30),
    "infinite": lambda exact: torch.full_like(exact, math.inf),
    "nan": lambda exact: torch.full_like(exact, math.nan),
}


def particles(kind: str, n: int, d: int) -> Tensor:
    """[n, d]."""
    x = torch.randn(n, d)
    if kind == "offset":
        x += 1e4
    elif kind == "lattice":
        x = x.round()
    elif kind == "coincident":
        x[:] = 0.3
    elif kind == "clusters":  # in order, as chains one after the other are
        x = 5 * torch.randn(3, d)[torch.arange(n) * 3 // n] + 1e-4 * x
    elif kind == "sorted":
        x = x.sort(0).values
    elif kind == "nan":
        x[n // 2, 0] = math.nan
    elif kind == "inf":
        x[n // 2, 0] = math.inf
    elif kind == "huge":  # many distances overflow
        x *= 2e19 / math.sqrt(d)
    elif kind == "tiny":  # many are denormal
        x *= 1e-20
    return x


class RankRow(NamedTuple):
    kind: str
    size: Size
    dtype: torch.dtype
    hint: str

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace("torch.", "")

    def make(self) -> Tensor:
        """[B, n, d]."""
        batch, n, d = self.size
        return torch.stack([particles(self.kind, n, d) for _ in range(batch)]).to(self.dtype)


ROWS = [RankRow(*row) for row in pairwise(kind=KINDS, size=SIZES, dtype=DTYPES, hint=list(HINTS))]
INTERPRETED = [row for row in ROWS if row.size == SIZES[1]]


def some_ranks(pairs: int) -> list[int]:
    """The two in the middle, the ends, and far ones; in no order, one of them twice."""
    return [(pairs - 1) // 2, pairs // 2, pairs - 1, pairs // 10, 0, pairs * 9 // 10, 0]


def sq_dist_in_float64(x: Tensor) -> Tensor:
    """Those of pairs i < j, sorted, [B, n (n - 1) / 2]."""
    return torch.stack([torch.pdist(one.double()).square().sort().values for one in x])
