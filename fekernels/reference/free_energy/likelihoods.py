"""Energies e = -log p(x | params) of one element and their gradients, constants kept; means of x, and draws of it.

Names as in the formulas: r location, s log-variance (log-scale of ``laplace``), nu degrees of freedom, a log rate,
mu mean, k shape, th inverse dispersion, pi gate logit. Energies and gradients take and give float64: the limit at an
infinite parameter, NaN outside a likelihood's domain. ``name_mean`` and ``name_sample`` keep the parameters' dtype, and
whoever calls them looks at the domain. The likelihoods of counts are in ``count_likelihoods.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import LIKELIHOODS, NAMES
from fekernels.reference.free_energy import count_likelihoods
from fekernels.reference.free_energy.draws import exponential_draw, gamma_draw, normal_draw, uniform_draw
from fekernels.reference.free_energy.special_functions import (
    LARGE,
    beside,
    excess,
    first_parameter,
    growth,
    langevin,
    log_sinhc,
    log_student_constant,
    magnitude,
    or_nan,
    scaled_log1p,
    scaled_log1p_slope,
    stirling,
    stirling_slope,
    student_constant_slope,
)

__all__ = ["ENERGIES", "GRADIENTS", "MEANS", "SAMPLES"]

LOG_2PI = math.log(2 * math.pi)


def mse(x: Tensor, r: Tensor) -> Tensor:
    return (r - x) ** 2


def mse_gradient(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    return (2 * (r - x),)


mse_mean = first_parameter


def mse_sample(generator: torch.Generator | None, r: Tensor) -> Tensor:
    """As of a Gaussian of variance 1/2."""
    return r + math.sqrt(0.5) * normal_draw(r, generator)


def gaussian(x: Tensor, r: Tensor, s: Tensor | None = None) -> Tensor:
    if s is None:
        return ((r - x) ** 2 + LOG_2PI) / 2
    z = (r - x) * growth(s / 2)  # exp(-s) alone would overflow early, times a zero
    return (beside(s, z) + z * z + LOG_2PI) / 2


def gaussian_gradient(x: Tensor, r: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...]:
    if s is None:
        return (r - x,)
    root = growth(s / 2)
    z = (r - x) * root
    return z * root, (1 - z * z) / 2


gaussian_mean = first_parameter


def gaussian_sample(generator: torch.Generator | None, r: Tensor, s: Tensor | None = None) -> Tensor:
    noise = normal_draw(r, generator)
    return r + (noise if s is None else torch.exp(s / 2) * noise)


def bernoulli(x: Tensor, logit: Tensor) -> Tensor:
    """max(l, 0) - x l + log1p(exp(-|l|))."""
    linear = torch.where(logit >= 0, logit * (1 - x), -logit * x)
    return linear + torch.log1p(torch.exp(-magnitude(logit)))


def bernoulli_gradient(x: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
    return (torch.where(logit >= 0, (1 - x) - torch.sigmoid(-logit), torch.sigmoid(logit) - x),)


def bernoulli_mean(logit: Tensor) -> Tensor:
    return torch.sigmoid(logit)


def bernoulli_sample(generator: torch.Generator | None, logit: Tensor) -> Tensor:
    return (uniform_draw(logit, generator) < torch.sigmoid(logit)).to(logit.dtype)


def continuous_bernoulli(x: Tensor, logit: Tensor) -> Tensor:
    size = magnitude(logit)
    near, infinite = size < 2, logit.isinf()
    close = torch.where(near, logit, 0.0)
    far = torch.where(near | infinite, 2.0, size)
    linear = torch.where(logit > 0, logit * (1 - x), -logit * x)
    rest = torch.log1p(-torch.exp(-far)) - torch.log(far)
    return torch.where(
        near, close * (0.5 - x) + log_sinhc(close / 2), torch.where(infinite, linear, linear + rest)
    )


def continuous_bernoulli_gradient(x: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
    return (langevin(logit / 2) / 2 + (0.5 - x),)


def continuous_bernoulli_mean(logit: Tensor) -> Tensor:
    """1/2 + L(l / 2) / 2 with Langevin's L(y) = coth y - 1/y."""
    return 0.5 + langevin(logit / 2) / 2


