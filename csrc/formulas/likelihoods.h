// The likelihoods: e = -log p(x | p) per element, with its gradients in the parameters p. Formulas in docs/likelihoods.md; s and v
// are log-variances (Laplace: a log scale). What `Likelihoods` lists has its formula here, in formulas/count_likelihoods.h (where
// most elements are 0), or, over classes, in a kernel of its own.
//
// Squares of a difference are taken after scaling: (r - x)^2 e^-s = ((r - x) e^(-s/2))^2 overflows only with its value.
#pragma once

#include <type_traits>

#include "formulas/count_likelihoods.h"
#include "formulas/free_energy_codes.h"
#include "core/functions.h"

namespace fe::inline FE_ISA {

// s beside a term u >= 0 that grows like e^-s: at s = -infinity u has the last word, unless it is 0.
template <class F>
FE_HD F beside(F s, F u) {
  return ((s < -kLargest) & (u != 0.0f)) ? Lane<F>::splat(0.0f) : s;
}

template <class F>
struct Mse : LikelihoodTraits {  // r
  static constexpr int kParams = 1;
  static constexpr bool kMemoryBound = true;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    const F difference = p[0] - x;
    e = difference * difference;
    g[0] = difference + difference;
  }
};

template <class F>
struct Gaussian : LikelihoodTraits {  // r; s = 0
  static constexpr int kParams = 1;
  static constexpr bool kMemoryBound = true;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    const F difference = p[0] - x;
    e = difference * 0.5f * difference + kHalfLog2Pi;
    g[0] = difference;
  }
};

template <class F>
struct GaussianLearned : LikelihoodTraits {  // r, s
  static constexpr int kParams = 2;
  static constexpr bool kMemoryBound = true;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    using L = Lane<F>;
    const ExponentialFactors<F> root = exponential<F>(p[1] * -0.5f);
    const F scaled = root.times(p[0] - x);
    const F half_scaled = scaled * 0.5f, half = L::splat(0.5f);
    e = L::fma(half_scaled, scaled, L::fma(beside<F>(p[1], scaled), half, L::splat(kHalfLog2Pi)));
    g[0] = root.times(scaled);
    g[1] = L::fma(-half_scaled, scaled, half);
  }
};

