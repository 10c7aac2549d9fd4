// The terms of a free energy: e = -log p(x | p) an element with its gradients in the parameters p, and the elementwise
// KL of two Gaussians. Formulas in docs/likelihoods.md; s and v are log-variances (Laplace: a log scale).
//
// Squares of a difference are taken after scaling: (r - x)^2 e^-s = ((r - x) e^(-s/2))^2 overflows only with its value.
// A count likelihood (kSparse) has `zero` for every element, as cheap as x = 0 is, and `counts` for those with x > 0; a
// fractional x > 0 is as good as a whole one.
#pragma once

#include "math/functions.h"

namespace fe::inline FE_ISA {

// The order is that of LIKELIHOODS in fekernels/reference/free_energy.py.
enum class Likelihood : int {
  kMse,
  kGaussian,
  kGaussianLearned,
  kBernoulli,
  kContinuousBernoulli,
  kCategorical,
  kLaplace,
  kStudentT,
  kPoisson,
  kNegativeBinomial,
  kZeroInflatedNegativeBinomial,
};

// s beside a term u >= 0 that grows like e^-s: at s = -infinity u has the last word, unless it is 0.
template <class F>
FE_HD F beside(F s, F u) {
  return ((s < -kLargest) & (u != 0.0f)) ? Lane<F>::splat(0.0f) : s;
}

template <class F>
struct Mse {  // r
  static constexpr int kParams = 1;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    const F difference = p[0] - x;
    e = difference * difference;
    g[0] = difference + difference;
  }
};

template <class F>
struct Gaussian {  // r; s = 0
  static constexpr int kParams = 1;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    const F difference = p[0] - x;
    e = difference * 0.5f * difference + kHalfLog2Pi;
    g[0] = difference;
  }
};

template <class F>
struct GaussianLearned {  // r, s
  static constexpr int kParams = 2;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    using L = Lane<F>;
    const Exponential<F> root = exponential<F>(p[1] * -0.5f);
    const F scaled = root.times(p[0] - x);
    const F half_scaled = scaled * 0.5f, half = L::splat(0.5f);
    e = L::fma(half_scaled, scaled, L::fma(beside<F>(p[1], scaled), half, L::splat(kHalfLog2Pi)));
    g[0] = root.times(scaled);
    g[1] = L::fma(-half_scaled, scaled, half);
  }
};

template <class F>
struct Bernoulli {  // l
  static constexpr int kParams = 1;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    using L = Lane<F>;
    const F l = p[0];
    const F t = exp_negative<F>(-absolute<F>(l));
    // max(l, 0) - x l = l c, and sigmoid(l) - x = c - sign(l) t / (1 + t): exact where x is 0 or 1.
    const F c = (typename L::Signed)L::bits(l) >= 0 ? 1.0f - x : -x;
    e = L::fma(l, c, log1p_unit<F>(t));
    const F odds = L::divide(t, t + 1.0f);
    g[0] = c - L::from_bits(L::bits(odds) | (L::bits(l) & 0x80000000u));
  }
};

