"""The terms of counts, operation for operation as in csrc/formulas/count_likelihoods.h, so with the same bits."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fekernels.triton import functions as f


@triton.jit
def poisson_zero(a):
    return f.exp(a)


@triton.jit
def poisson_counts(a, x):
    in_domain = tl.where((x < 0.0) | (x > f.LARGEST), float("nan"), a)
    rate = f.exp(in_domain)
    a = tl.where(in_domain > 1e9, 1e9, in_domain)
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
    deviance = tl.where(near, k * remainder, tl.fma(k * -1.0, tl.where(a < -1e9, a, d) + 1.0, rate))
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
    mu = tl.where((mu < 0.0) | (th < 0.0), float("nan"), mu)
    m = mu + th
    # 2^-64, 2^126, 2^-10
    lift = tl.where(
        m < 5.421010862427522e-20, f.TWO_TO_64, tl.where(m > 8.507059173023462e37, 0.0009765625, 1.0)
    )
    lifted_th = th * lift
    lifted_mu = mu * lift
    inverse = f.inverse(lifted_mu + lifted_th)
    share = lifted_th * inverse
    y = lifted_mu * inverse
    small = share < 4.70197740328915e-38  # 2^-124
    log_share, remainder = f.negative_log(tl.where(small, 1.0, share), y)
    raised = f.log(m) - f.log(th)
    value = tl.where(th == 0.0, m * 0.0, th * tl.where(small, raised, log_share))
    # 2^60, 2^-30
    nearly = (m > 1152921504606846976.0) & (y < 9.313225746154785e-10)
    boundless = (mu == f.INF) & (th > 0.0)
    poisson = ((th == f.INF) | nearly) & (mu >= 0.0)
    e = tl.where(boundless | poisson, mu, value)
    g_mu = tl.where(boundless, 0.0, tl.where(poisson, 1.0, share))
    of_th = tl.where(small, raised - y, remainder)
    g_th = tl.where(boundless, mu, tl.where(th == f.INF, mu * 0.0, of_th))
    return e, g_mu, g_th


@triton.jit
def negative_binomial_counts(mu, th, x):
    outside = (mu < 0.0) | (th < 0.0) | (x < 0.0) | (x > f.LARGEST)
    mu = tl.where(outside, float("nan"), mu)
    tiny = mu < 7.888609052210118e-31  # 2^-100
    both = tiny & (th < 9.094947017729282e-13)  # 2^-40
    poisson = th == f.INF
    lift = tl.where(both, f.TWO_TO_64, 1.0)
    m = (mu + th) * lift
    inverse_m = f.inverse(m)
    fraction = x < 1.0
    k = tl.where(fraction, x + 1.0, x)
    inverse_k = f.inverse(k)
    n = k + th
    inverse_n = f.inverse(n)
    share_n = tl.where(poisson, 1.0, th * lift * inverse_n)
    share_m = tl.where(poisson, 1.0, th * lift * inverse_m)
    scaled_mu = tl.where(tiny, mu * f.TWO_TO_64, mu)
    inverse_mu = f.inverse(scaled_mu)
    excess = k - mu
    v = (excess * inverse_mu) * share_n
    w = excess * -1.0 * inverse_n
    ratio = tl.where(poisson, 1.0, m * inverse_n)
    far_v = tiny & (lift == 1.0)
    n_v, f_v, tail_v, lost_v = f.log1p_parts(tl.where(far_v, -1.0, v), (k * inverse_mu) * ratio)
    log_v = (tl.where(far_v, n_v + 64.0, n_v), f_v, tail_v, lost_v)
    n_w, f_w, tail_w, lost_w = f.log1p_parts(w, ratio)
    log_w = (tl.where(both, n_w - 64.0, n_w), f_w, tail_w, lost_w)
    log1p_w = f.log_value(log_w)
    v_near = f.absolute(v - 0.625) < 1.375
    w_near = f.absolute(w - 0.625) < 1.375
    rest_w = f.below(w, log_w)
    near = tl.fma(v, excess, tl.fma(k, f.below(v, log_v), tl.where(poisson, 0.0, th) * rest_w) * -1.0)
    far = tl.fma(k, f.log_value(log_v), tl.where(poisson, excess * -1.0, th * log1p_w))
    deviance = tl.where(v_near, tl.where(w_near, near, far), far)

    large = th >= 1.0
    inverse_th = f.inverse(th * lift)
    t = tl.where(large, inverse_th, 1.0)
    unit = tl.where(large, 1.0, th)
    log_th = f.log(unit)
    lgamma_large = f.stirling_lgamma(t) + f.HALF_LOG_2PI
    lgamma_small = f.lgamma1p_unit(unit) + tl.fma((unit + 1.0) * -1.0, log_th, unit)
    back = tl.where(poisson, 1.0, (x + th) * inverse_m) * (scaled_mu * inverse_k)
    n_over_th = tl.where(poisson, 1.0, n * t)
    apart = tl.sqrt_rn(k) * tl.sqrt_rn(n_over_th)
    root = tl.where(k > 1152921504606846976.0, apart, tl.sqrt_rn(k * n_over_th))  # 2^60
    root *= tl.where(fraction, back, 1.0)
    n_root, f_root, tail_root, lost_root = f.log_parts(root, tl.zeros_like(root))
    n_root = tl.where(fraction & far_v, n_root - 64.0, n_root)
    logarithm = f.log_value((n_root, f_root, tail_root, lost_root))
    stirling = f.stirling_lgamma(inverse_k) - f.stirling_lgamma(inverse_n)
    value = deviance + (logarithm + (stirling + tl.where(large, lgamma_large, lgamma_small)))
    boundless = (mu == f.INF) & (th >= 0.0) & (x >= 0.0)
    e = tl.where(boundless, mu, tl.where(mu == 0.0, f.absolute(inverse_mu) + inverse_n * 0.0, value))
    slope = (mu - x) * inverse_mu * share_m
    g_mu = tl.where(boundless, 0.0, tl.where(tiny, slope * f.TWO_TO_64, slope))

    back_w = w * (n * inverse_m)
    growth = tl.where(w_near, tl.fma(w, back_w, rest_w * -1.0), log1p_w - back_w)
    series_n = f.stirling_digamma(inverse_n)
    large_th = tl.fma(k * inverse_n, inverse_th * -0.5, series_n - f.stirling_digamma(t))
    small_th = (f.digamma1p_unit(unit) - log_th) + (tl.fma(inverse_n, 0.5, series_n) - inverse_th)
    shift = tl.where(fraction, tl.div_rn((mu - x) * inverse_m, x + th), 0.0)
    bend = growth + (tl.where(large, large_th, small_th) + shift)
    steep = (shift - back_w - inverse_th) * lift
    of_th = tl.where(both, steep, tl.where(poisson, mu * 0.0, bend))
    at_zero = f.absolute(inverse_th) * -1.0 + (w - w)
    return e, g_mu, tl.where(boundless, mu, tl.where(th == 0.0, at_zero, of_th))


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
    g_th = tl.where(weight == 0.0, weight, weight * slope_th)
    return e, weight * slope_mu, g_th, change * tl.where(plain_likely, small_z, inverse_z)


@triton.jit
def zero_inflated_negative_binomial(mu, th, pi, x):
    e0, mu0, th0, pi0 = zero_inflated_zero(mu, th, pi)
    sigmoid, complement, softplus = f.logistic(pi)
    plain, g_mu, g_th = negative_binomial_counts(mu, th, x)
    zero = x == 0.0
    e = tl.where(zero, e0, softplus + plain)
    g_pi = tl.where(plain == plain, sigmoid, plain)
    return e, tl.where(zero, mu0, g_mu), tl.where(zero, th0, g_th), tl.where(zero, pi0, g_pi)
