"""Energies e = -log p(x | params) of one element and their gradients, constants kept.

Names as in the formulas: r location, s log-variance (log-scale of ``laplace``), nu degrees of freedom, a log rate,
mu mean, th inverse dispersion, pi gate logit. All take and give float64. At an infinite parameter they give the limit;
outside a likelihood's domain NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import LIKELIHOODS
from fekernels.reference.free_energy.special_functions import (
    LARGE,
    beside,
    excess,
    growth,
    langevin,
    log_sinhc,
    log_student_constant,
    magnitude,
    scaled_log1p,
    scaled_log1p_slope,
    softplus,
    stirling,
    stirling_slope,
    student_constant_slope,
)

__all__ = ["ENERGIES", "GRADIENTS"]

LOG_2PI = math.log(2 * math.pi)


def mse(x: Tensor, r: Tensor) -> Tensor:
    return (r - x) ** 2


def mse_gradient(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    return (2 * (r - x),)


def gaussian(x: Tensor, r: Tensor, s: Tensor | None = None) -> Tensor:
    if s is None:
        return ((r - x) ** 2 + LOG_2PI) / 2
    z = (r - x) * growth(s / 2)  # exp(-s) alone would overflow early and meet a zero
    return (beside(s, z) + z * z + LOG_2PI) / 2


def gaussian_gradient(x: Tensor, r: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...]:
    if s is None:
        return (r - x,)
    root = growth(s / 2)
    z = (r - x) * root
    return z * root, (1 - z * z) / 2


def bernoulli(x: Tensor, logit: Tensor) -> Tensor:
    """max(l, 0) - x l + log1p(exp(-|l|))."""
    linear = torch.where(logit >= 0, logit * (1 - x), -logit * x)
    return linear + torch.log1p(torch.exp(-magnitude(logit)))


def bernoulli_gradient(x: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
    return (torch.where(logit >= 0, (1 - x) - torch.sigmoid(-logit), torch.sigmoid(logit) - x),)


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


def laplace(x: Tensor, r: Tensor, s: Tensor) -> Tensor:
    distance = (x - r).abs() * growth(s)
    return distance + beside(s, distance) + math.log(2)


def laplace_gradient(x: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    rate, difference = growth(s), r - x
    sign = torch.where(difference.isnan(), difference, difference.sign())  # that of NaN is 0
    return sign * rate, 1 - (x - r).abs() * rate


def or_nan(inside: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The values, NaN where they are not inside: as a factor, which a derivative keeps."""
    factor = torch.where(inside, 1.0, math.nan).double()
    return tuple(value * factor for value in values)