def continuous_bernoulli_sample(generator: torch.Generator | None, logit: Tensor) -> Tensor:
    """By the inverse of its distribution function at -|l|, where nothing overflows; mirrored for l > 0."""
    a = logit.abs()
    u = uniform_draw(logit, generator)
    flat = a < 1e-30
    a = torch.where(flat, 1.0, a)
    x = torch.where(flat, u, -torch.log1p(u * torch.expm1(-a)) / a)
    return torch.where(logit > 0, 1 - x, x)


def existing(x: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """[..., 1] indices that exist, and a factor: 1, or NaN where there is no such class."""
    index = x.unsqueeze(-1)
    exists = (index >= 0) & (index < classes)
    return torch.where(exists, index, 0), torch.where(exists, 1.0, torch.nan).double()


def categorical(x: Tensor, logits: Tensor) -> Tensor:
    """logits [..., K], x [...] the class."""
    index, factor = existing(x, logits.shape[-1])
    return -(torch.log_softmax(logits, -1).gather(-1, index) * factor).squeeze(-1)


def categorical_gradient(x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    index, factor = existing(x, logits.shape[-1])
    onehot_less = torch.softmax(logits, -1).scatter_add(-1, index, -torch.ones_like(factor))
    return (onehot_less * factor,)


def categorical_mean(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1)


def categorical_sample(generator: torch.Generator | None, logits: Tensor) -> Tensor:
    return (logits - exponential_draw(logits, generator).log()).argmax(-1)  # Gumbel's maximum


def laplace(x: Tensor, r: Tensor, s: Tensor) -> Tensor:
    distance = (x - r).abs() * growth(s)
    return distance + beside(s, distance) + math.log(2)


def laplace_gradient(x: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    rate, difference = growth(s), r - x
    sign = torch.where(difference.isnan(), difference, difference.sign())  # that of NaN is 0
    return sign * rate, 1 - (x - r).abs() * rate


laplace_mean = first_parameter


def laplace_sample(generator: torch.Generator | None, r: Tensor, s: Tensor) -> Tensor:
    return r + torch.exp(s) * (exponential_draw(r, generator) - exponential_draw(r, generator))


def student(x: Tensor, r: Tensor, s: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
    """nu within float64, u = (r - x)^2 e^-s, whether u / nu is huge, and log(u / nu) + s where it is."""
    (nu,) = or_nan(~(nu < 0), nu)
    nu = nu.clamp(1e-300, 1e300)  # limits are reached at the ends, to the last digit
    z = (r - x) * growth(s / 2)
    u = z * z
    huge = u / nu > 1e50
    distance = torch.where(huge, (r - x).abs(), 1.0)
    return nu, u, huge, 2 * torch.log(distance) - torch.log(torch.where(huge, nu, 1.0))


def student_t(x: Tensor, r: Tensor, s: Tensor, nu: Tensor) -> Tensor:
    degrees, u, huge, logarithm = student(x, r, s, nu)
    far = (degrees + 1) * logarithm - degrees * s
    u = torch.where(huge, 0.0, u)
    near = scaled_log1p(degrees, u) + torch.log1p(u / degrees) + s
    e = torch.where(huge, far, near) / 2 + log_student_constant(degrees)
    return torch.where((nu == 0) & ~e.isnan(), math.inf, e)


def student_t_gradient(x: Tensor, r: Tensor, s: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
    nu, u, huge, logarithm = student(x, r, s, nu)
    root = growth(s / 2)
    z = (r - x) * root
    tail = torch.where(huge, logarithm - s - 1, scaled_log1p_slope(nu, torch.where(huge, 0.0, u)))
    share = torch.where(huge, 1.0, u / (nu + u))
    return (
        torch.where(huge, (nu + 1) / (r - x), (nu + 1) / (nu + u) * z * root),
        torch.where(huge, -nu / 2, nu / (nu + u) * (1 - u) / 2),
        (tail - share / nu) / 2 + student_constant_slope(nu),
    )


def student_t_mean(r: Tensor, _: Tensor, nu: Tensor) -> Tensor:
    return torch.where(nu > 1, r, math.nan)


def student_t_sample(generator: torch.Generator | None, r: Tensor, s: Tensor, nu: Tensor) -> Tensor:
    return r + torch.exp(s / 2) * normal_draw(r, generator) * torch.rsqrt(
        gamma_draw(nu / 2, generator) * 2 / nu
    )


def gamma_deviance(x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v = (x - mu) / mu, log(mu / x), and v - log1p(v); the logarithm where x < mu / 2 alone, elsewhere 0."""
    v = (x - mu) / mu
    far = v < -0.5
    minus_log = torch.log(torch.where(far, mu, 1.0)) - torch.log(torch.where(far, x, 1.0))
    near = excess(torch.where(far | (v == math.inf), 0.0, v))
    return v, minus_log, torch.where(far, v + minus_log, torch.where(v == math.inf, math.inf, near))


def gamma(x: Tensor, mu: Tensor, k: Tensor) -> Tensor:
    """k (v - log1p(v)) + log x + [lgamma(k) - k log k + k], v = (x - mu) / mu, whose terms do not cancel for large k.

    Where x is far below mu: k v + (k - 1) log(mu / x) + log mu and that bracket.
    """
    mu, k = or_nan((x >= 0) & (x < math.inf) & (mu >= 0) & (k >= 0), mu.abs(), k.abs())
    v, minus_log, deviance = gamma_deviance(x, mu)
    far = v < -0.5
    log_level = torch.log(torch.where(far, mu, x))
    pull = (k - 1) * torch.where((k == 1) & (x == 0), 0.0, minus_log)
    e = torch.where(far, k * v + pull, k * deviance) + log_level + log_gamma_excess(k)
    e = torch.where(k == math.inf, torch.where(v == 0, -math.inf, v.abs() * k), e)
    unlikely = (mu == math.inf) | (k == 0) | ((mu == 0) & (x > 0))
    return torch.where(unlikely & ~(mu.isnan() | k.isnan()), math.inf, e)


def gamma_gradient(x: Tensor, mu: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    mu, k = or_nan((x >= 0) & (x < math.inf) & (mu >= 0) & (k >= 0), mu.abs(), k.abs())
    v, _, deviance = gamma_deviance(x, mu)
    boundless = (mu == math.inf) & ~k.isnan()
    of_mu = torch.where(v == 0, v, -k * v) / mu
    return (
        torch.where(boundless, 0.0, of_mu),
        torch.where(boundless, math.inf, deviance + log_gamma_excess_slope(k)),
    )


gamma_mean = first_parameter


def gamma_sample(generator: torch.Generator | None, mu: Tensor, k: Tensor) -> Tensor:
    return mu * (gamma_draw(k, generator) / k)


def log_gamma_excess(k: Tensor) -> Tensor:
    """lgamma(k) - k log k + k, which tends to (log(2 pi) - log k) / 2 for large k."""
    large = k >= LARGE
    t, s = torch.where(large, k, LARGE), torch.where(large, 1.0, k)
    series = (LOG_2PI - torch.log(t)) / 2 + stirling(t)
    return torch.where(large, series, torch.lgamma(s) - torch.xlogy(s, s) + s)


def log_gamma_excess_slope(k: Tensor) -> Tensor:
    """Its derivative, digamma(k) - log k."""
    large = k >= LARGE
    t, s = torch.where(large, k, LARGE), torch.where(large | (k == 0), 1.0, k)
    near = torch.where(k == 0, -math.inf, torch.digamma(s) - torch.log(s))
    return torch.where(large, stirling_slope(t) - 0.5 / t, near)


def by_name(suffix: str, names: Iterable[str]) -> tuple[Callable[..., Any], ...]:
    """The functions of these names with this suffix, here or among the counts."""
    formulas = vars(count_likelihoods) | globals()
    return tuple(formulas[name + suffix] for name in names)


# By their names: of a code, as its position; of a likelihood's name.
ENERGIES: tuple[Callable[..., Tensor], ...] = by_name("", (row.name for row in LIKELIHOODS))
GRADIENTS: tuple[Callable[..., tuple[Tensor, ...]], ...] = by_name(
    "_gradient", (row.name for row in LIKELIHOODS)
)
MEANS: dict[str, Callable[..., Tensor]] = dict(zip(NAMES, by_name("_mean", NAMES), strict=True))
SAMPLES: dict[str, Callable[..., Tensor]] = dict(zip(NAMES, by_name("_sample", NAMES), strict=True))
