"""The table of the Stein family's cases: kernels, sizes, regimes, dtypes, and the rows of them that tests run.

Every implementation runs the same rows (`IMPLEMENTATIONS` in `stein_kernels`): the reference, each C++ instruction set,
Triton on a GPU; interpreted Triton, which takes a second for what they take a millisecond for, those of `INTERPRETED`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fekernels import stein
from fekernels._catalogue import stein as catalogue
from fekernels._catalogue.stein import CODES, Distance
from tests.support.pairwise import pairwise

BETA, C, TEMPERATURE = -0.3, 1.2, 0.7
ROWS = {row.name: row for row in catalogue.KERNELS}
KERNELS = {**{name: name for name in ROWS}, "imq": stein.IMQ(beta=BETA, c=C)}
RADIAL = tuple(name for name, row in ROWS.items() if row.distance is not None)
SMOOTH = tuple(name for name in RADIAL if ROWS[name].discrepancy)
FINITE = tuple(name for name, row in ROWS.items() if row.discrepancy)
ROOTS = tuple(name for name in RADIAL if ROWS[name].distance is Distance.ROOT)
NATIVE = tuple(name for name, row in ROWS.items() if row.native)  # the others are the reference's everywhere
# On tensor cores: the error allowed, of the largest element.
PRECISIONS = {name: {"tf32": 4e-3, "bf16x3": 2e-4}.get(name, 1e-5) for name in catalogue.PRECISION_NAMES}


@dataclass(frozen=True)
class Regime:
    """What decides how many digits are left. ``h`` is in units of the typical squared distance, 2 d."""

    name: str
    h: float = 0.3
    offset: float = 0.0  # from the origin
    apart: float = 0.0  # two clusters of width 1 so far from each other
    coincident: float = 0.0  # the share of particles that are one point

    def __str__(self) -> str:
        return self.name


ORDINARY = Regime("ordinary")
APART = Regime("apart", h=0.1, apart=1e5)
NO_BANDWIDTH = Regime("no_bandwidth", h=0.0, coincident=0.6)
UNDERFLOWING = Regime("underflowing", h=1e-20, coincident=0.6)  # h^2 is 0 in float32
REGIMES = (
    ORDINARY,
    Regime("wide", h=1e6),
    Regime("narrow", h=1e-3),
    Regime("sharp", h=1e-6),
    NO_BANDWIDTH,
    Regime("nearly_none", h=1e-8, coincident=0.6),
    UNDERFLOWING,
    Regime("coincident", coincident=1.0),
    Regime("far", offset=1e4),
    APART,
)


class Size(NamedTuple):
    """B problems of n particles with d coordinates."""

    batch: int
    n: int
    d: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


# One particle; tiles of 64 give or take one; each padding of d in Triton's tiles; strips, the last with sums in parts.
FEW_COORDINATES = [Size(1, 1, 1), Size(3, 2, 2), Size(2, 37, 1), Size(1, 65, 3), Size(1, 33, 8)]
TILED = [Size(1, 1, 20), Size(2, 17, 12), Size(1, 63, 37), Size(1, 20, 100)]
STRIPS = [Size(1, 18, 130), Size(1, 5, 600)]
INTERPRETED = FEW_COORDINATES + TILED + STRIPS
# Where the ways of C++ part: rows in lanes up to 64 x 48; tiles by differences to d = 8, then by inner products.
SIZES = INTERPRETED + [
    Size(*size) for size in ((9, 16, 6), (1, 63, 16), (1, 64, 48), (1, 64, 49), (2, 65, 37), (1, 7, 1000))
]
# Of several blocks, an odd and an even number of groups; the n x n weights of 2048 coordinates and more, in one segment
# and in two.
HEAVY = [
    Size(*size)
    for size in (
        (1, 200, 3), (3, 130, 20), (1, 131, 37), (1, 200, 130), (1, 1000, 2), (1, 450, 64), (1, 40, 2048),
        (1, 70, 2100),
    )
]  # fmt: skip
# Too many pairs for whole matrices in float64: their judges take some rows.
LARGE = [
    Size(*size)
    for size in (
        (1, 2500, 9), (1, 2624, 128), (1, 8300, 5), (1, 20_000, 2), (1, 20_000, 16), (1, 3_000, 784), (1, 100, 20_011),
    )
]  # fmt: skip
# Edges of tiles of 128 rows, and sums in parts, which only a GPU has: on a CPU they show no more than the others.
ON_A_DEVICE = [
    Size(*size)
    for size in (
        (2, 129, 2), (1, 5000, 3), (256, 16, 6), (1, 127, 9), (2, 128, 16), (1, 1000, 17), (1, 2049, 64), (1, 300, 65),
        (1, 1025, 128), (2, 65, 129), (1, 700, 784), (1, 50, 20_011),
    )
]  # fmt: skip
EMPTY_SIZES = [Size(0, 4, 3), Size(2, 0, 3), Size(2, 4, 0)]
BATCHES = [Size(5, 65, 37), Size(3, 300, 3), Size(7, 9, 5), Size(2, 9, 2), Size(2, 17, 12), Size(2, 9, 130)]
WEIGHTS = (1, 3, 70)  # columns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One size for each way.
DTYPE_SIZES = [
    Size(2, 37, 3),
    Size(1, 20, 20),
    Size(1, 18, 130),
    Size(1, 130, 5),
    Size(1, 70, 64),
    Size(1, 20, 2100),
]
GRADIENT_SIZES = [Size(1, 19, 3), Size(1, 20, 20), Size(1, 18, 70)]
DISCREPANCY_SIZES = [Size(1, 2, 1), Size(1, 37, 3), Size(1, 33, 8), Size(1, 20, 37)]


class Row(NamedTuple):
    size: Size
    regime: Regime
    kernel: str

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def case(self) -> Case:
        return Case.of(self.size, self.regime)


def _diagonal(sizes: list[Size], regimes: tuple[Regime, ...], kernels: tuple[str, ...]) -> list[Row]:
    """Each kernel with each size and, where there are as many, with each regime."""
    return [
        Row(size, regimes[(i + len(sizes) * j) % len(regimes)], kernel)
        for j, kernel in enumerate(kernels)
        for i, size in enumerate(sizes)
    ]


def _rows(
    interpreted: list[Row],
    more: list[Size],
    heavy: list[Size],
    kernels: tuple[str, ...],
    regimes: tuple[Regime, ...],
) -> list[Row]:
    """Those for an interpreter, and further ones, so that every pair of a size, a regime and a kernel meets.

    Whole matrices of the heavy sizes take long in float64: they meet each kernel, once in two where sums cancel.
    """
    sizes = list(dict.fromkeys(row.size for row in interpreted)) + more
    rows = [Row(*row) for row in pairwise(*interpreted, size=sizes, regime=regimes, kernel=kernels)]
    for i, size in enumerate(heavy):
        rows += [Row(size, (ORDINARY, APART)[(i + j) % 2], kernel) for j, kernel in enumerate(kernels)]
    return rows


# Triton has tiles for kernels of the squared distance; those of the root take strips, an interpreter's slowest way.
INTERPRETED_DIRECTION = [
    *_diagonal(INTERPRETED, REGIMES, tuple(name for name in NATIVE if name not in ROOTS)),
    *_diagonal(2 * FEW_COORDINATES, REGIMES, ROOTS),
    *_diagonal(TILED[1:3], (NO_BANDWIDTH, APART), ROOTS),
]
DIRECTION_ROWS = _rows(INTERPRETED_DIRECTION, SIZES[len(INTERPRETED) :], HEAVY, NATIVE, REGIMES)

# The derivative by a bandwidth whose square is 0 in float32 is not defined.
GRADIENT_REGIMES = tuple(regime for regime in REGIMES if regime != UNDERFLOWING)
INTERPRETED_GRADIENT = _diagonal(GRADIENT_SIZES, GRADIENT_REGIMES, NATIVE)
GRADIENT_ROWS = _rows(
    INTERPRETED_GRADIENT,
    [Size(1, 1, 1), Size(9, 16, 6), Size(1, 64, 49), Size(1, 7, 1000)],
    [Size(1, 130, 2), Size(3, 130, 20), Size(1, 100, 37), Size(1, 40, 2048)],
    NATIVE,
    GRADIENT_REGIMES,
)

NATIVE_FINITE = tuple(name for name in NATIVE if name in FINITE)
# As h falls the term of a coincident pair grows like 2 d / h.
DISCREPANCY_REGIMES = tuple(regime for regime in REGIMES if regime.h >= 1e-8)
INTERPRETED_DISCREPANCY = _diagonal(DISCREPANCY_SIZES, DISCREPANCY_REGIMES, NATIVE_FINITE)
DISCREPANCY_ROWS = _rows(
    INTERPRETED_DISCREPANCY,
    [Size(9, 16, 6), Size(1, 64, 16), Size(1, 7, 100)],
    [Size(1, 130, 2), Size(3, 65, 37), Size(1, 100, 37)],
    NATIVE_FINITE,
    DISCREPANCY_REGIMES,
)


class DtypeRow(NamedTuple):
    size: Size
    particles: torch.dtype
    scores: torch.dtype
    kernel: str

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace("torch.", "")


DTYPE_ROWS = [
    DtypeRow(*row) for row in pairwise(size=DTYPE_SIZES, particles=DTYPES, scores=DTYPES, kernel=NATIVE)
]


@dataclass(frozen=True)
class Case:
    """Random particles and scores. ``h`` is in units of the typical squared distance, 2 d."""

    n: int
    d: int
    batch: tuple[int, ...] = ()
    h: float = 0.3
    offset: float = 0.0
    layout: str = "contiguous"
    coincident: int = 0  # the first so many are one point
    apart: float = 0.0

    @classmethod
    def of(cls, size: Size, regime: Regime = ORDINARY) -> Case:
        batch, n, d = size
        together = round(regime.coincident * n)
        return cls(n, d, (batch,), regime.h, regime.offset, "contiguous", together, regime.apart)

    def __str__(self) -> str:
        parts = ["x".join(map(str, (*self.batch, self.n, self.d)))]
        parts += [f"h{self.h:g}"] if self.h != 0.3 else []
        parts += [f"at{self.offset:g}"] if self.offset else []
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [f"coincident{self.coincident}"] if self.coincident else []
        parts += [f"apart{self.apart:g}"] if self.apart else []
        return "-".join(parts)

    def make(self, dtype: torch.dtype = torch.float32) -> Problem:
        shape = (*self.batch, self.n, self.d)
        x, s = (torch.randn(shape) for _ in range(2))
        if self.apart:
            # Particles take turns, so that no tile holds one cluster alone; near pairs matter.
            s = -x
            way = torch.nn.functional.normalize(torch.randn(self.d), dim=0)
            x = x + (torch.arange(self.n) % 2 - 0.5)[:, None] * way * self.apart
        if self.coincident:
            x[..., : self.coincident, :] = x[..., :1, :]
        x = (x + self.offset).to(dtype)
        # Bandwidths of a batch differ.
        h = 2 * self.d * self.h * (0.5 + torch.rand(self.batch))
        return Problem(lay_out(x, self.layout), lay_out(s.to(dtype), self.layout), h)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same elements in another memory layout."""
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack((values, torch.full_like(values, torch.nan)), dim=-1).flatten(-2)[..., ::2]
    if layout == "reversed_batch":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