template <class F>
struct ContinuousBernoulli {  // l
  static constexpr int kParams = 1;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    using L = Lane<F>;
    const F l = p[0];
    const F any_size = absolute<F>(l);
    const F size = any_size > kLargest ? L::splat(kLargest) : any_size;  // 0 * infinity is NaN
    // |l| < 3.5: log(sinh y / y) = l^2 P(l^2) to 3.0e-8 and (coth y - 1 / y) / 2 = l Q(l^2) to 3.0e-8, y = l / 2.
    const F l2 = l * l;
    const F p_of_l2 = polynomial<F>(l2, 1.0984833e-12f, -6.208654e-11f, 2.3881046e-09f, -1.0541564e-07f, 5.517762e-06f,
        -0.00034722916f, 0.041666668f);
    const F q_of_l2 = polynomial<F>(l2, 6.3031863e-12f, -4.6261028e-10f, 2.070454e-08f, -8.27799e-07f, 3.3075805e-05f,
        -0.0013888996f, 0.083333336f);
    const F centred = 0.5f - x;
    // Elsewhere with t = e^-|l|: e = l c + log((1 - t) / |l|), the gradient c + sign(l) (t / (1 - t) - 1 / |l|).
    const F t = exp_negative<F>(-size);
    const F rest = 1.0f - t;
    const F inverse = L::divide(L::splat(1.0f), size * rest);
    const F c = l > 0.0f ? 1.0f - x : -x;
    const F slope = L::fma(t, size, -rest) * inverse;
    // 1 / |l| may be subnormal, which a logarithm by bits does not take: it is 2^-32 at the least, 2^64 times an inverse.
    const auto vast = size > 0x1p96f;
    const F density = vast ? inverse * 0x1p64f : rest * (rest * inverse);
    const F log_density = negative_log<F>(density, 1.0f - density).value + (vast ? L::splat(64.0f * kLog2) : L::splat(0.0f));
    const auto small = size < 3.5f;
    e = small ? L::fma(l, centred, l2 * p_of_l2) : L::fma(l, c, -log_density);
    g[0] = small ? L::fma(l, q_of_l2, centred) : c + L::from_bits(L::bits(slope) ^ (L::bits(l) & 0x80000000u));
  }
};

template <class F>
struct Laplace {  // r, s (log scale)
  static constexpr int kParams = 2;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    const Exponential<F> rate = exponential<F>(-p[1]);
    const F difference = p[0] - x;
    const F distance = rate.times(absolute<F>(difference));
    const F slope = rate.value();
    e = (distance + beside<F>(p[1], distance)) + kLog2;
    // The product passes a NaN on, and a tie's 0 with it.
    g[0] = difference > 0.0f ? slope : (difference < 0.0f ? -slope : rate.times(difference));
    g[1] = 1.0f - distance;
  }
};

// Of a = nu / 2, as polynomials in 1 / (1 + a), for every nu:
// a (Gamma(a) / Gamma(a + 1/2))^2 = (1 + 1 / a) V, V to 2.6e-8, and
// 1 / nu + digamma(a) - digamma(a + 1/2) = -W / (a (1 + a)), W to 1.2e-7, of the order of 1 / nu^2 when nu is large.
template <class F>
struct StudentT {  // r, s, nu
  static constexpr int kParams = 3;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    using L = Lane<F>;
    const F one = L::splat(1.0f);
    // From 2^126 on the Gaussian's limit is reached to the last digit, and 1 / nu would lose digits.
    const F in_domain = p[2] < 0.0f ? L::splat(kNaN) : p[2];
    const F nu = in_domain > 0x1p126f ? L::splat(0x1p126f) : in_domain;
    const auto tiny = nu < 0x1p-64f;  // 1 / nu might overflow: it is taken 2^64 times smaller
    const F lift = tiny ? L::splat(0x1p64f) : one;
    const F inverse = L::divide(one, nu * lift);
    const F inverse_lifted = inverse > kLargest ? L::splat(kLargest) : inverse;
    const F inverse_any = inverse_lifted * lift;
    const F inverse_nu = inverse_any > kLargest ? L::splat(kLargest) : inverse_any;
    const Exponential<F> root = exponential<F>(p[1] * -0.5f);
    const F difference = p[0] - x;
    const F scaled = root.times(difference);
    // z = u / nu, q = 1 / (1 + z), y = z q and log1p(z) = -log q. Where z is huge, q = nu / u to 2^-80, and log1p(z) + s is
    // twice the logarithm of |r - x| / sqrt(nu), which neither over- nor underflows when |r - x| is brought nearer to 1.
    const F z = scaled * scaled * inverse_lifted * lift;
    const auto huge = z > 0x1p80f;
    const F distance = absolute<F>(difference);
    const auto far = distance > 1.0f;
    const F nearer = distance * (far ? L::splat(0x1p-60f) : L::splat(0x1p48f));
    const F q = L::divide(huge ? L::sqrt(nu) : one, huge ? nearer : z + 1.0f);
    const F y = huge ? one : z * q;
    const NegativeLog<F> single = negative_log<F>(q, y, huge);
    const F one_log = single.value + (far ? L::splat(60.0f * kLog2) : L::splat(-48.0f * kLog2));
    const F two_logs = distance > kLargest ? distance : one_log + one_log;
    const F logarithm = huge ? two_logs : single.value;
    const F remainder = huge ? (two_logs - p[1]) - 1.0f : single.remainder;

