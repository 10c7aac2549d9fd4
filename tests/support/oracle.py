"""Energies, KL terms and their gradients to 50 digits with mpmath, one element at a time.

`scale` and `scales` say what an error is measured against: the value itself where a good formula keeps its relative
precision, else the sum of the terms that no rearrangement removes (s + log 2 pi against u of a Gaussian).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpmath import mp, mpf

DIGITS = 50
ZERO = mpf(0)


@dataclass(frozen=True)
class Exact:
    value: mpf
    gradients: tuple[mpf, ...]
    scale: mpf
    scales: tuple[mpf, ...]


def softplus(logit: mpf) -> mpf:
    return max(logit, ZERO) + mp.log1p(mp.exp(-abs(logit)))


def sigmoid(logit: mpf) -> mpf:
    return 1 / (1 + mp.exp(-logit)) if logit >= 0 else mp.exp(logit) / (1 + mp.exp(logit))


def mse(x: mpf, r: mpf) -> Exact:
    d = r - x
    return Exact(d * d, (2 * d,), d * d, (2 * abs(d),))


def gaussian(x: mpf, r: mpf, s: mpf = ZERO) -> Exact:
    precision = mp.exp(-s)
    u = (r - x) ** 2 * precision
    log_2pi = mp.log(2 * mp.pi)
    slope = (r - x) * precision
    return Exact(
        (s + u + log_2pi) / 2,
        (slope, (1 - u) / 2),
        (abs(s) + u + log_2pi) / 2,
        (abs(slope), (1 + u) / 2),
    )


def bernoulli(x: mpf, logit: mpf) -> Exact:
    value = softplus(logit) - x * logit
    # sigmoid(logit) - x, whose parts are (1 - x) and 1 - sigmoid(logit), or x and sigmoid(logit).
    parts = abs(1 - x) + sigmoid(-logit) if logit > 0 else abs(x) + sigmoid(logit)
    return Exact(value, (sigmoid(logit) - x,), value, (parts,))


def continuous_bernoulli(x: mpf, logit: mpf) -> Exact:
    y = logit / 2
    if abs(y) < mpf("1e-12"):  # the error of the next terms is below 1e-48
        log_ratio, slope = y**2 / 6 - y**4 / 180, y / 3 - y**3 / 45
    else:
        log_ratio, slope = mp.log(mp.sinh(y) / y), mp.coth(y) - 1 / y
    linear = logit * (mpf(1) / 2 - x)
    gradient = slope / 2 + mpf(1) / 2 - x
    # The linear part leaves log_ratio - |y| = -log|logit| and slope - 1 = -1 / y behind where |logit| is large.
    ends = abs(logit) * (abs(1 - x) if logit > 0 else abs(x))
    scale = min(abs(linear) + log_ratio, ends + abs(log_ratio - abs(y)))
    scale_slope = abs(mpf(1) / 2 - x) + abs(slope) / 2
    return Exact(linear + log_ratio, (gradient,), scale, (scale_slope,))


def laplace(x: mpf, r: mpf, s: mpf) -> Exact:
    rate = mp.exp(-s)
    distance = abs(x - r) * rate
    return Exact(
        distance + s + mp.log(2),
        (mp.sign(r - x) * rate, 1 - distance),
        distance + abs(s) + mp.log(2),
        (rate, 1 + distance),
    )


def student_t(x: mpf, r: mpf, s: mpf, nu: mpf) -> Exact:
    precision = mp.exp(-s)
    u = (r - x) ** 2 * precision
    log_ratio = mp.log1p(u / nu)
    constant = mp.log(nu * mp.pi) / 2 + mp.loggamma(nu / 2) - mp.loggamma((nu + 1) / 2)
    slope = (nu + 1) * (r - x) * precision / (nu + u)
    pull = nu * u / (nu + u)
    tail = log_ratio - u / (nu + u)  # of the order of (u / nu)^2 / 2 where nu is large
    mixed = u / (nu * (nu + u))
    rest = 1 / nu + mp.digamma(nu / 2) - mp.digamma((nu + 1) / 2)
    return Exact(
        (nu + 1) / 2 * log_ratio + s / 2 + constant,
        (slope, (nu / (nu + u) - pull) / 2, (tail - mixed + rest) / 2),
        (nu + 1) / 2 * log_ratio + abs(s) / 2 + abs(constant),
        (abs(slope), (nu / (nu + u) + pull) / 2, (tail + mixed + abs(rest)) / 2),
    )


def poisson(x: mpf, a: mpf) -> Exact:
    rate = mp.exp(a)
    value = rate - x * a + mp.loggamma(x + 1)
    return Exact(value, (rate - x,), value, (rate + x,))


def negative_binomial(x: mpf, mu: mpf, th: mpf) -> Exact:
    log_ratio = mp.log1p(mu / th)
    if x == 0:
        value, part = th * log_ratio, mu / (th + mu)
        return Exact(value, (th / (th + mu), log_ratio - part), value, (th / (th + mu), log_ratio - part))
    value = (
        mp.loggamma(th)
        - mp.loggamma(x + th)
        + mp.loggamma(x + 1)
        + th * log_ratio
        + (x * mp.log1p(th / mu) if mu > 0 else mp.inf)
    )
    gradient = th * (mu - x) / (mu * (th + mu)) if mu > 0 else -mp.inf
    w = (mu - x) / (x + th)
    bend = mp.log1p(w) - w / (1 + w)
    rest = mp.log(x + th) - mp.digamma(x + th) - mp.log(th) + mp.digamma(th)
    scales = [value, abs(gradient), bend + abs(rest)]
    if x < 1:  # no count; reached through x + 1
        scales[0] += mp.log1p(th / mu)
        scales[2] += abs(1 / (x + th) - 1 / (mu + th))
    return Exact(value, (gradient, bend + rest), scales[0], (scales[1], scales[2]))


def zero_inflated_negative_binomial(x: mpf, mu: mpf, th: mpf, pi: mpf) -> Exact:
    plain = negative_binomial(x, mu, th)
    if x > 0:
        gate = sigmoid(pi)
        scale = softplus(pi) + plain.scale
        return Exact(softplus(pi) + plain.value, (*plain.gradients, gate), scale, (*plain.scales, gate))
    q = -plain.value
    weight = sigmoid(q - pi)
    value = softplus(-pi) - softplus(q - pi)
    slopes = tuple(weight * slope for slope in plain.gradients)
    gate = weight - sigmoid(-pi)
    # An ulp of q - pi is what a weight next to 0 can be off by; it is 1 at most.
    return Exact(value, (*slopes, gate), value, (plain.scales[0], plain.scales[1], mpf(1)))


def gamma(x: mpf, mu: mpf, k: mpf) -> Exact:
    v, log_ratio = (x - mu) / mu, mp.log(x / mu)
    deviance = v - log_ratio
    value = mp.loggamma(k) - k * mp.log(k) + k * (mp.log(mu) + x / mu) - (k - 1) * mp.log(x)
    of_k = mp.digamma(k) - mp.log(k)
    # Of a large shape log(2 pi / k) / 2 is left, of a small one -log k.
    constant = (mp.log(2 * mp.pi) + abs(mp.log(k))) / 2 if k >= 1 else abs(mp.loggamma(k) - k * mp.log(k) + k)
    by_x = k * deviance + abs(mp.log(x))
    by_mean = k * abs(v) + abs(k - 1) * abs(log_ratio) + abs(mp.log(mu))
    gradient = k * (mu - x) / mu**2
    return Exact(
        value,
        (gradient, of_k + deviance),
        min(by_x, by_mean) + constant,
        (abs(gradient), abs(of_k) + deviance),
    )


def normal_kl(_: mpf, m: mpf, v: mpf) -> Exact:
    value = (m * m + mp.expm1(v) - v) / 2
    return Exact(value, (m, mp.expm1(v) / 2), value, (abs(m), abs(mp.expm1(v)) / 2))


def normal_prior_kl(_: mpf, m: mpf, v: mpf, p: mpf, w: mpf) -> Exact:
    d, precision = v - w, mp.exp(-w)
    u = (m - p) ** 2 * precision
    growth = mp.expm1(d)
    value = (u + growth - d) / 2
    slope = (m - p) * precision
    return Exact(
        value,
        (slope, growth / 2, -slope, -(growth + u) / 2),
        value,
        (abs(slope), abs(growth) / 2, abs(slope), (abs(growth) + u) / 2),
    )


EXACT: dict[str, Callable[..., Exact]] = {
    "mse": mse,
    "gaussian": gaussian,
    "bernoulli": bernoulli,
    "continuous_bernoulli": continuous_bernoulli,
    "laplace": laplace,
    "student_t": student_t,
    "poisson": poisson,
    "negative_binomial": negative_binomial,
    "zero_inflated_negative_binomial": zero_inflated_negative_binomial,
    "gamma": gamma,
    "normal_kl": normal_kl,
    "normal_prior_kl": normal_prior_kl,
}


def exact(name: str, x: float, *params: float) -> Exact:
    """The term `name` at the target x; the gradients are those in params, in order."""
    with mp.workdps(DIGITS):
        result = EXACT[name](mpf(x), *(mpf(p) for p in params))
        return Exact(
            result.value, result.gradients[: len(params)], result.scale, result.scales[: len(params)]
        )
