"""Energies and KL terms of one element in plain float64: value, gradients, and what their errors are measured against.

Written from the formulas alone and shared with nothing in the package. As in oracle.py, a scale is the value itself
where a good formula keeps its relative precision, else the sum of the terms that no rearrangement removes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Term:
    value: Tensor
    gradients: tuple[Tensor, ...]
    scale: Tensor
    scales: tuple[Tensor, ...]


def mse(x: Tensor, r: Tensor) -> Term:
    d = r - x
    return Term(d * d, (2 * d,), d * d, (2 * d.abs(),))


def gaussian(x: Tensor, r: Tensor, s: Tensor | None = None) -> Term:
    s = torch.zeros_like(r) if s is None else s
    precision = torch.exp(-s)
    u, slope = (r - x) ** 2 * precision, (r - x) * precision
    return Term(
        (s + u + LOG_2PI) / 2,
        (slope, (1 - u) / 2),
        (s.abs() + u + LOG_2PI) / 2,
        (slope.abs(), (1 + u) / 2),
    )


def bernoulli(x: Tensor, logit: Tensor) -> Term:
    # x softplus(-l) + (1 - x) softplus(l): a sum of terms of one sign for targets in [0, 1].
    value = x * F.softplus(-logit, threshold=1e9) + (1 - x) * F.softplus(logit, threshold=1e9)
    up, down = (1 - x) * torch.sigmoid(logit), x * torch.sigmoid(-logit)
    parts = torch.where(logit > 0, (1 - x).abs() + torch.sigmoid(-logit), x.abs() + torch.sigmoid(logit))
    return Term(value, (up - down,), value, (parts,))


def continuous_bernoulli(x: Tensor, logit: Tensor) -> Term:
    y = logit / 2
    small = y.abs() < 1e-2
    safe = torch.where(small, 1.0, y)
    near = y**2 / 6 - y**4 / 180 + y**6 / 2835
    far = safe.abs() - math.log(2) + torch.log1p(-torch.exp(-2 * safe.abs())) - safe.abs().log()
    log_ratio = torch.where(small, near, far)
    slope = torch.where(small, y / 3 - y**3 / 45 + 2 * y**5 / 945, 1 / torch.tanh(safe) - 1 / safe)
    linear = logit * (0.5 - x)
    ends = logit.abs() * torch.where(logit > 0, (1 - x).abs(), x.abs())
    scale = torch.minimum(linear.abs() + log_ratio, ends + (log_ratio - y.abs()).abs())
    return Term(linear + log_ratio, (slope / 2 + 0.5 - x,), scale, ((0.5 - x).abs() + slope.abs() / 2,))


def laplace(x: Tensor, r: Tensor, s: Tensor) -> Term:
    rate = torch.exp(-s)
    distance = (x - r).abs() * rate
    return Term(
        distance + s + math.log(2),
        (torch.sign(r - x) * rate, 1 - distance),
        distance + s.abs() + math.log(2),
        (rate, 1 + distance),
    )


def student_t(x: Tensor, r: Tensor, s: Tensor, nu: Tensor) -> Term:
    precision = torch.exp(-s)
    u = (r - x) ** 2 * precision
    log_ratio = torch.log1p(u / nu)
    constant = (nu.log() + math.log(math.pi)) / 2 + torch.lgamma(nu / 2) - torch.lgamma((nu + 1) / 2)
    slope, pull = (nu + 1) * (r - x) * precision / (nu + u), nu * u / (nu + u)
    tail, mixed = log_ratio - u / (nu + u), u / (nu * (nu + u))
    rest = 1 / nu + torch.digamma(nu / 2) - torch.digamma((nu + 1) / 2)
    return Term(
        (nu + 1) / 2 * log_ratio + s / 2 + constant,
        (slope, (nu / (nu + u) - pull) / 2, (tail - mixed + rest) / 2),
        (nu + 1) / 2 * log_ratio + s.abs() / 2 + constant.abs(),
        (slope.abs(), (nu / (nu + u) + pull) / 2, (tail + mixed + rest.abs()) / 2),
    )


def poisson(x: Tensor, a: Tensor) -> Term:
    rate = torch.exp(a)
    value = rate - x * a + torch.lgamma(x + 1)
    return Term(value, (rate - x,), value, (rate + x,))


def negative_binomial(x: Tensor, mu: Tensor, th: Tensor) -> Term:
    log_ratio, part = torch.log1p(mu / th), mu / (th + mu)
    many = torch.lgamma(th) - torch.lgamma(x + th) + torch.lgamma(x + 1)
    value = th * log_ratio + torch.where(x > 0, many + x * torch.log1p(th / mu), 0.0)
    slope = torch.where(x > 0, th * (mu - x) / (mu * (th + mu)), th / (th + mu))
    w = (mu - x) / (x + th)
    bend = torch.log1p(w) - w / (1 + w)
    rest = torch.log(x + th) - torch.digamma(x + th) - torch.log(th) + torch.digamma(th)
    none = log_ratio - part
    return Term(
        value,
        (slope, torch.where(x > 0, bend + rest, none)),
        value,
        (slope.abs(), torch.where(x > 0, bend + rest.abs(), none)),
    )


def zero_inflated_negative_binomial(x: Tensor, mu: Tensor, th: Tensor, pi: Tensor) -> Term:
    plain, zero = negative_binomial(x, mu, th), negative_binomial(torch.zeros_like(x), mu, th)

    def softplus(t: Tensor) -> Tensor:
        return F.softplus(t, threshold=1e9)

    q, gate = -zero.value, torch.sigmoid(pi)
    weight = torch.sigmoid(q - pi)
    none = softplus(-pi) - softplus(q - pi)
    positive = x > 0
    return Term(
        torch.where(positive, softplus(pi) + plain.value, none),
        (
            *(
                torch.where(positive, p, weight * z)
                for p, z in zip(plain.gradients, zero.gradients, strict=True)
            ),
            torch.where(positive, gate, weight - torch.sigmoid(-pi)),
        ),
        torch.where(positive, softplus(pi) + plain.scale, softplus(-pi)),
        (
            *(torch.where(positive, p, z) for p, z in zip(plain.scales, zero.scales, strict=True)),
            torch.ones_like(pi),
        ),
    )


def gamma(x: Tensor, mu: Tensor, k: Tensor) -> Term:
    v = (x - mu) / mu
    deviance, constant = v - torch.log(x / mu), torch.lgamma(k) - k * k.log() + k
    value = k * deviance + x.log() + constant
    slope, of_k = k * (mu - x) / mu**2, torch.digamma(k) - k.log()
    # Below 1e-3 series of v - log1p(v): the difference has no digits left.
    small = v.abs() < 1e-3
    deviance = torch.where(small, v * v * (1 / 2 - v * (1 / 3 - v * (1 / 4 - v / 5))), deviance)
    return Term(
        value,
        (slope, of_k + deviance),
        k * deviance + x.log().abs() + (constant.abs() + k.log().abs() / 2 + 1),
        (slope.abs(), of_k.abs() + deviance),
    )


def categorical(x: Tensor, logits: Tensor) -> Term:
    """Logits [..., K] and classes [...]."""
    largest = logits.abs().amax(-1)
    value = torch.logsumexp(logits, -1) - logits.gather(-1, x.unsqueeze(-1)).squeeze(-1)
    p = torch.softmax(logits, -1)
    hot = F.one_hot(x, logits.shape[-1]).double()
    # A softmax in float32 knows its exponents to an ulp of the logits.
    return Term(value, (p - hot,), value + largest, ((p + hot) * (1 + largest.unsqueeze(-1)),))


def gaussian_kl(m: Tensor, v: Tensor, p: Tensor, w: Tensor) -> Term:
    """Gradients in the order m, v, p, w."""
    d, precision = v - w, torch.exp(-w)
    u, slope = (m - p) ** 2 * precision, (m - p) * precision
    growth = torch.expm1(d)
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    excess = torch.where(d.abs() < 1e-3, series, growth - d)
    value = (u + excess) / 2
    return Term(
        value,
        (slope, growth / 2, -slope, -(growth + u) / 2),
        value,
        (slope.abs(), growth.abs() / 2, slope.abs(), (growth.abs() + u) / 2),
    )


TERMS: dict[str, Callable[..., Term]] = {
    "mse": mse,
    "gaussian": gaussian,
    "bernoulli": bernoulli,
    "continuous_bernoulli": continuous_bernoulli,
    "categorical": categorical,
    "laplace": laplace,
    "student_t": student_t,
    "poisson": poisson,
    "negative_binomial": negative_binomial,
    "zero_inflated_negative_binomial": zero_inflated_negative_binomial,
    "gamma": gamma,
}