    const F inverse_a = inverse_nu + inverse_nu;
    const F t = L::divide(one, L::fma(nu, L::splat(0.5f), one));
    const F v = polynomial<F>(t, 0.00077175495f, -0.0029862346f, 0.0018887243f, 0.014221223f, 0.023124604f, 0.03129167f,
        -0.75000185f, 1.0f);
    const F w = polynomial<F>(t, 0.02339122f, -0.07038504f, 0.106549636f, -0.066679694f, 0.037536256f, 0.03091132f,
        0.07939809f, 0.10927516f, 0.12500301f, 0.124999985f);
    const F of_constant = L::fma(inverse_lifted + inverse_lifted, v, tiny ? L::splat(0.0f) : v);
    const F level_of_constant = tiny ? L::splat(kHalfLog2Pi + 32.0f * kLog2) : L::splat(kHalfLog2Pi);
    const F constant = log_positive<F>(of_constant) * 0.5f + level_of_constant;
    // Of log1p(z) + s, where z is huge, (nu + 1) / 2 less nu s / 2: both might be infinite, log1p(z) is not.
    const F level = L::fma(huge ? logarithm : p[1], L::splat(0.5f), constant);
    const F value = huge ? L::fma(nu * 0.5f, two_logs - p[1], level) : L::fma((nu + 1.0f) * 0.5f, logarithm, level);
    const F near = root.times((inverse_nu + 1.0f) * (scaled * q));
    // In the limit of nu the Gaussian's own terms: z may still be anything.
    const auto gaussian = in_domain > 0x1p126f;
    F limit, slopes[2];
    GaussianLearned<F>::terms(p, x, limit, slopes);
    e = gaussian ? limit : (nu == 0.0f ? absolute<F>(inverse) + (y - y) : value);
    g[0] = gaussian ? slopes[0] : (huge ? L::divide(nu + 1.0f, difference) : near);
    const F of_s = ((huge ? L::splat(0.0f) : q) - nu * y) * 0.5f;
    g[1] = gaussian ? slopes[1] : of_s;
    const F of_nu = (remainder - L::fma(y, inverse_nu, w * inverse_a * t)) * 0.5f;
    g[2] = gaussian ? (limit == limit ? L::splat(0.0f) : limit) : of_nu;
  }
};

