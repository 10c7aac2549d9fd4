"""The kernels and precisions of Stein's method, and what layers have to know of each; position = code everywhere.

A kernel's row is the class that users make one of (``fe.kernels``). Checks, reference, Triton, systems, benchmarks and
tests read these; the formulas are found by name. C++ has the same order at ``RadialKernels`` of
``csrc/formulas/radial_kernels.h``, and a test holds one against the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from fekernels._checks import number

# As fe.kernels; layers read KERNELS, NAMES and CODES.
__all__ = ["IMQ", "RBF", "Laplace", "Linear", "Matern32"]


class Distance(Enum):
    """What a radial kernel is a smooth function of."""

    SQUARED = "the squared distance, which inner products give as well"
    ROOT = "its root, of which inner products leave half the digits: always differences"


class SteinKernel:
    """A kernel as the catalogue has it.

    All have a direction and its gradients.

    Attributes:
        name: the users', and that of its formulas.
        distance: None where it is not radial.
        default_bandwidth: the rule where a caller names none; None where it has no bandwidth.
        discrepancy: whether that is finite.
        native: whether C++ and Triton have it; else the reference computes it on every backend.
        domains: of its parameters, which are the fields ``beta`` and ``c`` or none, as open intervals.
    """

    name: ClassVar[str]
    distance: ClassVar[Distance | None] = Distance.SQUARED
    default_bandwidth: ClassVar[str | None] = "median"
    discrepancy: ClassVar[bool] = True
    native: ClassVar[bool] = True
    domains: ClassVar[dict[str, tuple[float, float]]] = {}

    @staticmethod
    def at_zero(beta: float, c: float) -> tuple[float, float]:
        """Of a radial kernel phi(u) where u = 0: phi and -2 phi', 0 where there is no derivative."""
        return 1.0, 0.0

    def __post_init__(self) -> None:
        for name in self.domains:
            value = self._inside(type(self).__name__, name, getattr(self, name))
            object.__setattr__(self, name, value)  # frozen

    @classmethod
    def check(cls, function: str, beta: float, c: float) -> None:
        """Raise where a parameter is outside its domain; what this kernel does not have is not looked at."""
        values = {"beta": beta, "c": c}
        for name, (low, high) in cls.domains.items():
            if not low < values[name] < high:
                cls._inside(function, name, values[name])

    @classmethod
    def _inside(cls, owner: str, name: str, value: object) -> float:
        low, high = cls.domains[name]
        return number(owner, name, value, least=low, above=low, below=high)


@dataclass(frozen=True)
class RBF(SteinKernel):
    """exp(-u), the Gaussian kernel of Liu & Wang 2016."""

    name: ClassVar[str] = "rbf"

    @staticmethod
    def at_zero(beta: float, c: float) -> tuple[float, float]:
        return 1.0, 2.0


@dataclass(frozen=True)
class IMQ(SteinKernel):
    """(c^2 + u)^beta, the inverse multiquadric.

    Its discrepancy controls convergence, which that of kernels with light tails does not (Gorham & Mackey 2017,
    arXiv:1703.01717, theorem 8, with h = 1).

    Args:
        beta: in (-1, 0); -0.5 is the usual one.
        c: above 0.
    """

    beta: float = -0.5
    c: float = 1.0
    name: ClassVar[str] = "imq"
    domains: ClassVar[dict[str, tuple[float, float]]] = {"beta": (-1.0, 0.0), "c": (0.0, math.inf)}

    @staticmethod
    def at_zero(beta: float, c: float) -> tuple[float, float]:
        return c ** (2 * beta), -2 * beta * c ** (2 * beta - 2)


@dataclass(frozen=True)
class Laplace(SteinKernel):
    """exp(-sqrt(u)), with a kink at u = 0: coincident particles do not repel, and the discrepancy is infinite."""

    name: ClassVar[str] = "laplace"
    distance: ClassVar[Distance | None] = Distance.ROOT
    discrepancy: ClassVar[bool] = False


@dataclass(frozen=True)
class Matern32(SteinKernel):
    """(1 + sqrt(3u)) exp(-sqrt(3u)), the Matern kernel of smoothness 3/2 (Rasmussen & Williams 2006, equation 4.17).

    Between rbf and laplace: its tails are laplace's, without the kink, so that the discrepancy is finite.
    """

    name: ClassVar[str] = "matern32"
    distance: ClassVar[Distance | None] = Distance.ROOT

    @staticmethod
    def at_zero(beta: float, c: float) -> tuple[float, float]:
        return 1.0, 3.0


@dataclass(frozen=True)
class Linear(SteinKernel):
    """x.y + 1, which matches mean and covariance exactly (Liu & Wang 2018, arXiv:1810.11693); it has no bandwidth."""

    name: ClassVar[str] = "linear"
    distance: ClassVar[Distance | None] = None
    default_bandwidth: ClassVar[str | None] = None
    native: ClassVar[bool] = False


# Those that C++ and Triton have come first.
KERNELS: tuple[type[SteinKernel], ...] = (RBF, IMQ, Laplace, Matern32, Linear)
NAMES = tuple(row.name for row in KERNELS)
CODES = {name: code for code, name in enumerate(NAMES)}
LINEAR = CODES["linear"]  # the one that is not radial, with formulas of its own


@dataclass(frozen=True)
class Precision:
    """How tensor cores multiply a direction's matrices: for Triton alone, as all others compute in float32 regardless.

    Attributes:
        name: the users'.
        dot: its ``input_precision`` of ``tl.dot``.
        halves: how many float16 a float32 counts as in a tile.
    """

    name: str
    dot: str
    halves: int


PRECISIONS = (
    Precision("fp32", dot="tf32x3", halves=2),
    Precision("tf32", dot="tf32", halves=1),  # one product of mantissas of 11 bits
    # Three products of 8 bits; in tiles those of float16 halves, which cost the same and have more digits.
    Precision("bf16x3", dot="bf16x3", halves=2),
)
PRECISION_NAMES = tuple(row.name for row in PRECISIONS)