def student(x: Tensor, r: Tensor, s: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
    """nu within float64, u = (r - x)^2 e^-s, whether u / nu is huge, and log(u / nu) + s where it is."""
    (nu,) = or_nan(~(nu < 0), nu)
    nu = nu.clamp(1e-300, 1e300)  # limits are reached there, to the last digit
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


def is_count(x: Tensor) -> Tensor:
    """Fractions are as good as whole numbers."""
    return (x >= 0) & (x < math.inf)


def poisson(x: Tensor, a: Tensor) -> Tensor:
    (a,) = or_nan(is_count(x), a)
    linear = torch.where(x == 0, 0.0, x * a.clamp(max=1e3))  # where exp(a) is infinite, x a is not
    return torch.exp(a) - linear + torch.lgamma(x + 1)


def poisson_gradient(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    (a,) = or_nan(is_count(x), a)
    return (torch.exp(a) - x,)


def counted(x: Tensor, mu: Tensor, th: Tensor) -> tuple[Tensor, Tensor]:
    """mu and th, NaN outside the domain; th finite, where the limit is reached."""
    mu, th = or_nan(is_count(x) & (mu >= 0) & (th >= 0), mu, th)
    return mu, th.clamp(max=1e300)


def negative_binomial(x: Tensor, mu: Tensor, th: Tensor) -> Tensor:
    """th log1p(mu/th), and for x > 0 also lgamma(x+1) + x log1p(th/mu) - [lgamma(x+th) - lgamma(th)].

    For large th both of the last two hold x log(th), which is left out:
    lgamma(x+th) - lgamma(th) - x log(th) = (x - 1/2) log1p(x/th) - th (x/th - log1p(x/th)) + the rest of Stirling's.
    """
    mu, th = counted(x, mu, th)
    zero, large = x == 0, th >= LARGE
    y, m = torch.where(zero, 1.0, x), torch.where(zero, 1.0, mu)

    t = torch.where(large, 1.0, th)
    small_th = torch.lgamma(t) - torch.lgamma(y + t) + y * torch.log1p(t / m)

    t = torch.where(large, th, LARGE)
    rising = (y - 0.5) * torch.log1p(y / t) - t * excess(y / t) + (stirling(t + y) - stirling(t))
    less, more = torch.where(m < t, m, t), torch.where(m < t, t, m)
    large_th = y * (torch.log1p(less / more) - torch.log(less)) - rising  # log(1/mu + 1/th), of the smaller

    counts = torch.lgamma(y + 1) + torch.where(large, large_th, small_th)
    counts = torch.where((m == 0) | (th == 0), math.inf, counts)
    return at_zero(mu, th) + torch.where(zero, 0.0, counts)


def at_zero(mu: Tensor, th: Tensor) -> Tensor:
    """th log1p(mu/th), 0 at th = 0."""
    return torch.where(th == 0, 0 * mu, scaled_log1p(torch.where(th == 0, 1.0, th), mu))


def at_zero_gradient(mu: Tensor, th: Tensor) -> tuple[Tensor, Tensor]:
    share, infinite = th / (th + mu), (mu == math.inf) & (th >= 0)
    slope = scaled_log1p_slope(th, torch.where(infinite, 1.0, mu))
    slope = torch.where(infinite | ((th == 0) & (mu > 0)), math.inf, slope)
    return share, slope


def negative_binomial_gradient(x: Tensor, mu: Tensor, th: Tensor) -> tuple[Tensor, ...]:
    mu, th = counted(x, mu, th)
    zero, large = x == 0, th >= LARGE
    share, slope_at_zero = at_zero_gradient(mu, th)
    m = torch.where(zero, 1.0, mu)

    t = torch.where(large, 1.0, th)
    small_th = torch.digamma(t) - torch.digamma(x + t) + x / (t + mu)

    t = torch.where(large, th, LARGE)
    w = torch.where(zero, 0.0, x) / t
    slope = x / (2 * t * (t + x)) - excess(w) + (stirling_slope(t + x) - stirling_slope(t))
    large_th = -slope - w * mu / (t + mu)

    counts = torch.where(zero, 0.0, torch.where(large, large_th, small_th))
    infinite = (mu == math.inf) & (th >= 0)
    of_mu = share * torch.where(zero, 1.0, (mu - x) / m)
    of_th = torch.where((th == 0) & ~zero, -math.inf, slope_at_zero + counts)
    return torch.where(infinite, 0.0, of_mu), torch.where(infinite, math.inf, of_th)


def zero_inflated_negative_binomial(x: Tensor, mu: Tensor, th: Tensor, pi: Tensor) -> Tensor:
    """x = 0: softplus(-pi) - softplus(q - pi), q = -th log1p(mu/th); x > 0: softplus(pi) + NB."""
    zero = x == 0
    mu, th = counted(x, mu, th)
    q = -at_zero(mu, th)
    near = (
        q > -1
    )  # there the difference of softplus is -log1p(sigmoid(-pi) (e^q - 1)), which keeps small digits
    close = -torch.log1p(torch.sigmoid(-pi) * torch.expm1(torch.where(near, q, 0.0)))
    far = torch.where(pi == -math.inf, -q, softplus(-pi) - softplus(q - pi))
    at = torch.where(near, close, far)
    counts = softplus(pi) + negative_binomial(torch.where(zero, 1.0, x), torch.where(zero, 1.0, mu), th)
    return torch.where(zero, at, counts)


def zero_inflated_negative_binomial_gradient(
    x: Tensor, mu: Tensor, th: Tensor, pi: Tensor
) -> tuple[Tensor, ...]:
    zero = x == 0
    nb_mu, nb_th = negative_binomial_gradient(x, mu, th)
    mu, th = counted(x, mu, th)
    q = -at_zero(mu, th)
    w = torch.sigmoid(q - pi)
    gate = (
        torch.sigmoid(-pi) * torch.sigmoid(pi - q) * torch.expm1(q)
    )  # w - sigmoid(-pi), without the difference
    share, slope = at_zero_gradient(mu, th)
    return (
        torch.where(zero, w * share, nb_mu),
        torch.where(zero, torch.where(w == 0, w, w * slope), nb_th),
        torch.where(zero, gate, torch.where(mu.isnan(), mu, torch.sigmoid(pi))),
    )


# By their names, in the order of the codes.
ENERGIES: tuple[Callable[..., Tensor], ...] = tuple(globals()[row.name] for row in LIKELIHOODS)
GRADIENTS: tuple[Callable[..., tuple[Tensor, ...]], ...] = tuple(
    globals()[f"{row.name}_gradient"] for row in LIKELIHOODS
)