template <class F>
struct Poisson {  // a (log rate)
  static constexpr int kParams = 1;
  static constexpr bool kSparse = true;
  static FE_HD void zero(const F* p, F& e, F* g) {
    e = exp<F>(p[0]);
    g[0] = e;
  }
  // With d = a - log x: e = x (e^d - 1 - d) + lgamma(x + 1) - x log x + x, whose terms do not cancel: the plain form
  // loses 1 of 10 at x = 1e6. d is kept to an error of 5e-9 through exact differences.
  static FE_HD void counts(const F* p, F x, F& e, F* g) {
    using L = Lane<F>;
    const F in_domain = ((x < 0.0f) | (x > kLargest)) ? L::splat(kNaN) : p[0];
    const F rate = exp<F>(in_domain);
    const F a = in_domain > 1e9f ? L::splat(1e9f) : in_domain;  // where the rate is infinite, x a is not
    const F one = L::splat(1.0f);
    const auto fraction = x < 1.0f;
    const F k = fraction ? one : x;
    const LogParts<F> log_k = log_parts<F>(k, L::splat(0.0f));
    const F reduced = L::fma(log_k.n, L::splat(-kLog2High), a);
    const F difference = reduced - log_k.f;
    const F back = difference - reduced;
    const F lost = (reduced - (difference - back)) - (log_k.f + back);
    const F d = difference + (lost + L::fma(log_k.n, L::splat(-kLog2Low), log_k.tail));
    const F remainder = expm1_remainder_near_zero<F>(d);
    const auto near = absolute<F>(d) < 1.0f;
    // Fused, because an infinite rate less an infinite product would be NaN.
    const F deviance = near ? k * remainder : L::fma(-k, (a < -1e9f ? a : d) + 1.0f, rate);
    const F correction = stirling_lgamma<F>(L::divide(one, k));
    const F whole = deviance + (L::fma(log_k.value(), L::splat(0.5f), L::splat(kHalfLog2Pi)) + correction);
    e = fraction ? L::fma(-x, a, rate + lgamma1p_unit<F>(x)) : whole;
    g[0] = fraction ? rate - x : (near ? k * (d + remainder) : rate - x);
  }
};

