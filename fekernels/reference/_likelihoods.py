"""Energies e = -log p(x | params) of one element and their gradients, constants kept.

Names as in the formulas: r location, s log-variance (log-scale of ``laplace``), nu degrees of freedom, a log rate,
mu mean, th inverse dispersion, pi gate logit. All take and give float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fekernels.reference._special import (
    LARGE,
    excess,
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

__all__ = ["ENERGIES", "GRADIENTS", "SAFE"]

LOG_2PI = math.log(2 * math.pi)


def mse(x: Tensor, r: Tensor) -> Tensor:
    return (r - x) ** 2


def mse_gradient(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    return (2 * (r - x),)


def gaussian(x: Tensor, r: Tensor, s: Tensor | None = None) -> Tensor:
    if s is None:
        return ((r - x) ** 2 + LOG_2PI) / 2
    z = (r - x) * torch.exp(-s / 2)  # exp(-s) alone would overflow early and meet a zero
    return (s + z * z + LOG_2PI) / 2


def gaussian_gradient(x: Tensor, r: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...]:
    if s is None:
        return (r - x,)
    root = torch.exp(-s / 2)
    z = (r - x) * root
    return z * root, (1 - z * z) / 2


def bernoulli(x: Tensor, logit: Tensor) -> Tensor:
    """max(l, 0) - x l + log1p(exp(-|l|))."""
    linear = torch.where(logit >= 0, logit * (1 - x), -logit * x)
    return linear + torch.log1p(torch.exp(-magnitude(logit)))


def bernoulli_gradient(x: Tensor, logit: Tensor) -> tuple[Tensor, ...]:
    return (torch.where(logit >= 0, (1 - x) - torch.sigmoid(-logit), torch.sigmoid(logit) - x),)


def continuous_bernoulli(x: Tensor, logit: Tensor) -> Tensor:
    return logit * (0.5 - x) + log_sinhc(logit / 2)


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
    return (x - r).abs() * torch.exp(-s) + s + math.log(2)


def laplace_gradient(x: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    return torch.sign(r - x) * torch.exp(-s), 1 - (x - r).abs() * torch.exp(-s)


def student_t(x: Tensor, r: Tensor, s: Tensor, nu: Tensor) -> Tensor:
    u = ((r - x) * torch.exp(-s / 2)) ** 2
    return (scaled_log1p(nu, u) + torch.log1p(u / nu) + s) / 2 + log_student_constant(nu)


def student_t_gradient(x: Tensor, r: Tensor, s: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
    root = torch.exp(-s / 2)
    z = (r - x) * root
    u = z * z
    return (
        (nu + 1) / (nu + u) * z * root,
        nu / (nu + u) * (1 - u) / 2,
        (scaled_log1p_slope(nu, u) - u / (nu + u) / nu) / 2 + student_constant_slope(nu),
    )


def poisson(x: Tensor, a: Tensor) -> Tensor:
    return torch.exp(a) - x * a + torch.lgamma(x + 1)


def poisson_gradient(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    return (torch.exp(a) - x,)


def negative_binomial(x: Tensor, mu: Tensor, th: Tensor) -> Tensor:
    """th log1p(mu/th), and for x > 0 also lgamma(x+1) + x log1p(th/mu) - [lgamma(x+th) - lgamma(th)].

    For large th both of the last two hold x log(th), which is left out:
    lgamma(x+th) - lgamma(th) - x log(th) = (x - 1/2) log1p(x/th) - th (x/th - log1p(x/th)) + the rest of Stirling's.
    """
    zero, large = x == 0, th >= LARGE
    y, m = torch.where(zero, 1.0, x), torch.where(zero, 1.0, mu)

    t = torch.where(large, 1.0, th)
    small_th = torch.lgamma(t) - torch.lgamma(y + t) + y * torch.log1p(t / m)

    t = torch.where(large, th, LARGE)
    rising = (y - 0.5) * torch.log1p(y / t) - t * excess(y / t) + (stirling(t + y) - stirling(t))
    less, more = torch.where(m < t, m, t), torch.where(m < t, t, m)
    large_th = y * (torch.log1p(less / more) - torch.log(less)) - rising  # log(1/mu + 1/th), of the smaller

    counts = torch.lgamma(y + 1) + torch.where(large, large_th, small_th)
    return scaled_log1p(th, mu) + torch.where(zero, 0.0, counts)


def negative_binomial_gradient(x: Tensor, mu: Tensor, th: Tensor) -> tuple[Tensor, ...]:
    zero, large = x == 0, th >= LARGE
    share = th / (th + mu)
    m = torch.where(zero, 1.0, mu)

    t = torch.where(large, 1.0, th)
    small_th = torch.digamma(t) - torch.digamma(x + t) + x / (t + mu)

    t = torch.where(large, th, LARGE)
    w = torch.where(zero, 0.0, x) / t
    slope = x / (2 * t * (t + x)) - excess(w) + (stirling_slope(t + x) - stirling_slope(t))
    large_th = -slope - w * mu / (t + mu)

    counts = torch.where(zero, 0.0, torch.where(large, large_th, small_th))
    return share * torch.where(zero, 1.0, (mu - x) / m), scaled_log1p_slope(th, mu) + counts


def zero_inflated_negative_binomial(x: Tensor, mu: Tensor, th: Tensor, pi: Tensor) -> Tensor:
    """x = 0: softplus(-pi) - softplus(q - pi), q = -th log1p(mu/th); x > 0: softplus(pi) + NB."""
    zero = x == 0
    q = -scaled_log1p(th, mu)
    near = (
        q > -1
    )  # there the difference of softplus is -log1p(sigmoid(-pi) (e^q - 1)), which keeps small digits
    close = -torch.log1p(torch.sigmoid(-pi) * torch.expm1(torch.where(near, q, 0.0)))
    at_zero = torch.where(near, close, softplus(-pi) - softplus(q - pi))
    counts = softplus(pi) + negative_binomial(torch.where(zero, 1.0, x), torch.where(zero, 1.0, mu), th)
    return torch.where(zero, at_zero, counts)


def zero_inflated_negative_binomial_gradient(
    x: Tensor, mu: Tensor, th: Tensor, pi: Tensor
) -> tuple[Tensor, ...]:
    zero = x == 0
    q = -scaled_log1p(th, mu)
    w = torch.sigmoid(q - pi)
    nb_mu, nb_th = negative_binomial_gradient(x, mu, th)
    gate = (
        torch.sigmoid(-pi) * torch.sigmoid(pi - q) * torch.expm1(q)
    )  # w - sigmoid(-pi), without the difference
    return (
        torch.where(zero, w * th / (th + mu), nb_mu),
        torch.where(zero, w * scaled_log1p_slope(th, mu), nb_th),
        torch.where(zero, gate, torch.sigmoid(pi)),
    )


# In the order of the codes: ``gaussian`` first without, then with its log-variance.
ENERGIES: tuple[Callable[..., Tensor], ...] = (
    mse,
    gaussian,
    gaussian,
    bernoulli,
    continuous_bernoulli,
    categorical,
    laplace,
    student_t,
    poisson,
    negative_binomial,
    zero_inflated_negative_binomial,
)
GRADIENTS: tuple[Callable[..., tuple[Tensor, ...]], ...] = (
    mse_gradient,
    gaussian_gradient,
    gaussian_gradient,
    bernoulli_gradient,
    continuous_bernoulli_gradient,
    categorical_gradient,
    laplace_gradient,
    student_t_gradient,
    poisson_gradient,
    negative_binomial_gradient,
    zero_inflated_negative_binomial_gradient,
)
# What stands in for the parameters of an element that was not observed: any value with a finite energy.
SAFE: tuple[tuple[float, ...], ...] = (
    (0.0,),
    (0.0,),
    (0.0, 0.0),
    (0.0,),
    (0.0,),
    (0.0,),
    (0.0, 0.0),
    (0.0, 0.0, 1.0),
    (0.0,),
    (1.0, 1.0),
    (1.0, 1.0, 0.0),
)
