"""The kernels of the Stein functions, of u = \\|x - y\\|^2 / h with h the bandwidth; names do as well ("rbf")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fekernels._checks import number

__all__ = ["IMQ", "RBF", "Laplace", "Linear"]


@dataclass(frozen=True)
class RBF:
    """exp(-u), the Gaussian kernel of Liu & Wang 2016."""

    name: ClassVar[str] = "rbf"


@dataclass(frozen=True)
class IMQ:
    """(c^2 + u)^beta, the inverse multiquadric.

    Its discrepancy controls convergence, which that of kernels with light tails does not (Gorham & Mackey 2017,
    arXiv:1703.01717, theorem 8; there with h = 1).

    Args:
        beta: in (-1, 0); -0.5 is the usual one.
        c: > 0.
    """

    beta: float = -0.5
    c: float = 1.0
    name: ClassVar[str] = "imq"

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", number("IMQ", "beta", self.beta, least=-1.0, above=-1.0, below=0.0))
        object.__setattr__(self, "c", number("IMQ", "c", self.c, above=0.0))


@dataclass(frozen=True)
class Laplace:
    """exp(-sqrt(u)), with a kink at u = 0: coincident particles do not repel, and the discrepancy is infinite."""

    name: ClassVar[str] = "laplace"


@dataclass(frozen=True)
class Linear:
    """x.y + 1, which matches mean and covariance exactly (Liu & Wang 2018, arXiv:1810.11693); it has no bandwidth."""

    name: ClassVar[str] = "linear"