template <class F>
struct NegativeBinomial {  // mu, th
  static constexpr int kParams = 2;
  static constexpr bool kSparse = true;
  static FE_HD void zero(const F* p, F& e, F* g) {
    using L = Lane<F>;
    const F m = p[0] + p[1];
    if (!L::all((p[0] >= 0.0f) & (p[1] >= 0x1p-60f) & (m <= 0x1p60f))) return zero_anywhere(p, e, g);
    const F inverse = L::divide(L::splat(1.0f), m);
    const F share = p[1] * inverse;
    const NegativeLog<F> log1p_ratio = negative_log<F>(share, p[0] * inverse);  // of mu / th
    e = p[1] * log1p_ratio.value;
    g[0] = share;
    g[1] = log1p_ratio.remainder;
  }
  // The same with all that mu and th may be: subnormal, 0, infinite (the limits), far apart, and negative, which is NaN.
  static FE_HD void zero_anywhere(const F* p, F& e, F* g) {
    using L = Lane<F>;
    const F one = L::splat(1.0f), nothing = L::splat(0.0f);
    const F th = p[1];
    const F mu = ((p[0] < 0.0f) | (th < 0.0f)) ? L::splat(kNaN) : p[0];
    const F m = mu + th;
    const F lift = m < 0x1p-64f ? L::splat(0x1p64f) : (m > 0x1p126f ? L::splat(0x1p-10f) : one);
    const F lifted_th = th * lift, lifted_mu = mu * lift;
    const F inverse = L::divide(one, lifted_mu + lifted_th);
    const F share = lifted_th * inverse, y = lifted_mu * inverse;
    // Below the share of an ordinary element, so that its bits are the same here.
    const auto small = share < 0x1p-124f;
    const NegativeLog<F> near = negative_log<F>(small ? one : share, y);
    const F raised = log<F>(m) - log<F>(th);  // of mu / th > 2^123
    const F value = th == 0.0f ? m * 0.0f : th * (small ? raised : near.value);
    // The limit of th is reached where mu / th, which may be 0 in float32, is below an ulp; an ordinary m is not above 2^60.
    const auto nearly = (m > 0x1p60f) & (y < 0x1p-30f);
    const auto boundless = (mu == kInf) & (th > 0.0f), poisson = ((th == kInf) | nearly) & (mu >= 0.0f);
    e = (boundless | poisson) ? mu : value;
    g[0] = boundless ? nothing : (poisson ? one : share);
    g[1] = boundless ? mu : (th == kInf ? mu * 0.0f : (small ? raised - y : near.remainder));
  }
  // The saddle-point form (Loader 2000): with n = x + th, M = mu + th, u = (x - mu) / mu, v = u th / n and
  // w = (mu - x) / n, where 1 + v = (x / mu) (M / n) and 1 + w = M / n,
  //   e = x log1p(v) + th log1p(w) + log(2 pi x n / th) / 2 + d(x) + d(th) - d(n)
  // for th >= 1, d being Stirling's correction. Around v = w = 0 the first two terms are v (x - mu) less the remainders
  // f - log1p(f), which do not cancel, nor does an error of v count. For th < 1 the series of lgamma(th) gives way to
  // lgamma(1 + th) - log th.
  static FE_HD void counts(const F* p, F x, F& e, F* g) {
    const auto ordinary = (p[0] >= 0x1p-100f) & (p[1] >= 0x1p-100f) & (p[0] <= 0x1p100f) & (p[1] <= 0x1p100f) & (x >= 0.0f) &
                          (x <= 0x1p60f);
    if (Lane<F>::all(ordinary)) return counts<false>(p, x, e, g);
    counts<true>(p, x, e, g);
  }
  // Where not `kAnywhere`, all that chooses between an ordinary element and an extreme falls away: a quarter of the time.
  template <bool kAnywhere>
  static FE_HD void counts(const F* p, F x, F& e, F* g) {
    using L = Lane<F>;
    const auto choose = [](auto where, F special, F common) { return kAnywhere ? (where ? special : common) : common; };
    const F one = L::splat(1.0f), nothing = L::splat(0.0f);
    const F th = p[1];
    const auto outside = (p[0] < 0.0f) | (th < 0.0f) | (x < 0.0f) | (x > kLargest);
    const F mu = choose(outside, L::splat(kNaN), p[0]);
    // x / mu might overflow: it is taken 2^64 times smaller. Where th is small too, both are 2^64 times larger.
    const auto tiny = mu < 0x1p-100f;
    const auto both = tiny & (th < 0x1p-40f);
    const auto poisson = th == kInf;
    const F lift = choose(both, L::splat(0x1p64f), one);
    const F lifted_th = kAnywhere ? th * lift : th;
    const F m = kAnywhere ? (mu + th) * lift : mu + th;
    const F inverse_m = L::divide(one, m);
    const auto fraction = x < 1.0f;  // there through x + 1, for Stirling's series
    const F k = fraction ? x + 1.0f : x;
    const F inverse_k = L::divide(one, k);
    const F n = k + th;
    const F inverse_n = L::divide(one, n);
    const F share_n = choose(poisson, one, lifted_th * inverse_n), share_m = choose(poisson, one, lifted_th * inverse_m);
    const F scaled_mu = choose(tiny, mu * 0x1p64f, mu);
    const F inverse_mu = L::divide(one, scaled_mu);
    const F excess = k - mu;
    const F v = (excess * inverse_mu) * share_n;
    const F w = -excess * inverse_n;
    const F ratio = choose(poisson, one, m * inverse_n);
    const auto far_v = tiny & (lift == 1.0f);
    LogParts<F> log_v = log1p_parts<F>(choose(far_v, -one, v), (k * inverse_mu) * ratio);
    log_v.n = choose(far_v, log_v.n + 64.0f, log_v.n);
    LogParts<F> log_w = log1p_parts<F>(w, ratio);
    log_w.n = choose(both, log_w.n - 64.0f, log_w.n);
    const F log1p_w = log_w.value();
    // |f - 5/8| < 11/8 is -3/4 < f < 2.
    const auto v_near = absolute<F>(v - 0.625f) < 1.375f, w_near = absolute<F>(w - 0.625f) < 1.375f;
    const F rest_w = log_w.below(w);
    const F near = L::fma(v, excess, -L::fma(k, log_v.below(v), choose(poisson, nothing, th) * rest_w));
    const F far = L::fma(k, log_v.value(), choose(poisson, -excess, th * log1p_w));
    const F deviance = v_near ? (w_near ? near : far) : far;

    const auto large = th >= 1.0f;
    const F inverse_th = L::divide(one, lifted_th);
    const F t = large ? inverse_th : one;
    const F unit = large ? one : th;
    const F log_th = kAnywhere ? log<F>(unit) : log_parts<F>(unit, nothing).value();
    const F lgamma_large = stirling_lgamma<F>(t) + kHalfLog2Pi;
    const F lgamma_small = lgamma1p_unit<F>(unit) + L::fma(-(unit + 1.0f), log_th, unit);
    // From x + 1 back to x: log(x + th) / ((x + 1) (1 + th / mu)), inside the other logarithm.
    const F back = fraction ? choose(poisson, one, (x + th) * inverse_m) * (scaled_mu * inverse_k) : one;
    const F n_over_th = choose(poisson, one, n * t);
    const F root = choose(k > 0x1p60f, L::sqrt(k) * L::sqrt(n_over_th), L::sqrt(k * n_over_th));
    LogParts<F> log_root = log_parts<F>(root * back, nothing);
    log_root.n = choose(fraction & far_v, log_root.n - 64.0f, log_root.n);
    const F logarithm = log_root.value();
    const F stirling = stirling_lgamma<F>(inverse_k) - stirling_lgamma<F>(inverse_n);
    const F value = deviance + (logarithm + (stirling + (large ? lgamma_large : lgamma_small)));
    const auto boundless = (mu == kInf) & (th >= 0.0f) & (x >= 0.0f);
    e = choose(boundless, mu, choose(mu == 0.0f, absolute<F>(inverse_mu) + inverse_n * 0.0f, value));
    const F slope = (mu - x) * inverse_mu * share_m;
    g[0] = choose(boundless, nothing, choose(tiny, slope * 0x1p64f, slope));

    // log1p(w) - w / (1 + w)
    const F back_w = w * (n * inverse_m);
    const F growth = w_near ? L::fma(w, back_w, -rest_w) : log1p_w - back_w;
    const F series_n = stirling_digamma<F>(inverse_n);
    const F large_th = L::fma(k * inverse_n, inverse_th * -0.5f, series_n - stirling_digamma<F>(t));
    const F small_th = (digamma1p_unit<F>(unit) - log_th) + (L::fma(inverse_n, L::splat(0.5f), series_n) - inverse_th);
    const F shift = fraction ? L::divide((mu - x) * inverse_m, x + th) : nothing;
    const F bend = growth + ((large ? large_th : small_th) + shift);
    const F steep = (shift - back_w - inverse_th) * lift;
    const F of_th = choose(both, steep, choose(poisson, mu * 0.0f, bend));
    g[1] = choose(boundless, mu, choose(th == 0.0f, -absolute<F>(inverse_th) + (w - w), of_th));
  }
};