template <class F>
struct Bernoulli : LikelihoodTraits {  // l
  static constexpr int kParams = 1;
  static constexpr bool kMemoryBound = true;
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
struct ContinuousBernoulli : LikelihoodTraits {  // l
  static constexpr int kParams = 1;
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
struct Laplace : LikelihoodTraits {  // r, s (log scale)
  static constexpr int kParams = 2;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    const ExponentialFactors<F> rate = exponential<F>(-p[1]);
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
struct StudentT : LikelihoodTraits {  // r, s, nu
  static constexpr int kParams = 3;
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
    const ExponentialFactors<F> root = exponential<F>(p[1] * -0.5f);
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

// With v = (x - mu) / mu, D = v - log1p(v), the deviance x / mu - 1 - log(x / mu), and lgamma(k) - k log k + k = A(k), which is
// (log 2 pi - log k) / 2 + d(1 / k) for k >= 1, d being Stirling's correction, and lgamma(1 + k) - (1 + k) log k + k below:
//   e = k D + log x + A(k).
// No error of v counts near v = 0. Where x < mu / 4 it is also k v + (k - 1) L + log mu + A(k), L = log(mu / x): that form is
// taken where log mu is the smaller logarithm, and for k >= 1, where k L and log x would cancel.
template <class F>
struct Gamma : LikelihoodTraits {  // mu, k (shape)
  static constexpr int kParams = 2;
  static FE_HD void terms(const F* p, F x, F& e, F* g) {
    using L = Lane<F>;
    const F one = L::splat(1.0f), nothing = L::splat(0.0f);
    const auto outside = (p[0] < 0.0f) | (p[1] < 0.0f) | (x < 0.0f) | (x > kLargest);
    const F mu = outside ? L::splat(kNaN) : absolute<F>(p[0]), k = absolute<F>(p[1]);  // of -0 too
    const F v = L::divide(x - mu, mu);
    // x / mu without underflow, times a power of 2^100.
    const auto small_x = x < 0x1p-40f, large_mu = mu > 0x1p60f;
    const F ratio = L::divide(small_x ? x * 0x1p100f : x, large_mu ? mu * 0x1p-100f : mu);
    LogParts<F> parts = log1p_parts<F>(v, ratio);
    const auto far = v < -0.75f;
    const F lifts = (small_x ? L::splat(100.0f) : nothing) + (large_mu ? L::splat(100.0f) : nothing);
    parts.n = far ? parts.n - lifts : parts.n;
    const F finite = v > kLargest ? nothing : -parts.value();  // beside an infinite v nothing counts
    const F minus_log = x == 0.0f ? L::splat(kInf) : finite;
    // |v - 5/8| < 11/8 is -3/4 < v < 2.
    const F deviance = absolute<F>(v - 0.625f) < 1.375f ? parts.below(v) : v + minus_log;

    const auto large = k >= 1.0f, none = k == 0.0f, certain = k == kInf;
    const auto boundless = (mu == kInf) & (k >= 0.0f) & (x >= 0.0f);
    const F inverse_k = L::divide(one, k);
    const F t = large ? inverse_k : one;
    const F unit = large ? one : k;
    const F log_k = log<F>(none ? one : k);
    const F of_large = L::fma(log_k, L::splat(-0.5f), stirling_lgamma<F>(t) + kHalfLog2Pi);
    const F of_small = L::fma(-(unit + 1.0f), log_k, lgamma1p_unit<F>(unit) + unit);
    const auto by_mu = far & (large | (x * mu <= 1.0f));
    const F of_x = k == 1.0f ? nothing : minus_log;  // which may be infinite
    const F pull = by_mu ? L::fma(k - 1.0f, of_x, k * v) : k * deviance;
    const F value = (pull + log<F>(by_mu ? mu : x)) + (large ? of_large : of_small);
    // A shape of 0 leaves no density anywhere, one of infinity none but at the mean.
    const F at_zero = (x + mu) * 0.0f + kInf;
    const F at_infinity = v == 0.0f ? L::splat(-kInf) : k * deviance;
    e = boundless ? mu : (none ? at_zero : (certain ? at_infinity : value));
    g[0] = boundless ? nothing : L::divide(v == 0.0f ? v : -(k * v), mu);
    const F psi_large = L::fma(t, L::splat(-0.5f), -stirling_digamma<F>(t));  // digamma(k) - log k
    const F psi_small = (digamma1p_unit<F>(unit) - log_k) - inverse_k;
    g[1] = boundless ? mu : deviance + (large ? psi_large : psi_small);
  }
};

// Logits of a last dimension of classes: kernels of its own have the formula.
template <class F>
struct Categorical : LikelihoodTraits {
  static constexpr int kParams = 1;
  static constexpr bool kClasses = true;
};

template <template <class> class... Terms>
struct LikelihoodList {
  // body.operator()<Term>() for the likelihood with this code; whether there is one.
  template <class Body>
  static constexpr bool visit(int64_t code, const Body& body) {
    int64_t at = 0;
    return ((at++ == code && (body.template operator()<Terms>(), true)) || ...);
  }
  template <template <class> class Term>
  static constexpr int64_t code_of() {
    int64_t at = -1;
    ((++at, std::is_same_v<Terms<float>, Term<float>>) || ...);
    return at;
  }
  static constexpr int most_params() {
    int most = 0;
    ((most = Terms<float>::kParams > most ? Terms<float>::kParams : most), ...);
    return most;
  }
};

// In the order of their codes, which is that of fekernels/_catalogue/free_energy.py: every pass and every check takes them from
// here.
using Likelihoods = LikelihoodList<Mse, Gaussian, GaussianLearned, Bernoulli, ContinuousBernoulli, Categorical, Laplace, StudentT,
                                   Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial, Gamma>;

// A call's operands are written by their index, without a check.
static_assert(Likelihoods::most_params() <= kMaxParams, "kMaxParams of free_energy_codes.h is too small for a likelihood");

inline constexpr int64_t kCategorical = Likelihoods::code_of<Categorical>();

// How many parameters the likelihood of this code has; 0 where there is no such code.
constexpr int64_t parameters_of(int64_t likelihood) {
  int64_t count = 0;
  Likelihoods::visit(likelihood, [&]<template <class> class Term>() { count = Term<float>::kParams; });
  return count;
}

// Its own row sum: what is left to do when the energies of a row are made.
template <class F>
struct Value {
  static constexpr int kParams = 1;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F, F& e, F* g) {
    e = p[0];
    g[0] = F{};
  }
};

}  // namespace fe::inline FE_ISA
