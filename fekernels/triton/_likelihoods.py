"""The terms of a free energy an element: csrc/math/free_energy.h operation for operation, so with the same bits.

Each returns the energy and its gradients in the parameters. What holds in `_functions` holds here.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fekernels.triton import _functions as f


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
    e = tl.fma(half_scaled, scaled, tl.fma(s, 0.5, f.HALF_LOG_2PI))
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
    size = f.absolute(logit)
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
    density = rest * (rest * inverse)
    c = tl.where(logit > 0.0, 1.0 - x, x * -1.0)
    slope = tl.fma(t, size, rest * -1.0) * inverse
    small = size < 3.5
    minus_log, remainder = f.negative_log(density, 1.0 - density)
    e = tl.where(small, tl.fma(logit, centred, square * p), tl.fma(logit, c, minus_log * -1.0))
    far = c + f.float_of(f.bits_of(slope) ^ (f.bits_of(logit) & 0x80000000))
    return e, tl.where(small, tl.fma(logit, q, centred), far)


@triton.jit
def laplace(r, s, x):
    rate = f.exponential(s * -1.0)
    difference = r - x
    distance = f.times(f.absolute(difference), rate)
    slope = f.value_of(rate)
    e = (distance + s) + f.LOG2
    tie = f.times(difference, rate)
    g_r = tl.where(difference > 0.0, slope, tl.where(difference < 0.0, slope * -1.0, tie))
    return e, g_r, 1.0 - distance


@triton.jit
def student_t(r, s, nu, x):
    root = f.exponential(s * -0.5)
    scaled = f.times(r - x, root)
    size = f.absolute(scaled)
    inverse_nu = f.inverse(nu)
    z = scaled * scaled * inverse_nu
    huge = z > 1208925819614629174706176.0  # 2^80
    q = tl.div_rn(tl.where(huge, tl.sqrt_rn(nu), 1.0), tl.where(huge, size, z + 1.0))
    y = tl.where(huge, 1.0, z * q)
    value, single_remainder = f.negative_log(q, tl.where(huge, 1.0 - q, y))
    log1p_z = tl.where(huge, value + value, value)
    remainder = tl.where(huge, log1p_z - 1.0, single_remainder)

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
    constant = f.log(tl.fma(inverse_a, v, v)) * 0.5 + f.HALF_LOG_2PI
    e = tl.fma((nu + 1.0) * 0.5, log1p_z, tl.fma(s, 0.5, constant))
    falloff = tl.where(huge, tl.div_rn(nu + 1.0, scaled), (inverse_nu + 1.0) * (scaled * q))
    g_s = (tl.where(huge, 0.0, q) - nu * y) * 0.5
    g_nu = (remainder - tl.fma(y, inverse_nu, w * inverse_a * t)) * 0.5
    return e, f.times(falloff, root), g_s, g_nu


@triton.jit
def poisson_zero(a):
    return f.exp(a)


@triton.jit
def poisson_counts(a, x):
    rate = f.exp(a)
    fraction = x < 1.0
    k = tl.where(fraction, 1.0, x)
    log_k = f.log_parts(k, tl.zeros_like(k))
    n, log_f, tail, lost_f = log_k
    reduced = tl.fma(n, -0.693145752, a)
    difference = reduced - log_f
    back = difference - reduced
    lost = (reduced - (difference - back)) - (log_f + back)
    d = difference + (lost + tl.fma(n, -1.42860677e-06, tail))
    remainder = f.expm1_remainder_near_zero(d)
    near = f.absolute(d) < 1.0
    deviance = tl.where(near, k * remainder, rate - k * (tl.where(a < -1e9, a, d) + 1.0))
    correction = f.stirling_lgamma(f.inverse(k))
    whole = deviance + (tl.fma(f.log_value(log_k), 0.5, f.HALF_LOG_2PI) + correction)
    e = tl.where(fraction, tl.fma(x * -1.0, a, rate + f.lgamma1p_unit(x)), whole)
    return e, tl.where(fraction, rate - x, tl.where(near, k * (d + remainder), rate - x))


@triton.jit
def poisson(a, x):
    rate = poisson_zero(a)
    e, g_a = poisson_counts(a, x)
    zero = x == 0.0
    return tl.where(zero, rate, e), tl.where(zero, rate, g_a)


@triton.jit
def negative_binomial_zero(mu, th):
    inverse = f.inverse(mu + th)
    share = th * inverse
    value, remainder = f.negative_log(share, mu * inverse)
    return th * value, share, remainder


@triton.jit
def negative_binomial_counts(mu, th, x):
    m = mu + th
    inverse_m = f.inverse(m)
    fraction = x < 1.0
    k = tl.where(fraction, x + 1.0, x)
    inverse_k = f.inverse(k)
    n = k + th
    inverse_n = f.inverse(n)
    tiny = mu < 7.888609052210118e-31  # 2^-100
    inverse_mu = f.inverse(tl.where(tiny, mu * 18446744073709551616.0, mu))
    excess = k - mu
    v = (excess * inverse_mu) * (th * inverse_n)
    w = excess * -1.0 * inverse_n
    ratio = m * inverse_n
    n_v, f_v, tail_v, lost_v = f.log1p_parts(tl.where(tiny, -1.0, v), (k * inverse_mu) * ratio)
    log_v = (tl.where(tiny, n_v + 64.0, n_v), f_v, tail_v, lost_v)
    log_w = f.log1p_parts(w, ratio)
    log1p_w = f.log_value(log_w)
    v_near = f.absolute(v - 0.625) < 1.375
    w_near = f.absolute(w - 0.625) < 1.375
    rest_w = f.below(w, log_w)
    near = tl.fma(v, excess, tl.fma(k, f.below(v, log_v), th * rest_w) * -1.0)
    far = tl.fma(k, f.log_value(log_v), th * log1p_w)
    deviance = tl.where(v_near, tl.where(w_near, near, far), far)

    large = th >= 1.0
    inverse_th = f.inverse(th)
    t = tl.where(large, inverse_th, 1.0)
    unit = tl.where(large, 1.0, th)
    log_th = f.log(unit)
    lgamma_large = f.stirling_lgamma(t) + f.HALF_LOG_2PI
    lgamma_small = f.lgamma1p_unit(unit) + tl.fma((unit + 1.0) * -1.0, log_th, unit)
    back = tl.where(fraction, (x + th) * inverse_m * (mu * inverse_k), 1.0)
    logarithm = f.log(tl.sqrt_rn(k * (n * t)) * back)
    stirling = f.stirling_lgamma(inverse_k) - f.stirling_lgamma(inverse_n)
    value = deviance + (logarithm + (stirling + tl.where(large, lgamma_large, lgamma_small)))
    e = tl.where(mu == 0.0, f.absolute(inverse_mu), value)
    slope = (mu - x) * inverse_mu * (th * inverse_m)
    g_mu = tl.where(tiny, slope * 18446744073709551616.0, slope)

    back_w = w * (n * inverse_m)
    growth = tl.where(w_near, tl.fma(w, back_w, rest_w * -1.0), log1p_w - back_w)
    series_n = f.stirling_digamma(inverse_n)
    large_th = tl.fma(k * inverse_n, inverse_th * -0.5, series_n - f.stirling_digamma(t))
    small_th = (f.digamma1p_unit(unit) - log_th) + (tl.fma(inverse_n, 0.5, series_n) - inverse_th)
    shift = tl.where(fraction, tl.div_rn((mu - x) * inverse_m, x + th), 0.0)
    return e, g_mu, growth + (tl.where(large, large_th, small_th) + shift)


@triton.jit
def negative_binomial(mu, th, x):
    e0, mu0, th0 = negative_binomial_zero(mu, th)
    e, g_mu, g_th = negative_binomial_counts(mu, th, x)
    zero = x == 0.0
    return tl.where(zero, e0, e), tl.where(zero, mu0, g_mu), tl.where(zero, th0, g_th)


@triton.jit
def zero_inflated_zero(mu, th, pi):
    plain, slope_mu, slope_th = negative_binomial_zero(mu, th)
    q = plain * -1.0
    drop_near = q + f.expm1_remainder_near_zero(q)
    drop = tl.where(q > -1.0, drop_near, f.exp_negative(q) - 1.0)
    t_pi = f.exp_negative(f.absolute(pi) * -1.0)
    inverse_pi = f.inverse(t_pi + 1.0)
    opened = tl.where(pi > 0.0, t_pi * inverse_pi, inverse_pi)
    z = q - pi
    t_z = f.exp_negative(f.absolute(z) * -1.0)
    inverse_z = f.inverse(t_z + 1.0)
    small_z = t_z * inverse_z
    plain_likely = z > 0.0

    change = opened * drop
    likely = change > -0.5
    half_ratio = (t_z + 1.0) * (inverse_pi * 0.5)
    value, remainder = f.negative_log(
        tl.where(likely, change + 1.0, half_ratio), tl.where(likely, change * -1.0, 1.0 - half_ratio)
    )
    e = tl.where(likely, value, value - (tl.where(q > pi, q, pi) + f.LOG2))
    weight = tl.where(plain_likely, inverse_z, small_z)
    return e, weight * slope_mu, weight * slope_th, change * tl.where(plain_likely, small_z, inverse_z)


@triton.jit
def zero_inflated_negative_binomial(mu, th, pi, x):
    e0, mu0, th0, pi0 = zero_inflated_zero(mu, th, pi)
    sigmoid, complement, softplus = f.logistic(pi)
    plain, g_mu, g_th = negative_binomial_counts(mu, th, x)
    zero = x == 0.0
    e = tl.where(zero, e0, softplus + plain)
    return e, tl.where(zero, mu0, g_mu), tl.where(zero, th0, g_th), tl.where(zero, pi0, sigmoid)


@triton.jit
def normal_kl(m, v):
    """KL(N(m, e^v) || N(0, 1))."""
    value, remainder = f.half_expm1(v)
    return tl.fma(m * 0.5, m, remainder), m, value


@triton.jit
def normal_prior_kl(m, v, p, w):
    """KL(N(m, e^v) || N(p, e^w))."""
    d = v - w
    back = d - v
    low = (v - (d - back)) - (w + back)
    value, remainder = f.half_expm1(d)
    root = f.exponential(w * -0.5)
    scaled = f.times(m - p, root)
    half_scaled = scaled * 0.5
    bounded = tl.where(value > 3e38, 3e38, value)
    growth = tl.fma(low, bounded + 0.5, value)
    e = tl.fma(half_scaled, scaled, tl.fma(low, bounded, remainder))
    slope = f.times(scaled, root)
    return e, slope, growth, slope * -1.0, tl.fma(half_scaled * -1.0, scaled, growth * -1.0)


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
    elif TERM == "normal_kl":
        e, g0, g1 = normal_kl(p[0], p[1])
        return e, g0, g1, g0, g0
    else:
        tl.static_assert(TERM == "normal_prior_kl")
        return normal_prior_kl(p[0], p[1], p[2], p[3])
