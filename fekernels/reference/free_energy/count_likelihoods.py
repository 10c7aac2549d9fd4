"""The likelihoods of counts, as ``likelihoods.py`` describes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fekernels.reference.free_energy.draws import gamma_draw, poisson_draw, uniform_draw
from fekernels.reference.free_energy.special_functions import (
    LARGE,
    excess,
    first_parameter,
    or_nan,
    scaled_log1p,
    scaled_log1p_slope,
    softplus,
    stirling,
    stirling_slope,
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


def poisson_mean(a: Tensor) -> Tensor:
    return torch.exp(a)


def poisson_sample(generator: torch.Generator | None, a: Tensor) -> Tensor:
    return poisson_draw(torch.exp(a), generator)


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


negative_binomial_mean = first_parameter


def negative_binomial_sample(generator: torch.Generator | None, mu: Tensor, th: Tensor) -> Tensor:
    return poisson_draw(gamma_draw(th, generator) * mu / th, generator)


def zero_inflated_negative_binomial(x: Tensor, mu: Tensor, th: Tensor, pi: Tensor) -> Tensor:
    """x = 0: softplus(-pi) - softplus(q - pi), q = -th log1p(mu/th); x > 0: softplus(pi) + NB."""
    zero = x == 0
    mu, th = counted(x, mu, th)
    q = -at_zero(mu, th)
    # For q near 0 the difference of softplus is -log1p(sigmoid(-pi) (e^q - 1)), which keeps small digits.
    near = q > -1
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
    # w - sigmoid(-pi), without the difference
    gate = torch.sigmoid(-pi) * torch.sigmoid(pi - q) * torch.expm1(q)
    share, slope = at_zero_gradient(mu, th)
    return (
        torch.where(zero, w * share, nb_mu),
        torch.where(zero, torch.where(w == 0, w, w * slope), nb_th),
        torch.where(zero, gate, torch.where(mu.isnan(), mu, torch.sigmoid(pi))),
    )


def zero_inflated_negative_binomial_mean(mu: Tensor, _: Tensor, pi: Tensor) -> Tensor:
    return mu * torch.sigmoid(-pi)


def zero_inflated_negative_binomial_sample(
    generator: torch.Generator | None, mu: Tensor, th: Tensor, pi: Tensor
) -> Tensor:
    dropped = uniform_draw(pi, generator) < torch.sigmoid(pi)
    return torch.where(dropped, 0.0, negative_binomial_sample(generator, mu, th))