LAYOUTS = [
    Case(65, 37, layout="transposed"),
    Case(65, 5, (2, 3), layout="sliced"),
    Case(65, 5, (2, 3), layout="reversed_batch"),
    Case(33, 5, (2, 3)),
    Case(17, 3),
]
EMPTY = [Case(0, 3), Case(4, 0), Case(0, 0), Case(5, 2, (0,)), Case(5, 2, (3, 0)), Case(0, 2, (2,))]


@dataclass(frozen=True)
class Problem:
    """Particles and scores [..., n, d] and bandwidths of the leading dimensions."""

    x: Tensor
    s: Tensor
    h: Tensor

    def map(self, change) -> Problem:  # type: ignore[no-untyped-def]
        return Problem(change(self.x), change(self.s), change(self.h))

    def double(self) -> Problem:
        return self.map(lambda t: t.detach().double())

    def leaves(self) -> list[Tensor]:
        return [self.x, self.s, self.h]

    def requiring(self) -> Problem:
        return self.map(lambda t: t.detach().requires_grad_())

    def to(self, device: str) -> Problem:
        return self.map(lambda t: t.to(device))

    def with_h(self, h: float) -> Problem:
        return replace(self, h=torch.full_like(self.h, h))

    def direction(self, name: str, **keywords) -> Tensor:  # type: ignore[no-untyped-def]
        keywords = {"bandwidth": self.h, "temperature": TEMPERATURE, **keywords}
        return stein.svgd_direction(self.x, self.s, kernel=KERNELS[name], **keywords)

    def discrepancy(self, name: str, **keywords) -> Tensor:  # type: ignore[no-untyped-def]
        return stein.kernel_stein_discrepancy(
            self.x, self.s, kernel=KERNELS[name], **{"bandwidth": self.h, **keywords}
        )


def constants(name: str) -> tuple[int, float, float]:
    """(kernel, beta, c), as operators take them."""
    return CODES[name], BETA, C
