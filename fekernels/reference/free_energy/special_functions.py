"""Special functions of the free energy, right to the last digits of float64 where the literal formulas cancel.

All are plain PyTorch over float64 and differentiable as often as wanted: a branch that an element does not take is fed
a harmless value, so that no infinity of it reaches the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "beside",
    "excess",
    "expm1_excess",
    "first_parameter",
    "growth",
    "langevin",
    "log_sinhc",
    "log_student_constant",
    "or_nan",
    "scaled_log1p",
    "scaled_log1p_slope",
    "softplus",
    "stirling",
    "stirling_slope",
    "student_constant_slope",
]

LARGEST = torch.finfo(torch.float64).max
LARGE = 16.0  # from here on the asymptotic series of log-gamma end below 1e-17


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, lowest coefficient first."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def first_parameter(first: Tensor, *_: Tensor) -> Tensor:
    """The mean of whatever is parameterised by it."""
    return first


def magnitude(x: Tensor) -> Tensor:
    """|x| whose derivative at 0 is 1, so that even functions written with it keep theirs."""
    return torch.where(x >= 0, x, -x)


def growth(s: Tensor) -> Tensor:
    """e^-s, but finite, so that its product with 0 is 0: the limit for s -> -infinity."""
    return torch.exp(-s).clamp(max=LARGEST)


def beside(s: Tensor, u: Tensor) -> Tensor:
    """s beside a term u that grows like e^-s: at s = -infinity that has the last word, unless it is 0."""
    return torch.where((u != 0) & (s == -math.inf), 0.0, s)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return torch.where(x >= 0, x, 0.0) + torch.log1p(torch.exp(-magnitude(x)))


def or_nan(inside: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The values, NaN where they are not inside: as a factor, which a derivative keeps."""
    factor = torch.where(inside, 1.0, math.nan).double()
    return tuple(value * factor for value in values)


def expm1_excess(d: Tensor) -> Tensor:
    """e^d - 1 - d: d^2/2 near 0, where the difference would keep no digit."""
    small = d.abs() < 0.5
    s = torch.where(small, d, 0.0)
    series = s * s * polynomial(s, [1 / math.factorial(n) for n in range(2, 18)])
    return torch.where(small, series, torch.expm1(d) - d.clamp(max=1e3))  # infinity - infinity is NaN


def excess(w: Tensor) -> Tensor:
    """w - log(1 + w): w^2/2 near 0."""
    small = w.abs() < 0.1
    s = torch.where(small, w, 0.0)
    series = s * s * polynomial(s, [(-1) ** n / n for n in range(2, 19)])
    return torch.where(small, series, w - torch.log1p(w))


def scaled_log1p(nu: Tensor, u: Tensor) -> Tensor:
    """nu log(1 + u/nu), which tends to u for large nu."""
    w = u / nu
    small = w < 0.1
    return torch.where(small, u - nu * excess(torch.where(small, w, 0.0)), nu * torch.log1p(w))


def scaled_log1p_slope(nu: Tensor, u: Tensor) -> Tensor:
    """Its derivative in nu: log(1 + u/nu) - u/(nu + u)."""
    w, q = u / nu, u / (nu + u)  # 1 - q = 1/(1 + w)
    small = w < 0.1
    return torch.where(small, excess(torch.where(small, -q, 0.0)), torch.log1p(w) - q)


def log_sinhc(y: Tensor) -> Tensor:
    """log(sinh(y) / y)."""
    a = magnitude(y)
    small = a < 1
    s = torch.where(small, y * y, 0.0)
    series = torch.log1p(s * polynomial(s, [1 / math.factorial(2 * n + 1) for n in range(1, 12)]))
    b = torch.where(small, 1.0, a)
    return torch.where(small, series, b - torch.log(2 * b) + torch.log1p(-torch.exp(-2 * b)))


def langevin(y: Tensor) -> Tensor:
    """Its derivative, coth(y) - 1/y: near 0 by Gauss's continued fraction y/(3 + y^2/(5 + y^2/(7 + ...)))."""
    a = y.abs()
    small = a < 1
    s = torch.where(small, y, 0.0)
    fraction = torch.full_like(s, 23.0)
    for odd in range(21, 1, -2):
        fraction = odd + s * s / fraction
    b = torch.where(small, 1.0, a)
    decayed = torch.exp(-2 * b)  # not e^(2 b), whose infinity would be a NaN in the derivative
    return torch.where(small, s / fraction, torch.sign(y) * (1 - 2 * decayed / torch.expm1(-2 * b) - 1 / b))


# log-gamma(z) = (z - 1/2) log z - z + log(2 pi)/2 + sum_n c_n z^(1 - 2n): Stirling's series.
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)
# log-gamma(h + 1/2) - log-gamma(h) - log(h)/2, in the same powers of h.
HALF_STEP = (-1 / 8, 1 / 192, -1 / 640, 17 / 14336, -31 / 18432, 691 / 180224)


def stirling(z: Tensor) -> Tensor:
    """What Stirling's series adds to (z - 1/2) log z - z + log(2 pi)/2, for z >= LARGE."""
    r = 1 / z
    return r * polynomial(r * r, STIRLING)


def stirling_slope(z: Tensor) -> Tensor:
    """Its derivative."""
    r = 1 / z
    return -r * r * polynomial(r * r, [(2 * n + 1) * c for n, c in enumerate(STIRLING)])


def log_student_constant(nu: Tensor) -> Tensor:
    """log(nu pi)/2 + lgamma(nu/2) - lgamma((nu + 1)/2), which tends to log(2 pi)/2 for large nu."""
    h = nu / 2
    large = h >= LARGE
    r = 1 / torch.where(large, h, LARGE)
    series = math.log(2 * math.pi) / 2 - r * polynomial(r * r, HALF_STEP)
    s = torch.where(large, 1.0, h)
    return torch.where(
        large, series, torch.log(2 * math.pi * s) / 2 + torch.lgamma(s) - torch.lgamma(s + 0.5)
    )


def student_constant_slope(nu: Tensor) -> Tensor:
    """Its derivative: [1/nu + digamma(nu/2) - digamma((nu + 1)/2)] / 2."""
    h = nu / 2
    large = h >= LARGE
    r = 1 / torch.where(large, h, LARGE)
    series = r * r * polynomial(r * r, [(2 * n + 1) * c for n, c in enumerate(HALF_STEP)]) / 2
    s = torch.where(large, 1.0, h)
    return torch.where(large, series, (0.5 / s + torch.digamma(s) - torch.digamma(s + 0.5)) / 2)
