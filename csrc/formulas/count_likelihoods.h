// The likelihoods of counts, as formulas/likelihoods.h describes them. Each has `zero` for every element, as cheap as x = 0 is, and
// `counts` for those with x > 0; a fractional x > 0 is as good as a whole one.
#pragma once

#include "core/functions.h"

namespace fe::inline FE_ISA {

// What a likelihood is where it does not say otherwise.
struct LikelihoodTraits {
  static constexpr bool kSparse = false;       // most elements are 0: `zero` and `counts` for `terms`
  static constexpr bool kMemoryBound = false;  // on a GPU, so that its commonest dtypes have kernels of their own
  static constexpr bool kClasses = false;      // over a last dimension of classes; others are elementwise
};

template <class F>
struct Poisson : LikelihoodTraits {  // a (log rate)
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
struct NegativeBinomial : LikelihoodTraits {  // mu, th
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
    const auto fraction = x < 1.0f;  // then through x + 1, for Stirling's series
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
struct ZeroInflatedNegativeBinomial : LikelihoodTraits {  // mu, th, pi (gate logit)
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
    const SigmoidSoftplus<F> gate = logistic<F>(p[2]);
    F plain;
    NegativeBinomial<F>::counts(p, x, plain, g);
    e = gate.softplus + plain;
    g[2] = plain == plain ? gate.sigmoid : plain;  // NaN outside the domain
  }
};

}  // namespace fe::inline FE_ISA