template <class F>
struct ZeroInflatedNegativeBinomial {  // mu, th, pi (gate logit)
  static constexpr int kParams = 3;
  static constexpr bool kSparse = true;
  // P(0) = 1 - s (1 - e^q) with s = sigmoid(-pi), e^q the plain P(0). Below 1/2 it is written as
  // e^max(q, pi) (1 + e^-|q - pi|) / (1 + e^pi), which does not underflow.
  static FE_HD void zero(const F* p, F& e, F* g) {
    using L = Lane<F>;
    F plain, slope[2];
    NegativeBinomial<F>::zero(p, plain, slope);
    const F pi = p[2], q = -plain;
    const F drop_near = q + expm1_remainder_near_zero<F>(q);
    const F drop = q > -1.0f ? drop_near : exp_negative<F>(q) - 1.0f;  // e^q - 1
    const F t_pi = exp_negative<F>(-absolute<F>(pi));
    const F inverse_pi = L::divide(L::splat(1.0f), t_pi + 1.0f);
    const F open = pi > 0.0f ? t_pi * inverse_pi : inverse_pi;
    const F z = q - pi;
    const F t_z = exp_negative<F>(-absolute<F>(z));
    const F inverse_z = L::divide(L::splat(1.0f), t_z + 1.0f);
    const F small_z = t_z * inverse_z;
    const auto plain_likely = z > 0.0f;

    const F change = open * drop;  // P(0) - 1
    const auto likely = change > -0.5f;
    const F half_ratio = (t_z + 1.0f) * (inverse_pi * 0.5f);
    const F value = negative_log<F>(likely ? change + 1.0f : half_ratio, likely ? -change : 1.0f - half_ratio).value;
    e = likely ? value : value - ((q > pi ? q : pi) + kLog2);
    const F weight = plain_likely ? inverse_z : small_z;
    g[0] = weight * slope[0];
    g[1] = weight == 0.0f ? weight : weight * slope[1];  // where that grows without bound, the weight falls faster
    g[2] = change * (plain_likely ? small_z : inverse_z);
  }
  static FE_HD void counts(const F* p, F x, F& e, F* g) {
    const Logistic<F> gate = logistic<F>(p[2]);
    F plain;
    NegativeBinomial<F>::counts(p, x, plain, g);
    e = gate.softplus + plain;
    g[2] = plain == plain ? gate.sigmoid : plain;  // NaN outside the domain
  }
};

