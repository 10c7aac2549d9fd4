"""The terms of a free energy per element, operation for operation as in csrc/formulas, so with the same bits.

Each returns the energy and its gradients in the parameters. What holds in `functions` holds here.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fekernels.triton import functions as f
from fekernels.triton.free_energy.count_likelihoods import (
    negative_binomial,
    poisson,
    zero_inflated_negative_binomial,
)
from fekernels.triton.free_energy.gaussian_kl import normal_kl, normal_prior_kl


@triton.jit
def beside(s, u):
    """s beside a term u >= 0 that grows like e^-s: at s = -infinity u has the last word, unless it is 0."""
    return tl.where((s < -f.LARGEST) & (u != 0.0), 0.0, s)


@triton.jit
def mse(r, x):
    difference = r - x
    return difference * difference, difference + difference


@triton.jit
def gaussian(r, x):
    difference = r - x
    return difference * 0.5 * difference + f.HALF_LOG_2PI, difference


@triton.jit
def gaussian_learned(r, s, x):
    root = f.exponential(s * -0.5)
    scaled = f.times(r - x, root)
    half_scaled = scaled * 0.5
    e = tl.fma(half_scaled, scaled, tl.fma(beside(s, scaled), 0.5, f.HALF_LOG_2PI))
    return e, f.times(scaled, root), tl.fma(half_scaled * -1.0, scaled, 0.5)


@triton.jit
def bernoulli(logit, x):
    t = f.exp_negative(f.absolute(logit) * -1.0)
    c = tl.where(logit.to(tl.int32, bitcast=True) >= 0, 1.0 - x, x * -1.0)
    e = tl.fma(logit, c, f.log1p_unit(t))
    odds = tl.div_rn(t, t + 1.0)
    return e, c - f.float_of(f.bits_of(odds) | (f.bits_of(logit) & 0x80000000))


@triton.jit
def continuous_bernoulli(logit, x):
    any_size = f.absolute(logit)
    size = tl.where(any_size > f.LARGEST, f.LARGEST, any_size)
    square = logit * logit
    p = f.polynomial(
        square,
        (
            1.0984833e-12, -6.208654e-11, 2.3881046e-09, -1.0541564e-07, 5.517762e-06,
            -0.00034722916, 0.041666668,
        ),
    )  # fmt: skip
    q = f.polynomial(
        square,
        (
            6.3031863e-12, -4.6261028e-10, 2.070454e-08, -8.27799e-07, 3.3075805e-05,
            -0.0013888996, 0.083333336,
        ),
    )  # fmt: skip
    centred = 0.5 - x
    t = f.exp_negative(size * -1.0)
    rest = 1.0 - t
    inverse = f.inverse(size * rest)
    vast = size > 79228162514264337593543950336.0  # 2^96
    density = tl.where(vast, inverse * f.TWO_TO_64, rest * (rest * inverse))
    c = tl.where(logit > 0.0, 1.0 - x, x * -1.0)
    slope = tl.fma(t, size, rest * -1.0) * inverse
    small = size < 3.5
    minus_log, remainder = f.negative_log(density, 1.0 - density)
    minus_log += tl.where(vast, 64.0 * f.LOG2, 0.0)
    e = tl.where(small, tl.fma(logit, centred, square * p), tl.fma(logit, c, minus_log * -1.0))
    far = c + f.float_of(f.bits_of(slope) ^ (f.bits_of(logit) & 0x80000000))
    return e, tl.where(small, tl.fma(logit, q, centred), far)


@triton.jit
def laplace(r, s, x):
    rate = f.exponential(s * -1.0)
    difference = r - x
    distance = f.times(f.absolute(difference), rate)
    slope = f.value_of(rate)
    e = (distance + beside(s, distance)) + f.LOG2
    tie = f.times(difference, rate)
    g_r = tl.where(difference > 0.0, slope, tl.where(difference < 0.0, slope * -1.0, tie))
    return e, g_r, 1.0 - distance


@triton.jit
def student_t(r, s, nu, x):
    in_domain = tl.where(nu < 0.0, float("nan"), nu)
    nu = tl.where(in_domain > 8.507059173023462e37, 8.507059173023462e37, in_domain)  # 2^126
    tiny = nu < 5.421010862427522e-20  # 2^-64
    lift = tl.where(tiny, f.TWO_TO_64, 1.0)
    inverse = f.inverse(nu * lift)
    inverse_lifted = tl.where(inverse > f.LARGEST, f.LARGEST, inverse)
    inverse_any = inverse_lifted * lift
    inverse_nu = tl.where(inverse_any > f.LARGEST, f.LARGEST, inverse_any)
    root = f.exponential(s * -0.5)
    difference = r - x
    scaled = f.times(difference, root)
    z = scaled * scaled * inverse_lifted * lift
    huge = z > 1208925819614629174706176.0  # 2^80
    distance = f.absolute(difference)
    far = distance > 1.0
    nearer = distance * tl.where(far, 8.673617379884035e-19, 281474976710656.0)  # 2^-60, 2^48
    q = tl.div_rn(tl.where(huge, tl.sqrt_rn(nu), 1.0), tl.where(huge, nearer, z + 1.0))
    y = tl.where(huge, 1.0, z * q)
    single, single_remainder = f.negative_log_where(q, y, (q <= 0.5) | huge)
    one_log = single + tl.where(far, 60.0 * f.LOG2, -48.0 * f.LOG2)
    two_logs = tl.where(distance > f.LARGEST, distance, one_log + one_log)
    logarithm = tl.where(huge, two_logs, single)
    remainder = tl.where(huge, (two_logs - s) - 1.0, single_remainder)

    inverse_a = inverse_nu + inverse_nu
    t = f.inverse(tl.fma(nu, 0.5, 1.0))
    v = f.polynomial(
        t,
        (
            0.00077175495, -0.0029862346, 0.0018887243, 0.014221223, 0.023124604, 0.03129167,
            -0.75000185, 1.0,
        ),
    )  # fmt: skip
    w = f.polynomial(
        t,
        (
            0.02339122, -0.07038504, 0.106549636, -0.066679694, 0.037536256, 0.03091132,
            0.07939809, 0.10927516, 0.12500301, 0.124999985,
        ),
    )  # fmt: skip
    of_constant = tl.fma(inverse_lifted + inverse_lifted, v, tl.where(tiny, 0.0, v))
    level_of_constant = tl.where(tiny, f.HALF_LOG_2PI + 32.0 * f.LOG2, f.HALF_LOG_2PI)
    constant = f.log_positive(of_constant) * 0.5 + level_of_constant
    level = tl.fma(tl.where(huge, logarithm, s), 0.5, constant)
    value = tl.where(huge, tl.fma(nu * 0.5, two_logs - s, level), tl.fma((nu + 1.0) * 0.5, logarithm, level))
    near = f.times((inverse_nu + 1.0) * (scaled * q), root)
    limit, limit_r, limit_s = gaussian_learned(r, s, x)
    infinite = in_domain > 8.507059173023462e37  # 2^126
    e = tl.where(infinite, limit, tl.where(nu == 0.0, f.absolute(inverse) + (y - y), value))
    g_r = tl.where(infinite, limit_r, tl.where(huge, tl.div_rn(nu + 1.0, difference), near))
    g_s = tl.where(infinite, limit_s, (tl.where(huge, 0.0, q) - nu * y) * 0.5)
    limit_nu = tl.where(limit == limit, 0.0, limit)
    g_nu = tl.where(infinite, limit_nu, (remainder - tl.fma(y, inverse_nu, w * inverse_a * t)) * 0.5)
    return e, g_r, g_s, g_nu


@triton.jit
def gamma(mu, k, x):
    outside = (mu < 0.0) | (k < 0.0) | (x < 0.0) | (x > f.LARGEST)
    mu = tl.where(outside, float("nan"), f.absolute(mu))
    k = f.absolute(k)
    v = tl.div_rn(x - mu, mu)
    # 2^-40, 2^60, 2^100, 2^-100
    small_x = x < 9.094947017729282e-13
    large_mu = mu > 1152921504606846976.0
    lifted_x = tl.where(small_x, x * 1267650600228229401496703205376.0, x)
    ratio = tl.div_rn(lifted_x, tl.where(large_mu, mu * 7.888609052210118e-31, mu))
    n, log_f, tail, lost = f.log1p_parts(v, ratio)
    far = v < -0.75
    lifts = tl.where(small_x, 100.0, 0.0) + tl.where(large_mu, 100.0, 0.0)
    parts = (tl.where(far, n - lifts, n), log_f, tail, lost)
    minus_log = tl.where(x == 0.0, f.INF, tl.where(v > f.LARGEST, 0.0, f.log_value(parts) * -1.0))
    deviance = tl.where(f.absolute(v - 0.625) < 1.375, f.below(v, parts), v + minus_log)

    large = k >= 1.0
    none = k == 0.0
    inverse_k = f.inverse(k)
    t = tl.where(large, inverse_k, 1.0)
    unit = tl.where(large, 1.0, k)
    log_k = f.log(tl.where(none, 1.0, k))
    of_large = tl.fma(log_k, -0.5, f.stirling_lgamma(t) + f.HALF_LOG_2PI)
    of_small = tl.fma((unit + 1.0) * -1.0, log_k, f.lgamma1p_unit(unit) + unit)
    by_mu = far & (large | (x * mu <= 1.0))
    of_x = tl.where(k == 1.0, 0.0, minus_log)
    pull = tl.where(by_mu, tl.fma(k - 1.0, of_x, k * v), k * deviance)
    value = (pull + f.log(tl.where(by_mu, mu, x))) + tl.where(large, of_large, of_small)
    at_zero = (x + mu) * 0.0 + f.INF
    at_infinity = tl.where(v == 0.0, -f.INF, k * deviance)
    boundless = (mu == f.INF) & (k >= 0.0) & (x >= 0.0)
    e = tl.where(boundless, mu, tl.where(none, at_zero, tl.where(k == f.INF, at_infinity, value)))
    g_mu = tl.where(boundless, 0.0, tl.div_rn(tl.where(v == 0.0, v, k * v * -1.0), mu))
    psi_large = tl.fma(t, -0.5, f.stirling_digamma(t) * -1.0)
    psi_small = (f.digamma1p_unit(unit) - log_k) - inverse_k
    return e, g_mu, tl.where(boundless, mu, deviance + tl.where(large, psi_large, psi_small))


@triton.jit
def terms(TERM: tl.constexpr, p, x):
    """Energy and four gradients, of which those beyond the term's own are not to be used.

    p: the parameters, a tuple of float32 tensors; x: the target, float32, None for a KL.
    """
    if TERM == "mse":
        e, g0 = mse(p[0], x)
        return e, g0, g0, g0, g0
    elif TERM == "gaussian":
        e, g0 = gaussian(p[0], x)
        return e, g0, g0, g0, g0
    elif TERM == "gaussian_learned":
        e, g0, g1 = gaussian_learned(p[0], p[1], x)
        return e, g0, g1, g0, g0
    elif TERM == "bernoulli":
        e, g0 = bernoulli(p[0], x)
        return e, g0, g0, g0, g0
    elif TERM == "continuous_bernoulli":
        e, g0 = continuous_bernoulli(p[0], x)
        return e, g0, g0, g0, g0
    elif TERM == "laplace":
        e, g0, g1 = laplace(p[0], p[1], x)
        return e, g0, g1, g0, g0
    elif TERM == "student_t":
        e, g0, g1, g2 = student_t(p[0], p[1], p[2], x)
        return e, g0, g1, g2, g0
    elif TERM == "poisson":
        e, g0 = poisson(p[0], x)
        return e, g0, g0, g0, g0
    elif TERM == "negative_binomial":
        e, g0, g1 = negative_binomial(p[0], p[1], x)
        return e, g0, g1, g0, g0
    elif TERM == "zero_inflated_negative_binomial":
        e, g0, g1, g2 = zero_inflated_negative_binomial(p[0], p[1], p[2], x)
        return e, g0, g1, g2, g0
    elif TERM == "gamma":
        e, g0, g1 = gamma(p[0], p[1], x)
        return e, g0, g1, g0, g0
    elif TERM == "normal_kl":
        e, g0, g1 = normal_kl(p[0], p[1])
        return e, g0, g1, g0, g0
    else:
        tl.static_assert(TERM == "normal_prior_kl")
        return normal_prior_kl(p[0], p[1], p[2], p[3])