// KL(N(m, e^v) || N(0, 1))
template <class F>
struct NormalKl {  // m, v
  static constexpr int kParams = 2;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F, F& e, F* g) {
    using L = Lane<F>;
    const HalfExpm1<F> variance = half_expm1<F>(p[1]);
    e = L::fma(p[0] * 0.5f, p[0], variance.remainder);
    g[0] = p[0];
    g[1] = variance.value;
  }
};

// KL(N(m, e^v) || N(p, e^w))
template <class F>
struct NormalPriorKl {  // m, v, p, w
  static constexpr int kParams = 4;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F, F& e, F* g) {
    using L = Lane<F>;
    // v - w = d + low exactly: half an ulp of d = 80 is 4e-6 of e^d.
    const F d = p[1] - p[3];
    const F back = d - p[1];
    const F any_low = (p[1] - (d - back)) - (p[3] + back);
    const F low = absolute<F>(d) < kInf ? any_low : L::splat(0.0f);
    const HalfExpm1<F> ratio = half_expm1<F>(d);
    const Exponential<F> root = exponential<F>(p[3] * -0.5f);
    const F scaled = root.times(p[0] - p[2]);
    const F half_scaled = scaled * 0.5f;
    const F bounded = ratio.value > 3e38f ? L::splat(3e38f) : ratio.value;  // 0 * infinity is NaN
    const F growth = L::fma(low, bounded + 0.5f, ratio.value);
    e = L::fma(half_scaled, scaled, L::fma(low, bounded, ratio.remainder));
    g[0] = root.times(scaled);
    g[1] = growth;
    g[2] = -g[0];
    g[3] = L::fma(-half_scaled, scaled, -growth);
  }
};

// How many parameters the likelihood of this code has; 0 where there is no such code.
constexpr int64_t parameters_of(int64_t likelihood) {
  switch (static_cast<Likelihood>(likelihood)) {
    case Likelihood::kMse: return Mse<float>::kParams;
    case Likelihood::kGaussian: return Gaussian<float>::kParams;
    case Likelihood::kGaussianLearned: return GaussianLearned<float>::kParams;
    case Likelihood::kBernoulli: return Bernoulli<float>::kParams;
    case Likelihood::kContinuousBernoulli: return ContinuousBernoulli<float>::kParams;
    case Likelihood::kCategorical: return 1;
    case Likelihood::kLaplace: return Laplace<float>::kParams;
    case Likelihood::kStudentT: return StudentT<float>::kParams;
    case Likelihood::kPoisson: return Poisson<float>::kParams;
    case Likelihood::kNegativeBinomial: return NegativeBinomial<float>::kParams;
    case Likelihood::kZeroInflatedNegativeBinomial: return ZeroInflatedNegativeBinomial<float>::kParams;
  }
  return 0;
}

}  // namespace fe::inline FE_ISA
