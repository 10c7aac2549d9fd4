// Elementary and special functions in float32 over lane types. The polynomials are ours (minimax by Lawson's iteration,
// coefficients rounded one after the other), so that no libm enters and the bits agree on every device: core/lane.h.
// Errors given are those of the polynomials; rounding adds an ulp or two. No branch depends on data.
#pragma once

#include "core/lane.h"

namespace fe::inline FE_ISA {

inline constexpr float kLog2 = 0.693147182f;
inline constexpr float kLog2High = 0.693145752f;  // 15 bits, so that its products with an exponent are exact
inline constexpr float kLog2Low = 1.42860677e-06f;
inline constexpr float kHalfLog2Pi = 0.918938533f;
inline constexpr float kLargest = 0x1.fffffep127f;
inline constexpr float kInf = __builtin_inff();
inline constexpr float kNaN = __builtin_nanf("");

template <class F>
FE_HD F absolute(F x) {
  return Lane<F>::from_bits(Lane<F>::bits(x) & 0x7fffffffu);
}

template <class F, class... Coefficients>
FE_HD F polynomial_pairs(F x, F x2, F value, float odd, float even, Coefficients... lower) {
  using L = Lane<F>;
  value = L::fma(value, x2, L::fma(L::splat(odd), x, L::splat(even)));
  if constexpr (sizeof...(lower) > 0) return polynomial_pairs<F>(x, x2, value, lower...);
  return value;
}

// The coefficient of the highest power comes first. Two at a time, for the price of x^2: the chain of Horner's rule is
// twice as long, and much of an element's cost is waiting.
template <class F, class... Coefficients>
FE_HD F polynomial(F x, float highest, float next, Coefficients... lower) {
  using L = Lane<F>;
  if constexpr (sizeof...(lower) % 2 == 0) {
    const F value = L::fma(L::splat(highest), x, L::splat(next));
    return polynomial_pairs<F>(x, x * x, value, lower...);
  } else {
    return polynomial_pairs<F>(x, x * x, L::splat(highest), next, lower...);
  }
}

// x = n log 2 + r with |r| <= log(2) / 2; e^r - 1 - r = r^2 Q(r) to 3.1e-9 of e^r. The magic number leaves n in the low
// bits of the sum.
template <class F>
struct ExpParts {
  F exp_r;
  typename Lane<F>::Signed n;
};

template <class F>
FE_HD ExpParts<F> exp_parts(F x) {
  using L = Lane<F>;
  const F shifted = L::fma(x, L::splat(1.44269504f), L::splat(12582912.0f));
  const F n = shifted - 12582912.0f;
  const F r = L::fma(n, L::splat(-kLog2Low), L::fma(n, L::splat(-kLog2High), x));
  const F q = polynomial<F>(r, 0.0013820136f, 0.008368686f, 0.041668274f, 0.16666521f, 0.49999994f);
  return {L::fma(r * r, q, r) + 1.0f, (typename L::Signed)(L::bits(shifted) - 0x4b400000u)};
}

template <class F>
FE_HD F power_of_two(typename Lane<F>::Signed n) {  // -126 <= n <= 127; 0 at n = -127
  using U = typename Lane<F>::Unsigned;
  return Lane<F>::from_bits(((U)n + 127u) << 23);
}

// e^x as a product, for factors: a e^x is right where e^x alone would leave the range, and 0 where a is 0. |x| is held
// below 176, where e^|x| = 1e76.
template <class F>
struct ExponentialFactors {
  F exp_r, low, high;
  FE_HD F times(F a) const { return a * exp_r * low * high; }
  FE_HD F value() const { return exp_r * low * high; }
};

template <class F>
FE_HD ExponentialFactors<F> exponential(F x) {
  using L = Lane<F>;
  const F above = x < -176.0f ? L::splat(-176.0f) : x;
  const ExpParts<F> parts = exp_parts<F>(above > 176.0f ? L::splat(176.0f) : above);
  const auto half = parts.n >> 1;
  return {parts.exp_r, power_of_two<F>(half), power_of_two<F>(parts.n - half)};
}

template <class F>
FE_HD F exp(F x) {
  return exponential<F>(x).value();
}

// For x <= 0; below -87.33, where the result would be subnormal, 0.
template <class F>
FE_HD F exp_negative(F x) {
  using L = Lane<F>;
  const ExpParts<F> parts = exp_parts<F>(x);
  const F value = parts.exp_r * power_of_two<F>(parts.n);
  return x < -87.33f ? L::splat(0.0f) : value;
}

// 2^x for x <= 0; below -126, where the result would be subnormal, 0. 2^f - 1 for |f| <= 1/2 to 2e-9. A third cheaper than
// e^x, which has to take its remainder in two parts.
template <class F>
FE_HD F exp2_negative(F x) {
  using L = Lane<F>;
  using U = typename L::Unsigned;
  const F shifted = x + 12582912.0f;
  const F f = x - (shifted - 12582912.0f);
  const F q = polynomial<F>(f, 0.00015353362f, 0.0013398875f, 0.009618437f, 0.055503324f, 0.24022648f, 0.6931472f);
  const F value = L::fma(f, q, L::splat(1.0f));
  const F scaled = L::from_bits(L::bits(value) + (L::bits(shifted) << 23));  // the magic number's low bits hold n
  return x < -126.0f ? L::splat(0.0f) : scaled;
}

// e^d - 1 - d for |d| < 1, to 5.3e-9 of it.
template <class F>
FE_HD F expm1_remainder_near_zero(F d) {
  const F q = polynomial<F>(d, 2.7630542e-06f, 2.5325757e-05f, 0.00019845687f, 0.0013885936f, 0.008333301f,
      0.041666713f, 0.16666667f, 0.5f);
  return d * d * q;
}

// (e^d - 1) / 2 and (e^d - 1 - d) / 2, both to the last digits for every d. Halves, as a KL has them: e^d itself
// overflows first.
template <class F>
struct HalfExpm1 {
  F value, remainder;
};

template <class F>
FE_HD HalfExpm1<F> half_expm1(F d) {
  const F near = expm1_remainder_near_zero<F>(d) * 0.5f;
  const F far = exponential<F>(d).times(Lane<F>::splat(0.5f)) - 0.5f;
  const F half = (d > kLargest ? Lane<F>::splat(kLargest) : d) * 0.5f;  // infinity - infinity is NaN
  const auto near_zero = absolute<F>(d) < 1.0f;
  return {near_zero ? half + near : far, near_zero ? near : far - half};
}

// log(1 + t) for t in [0, 1], to 3.3e-8 of it.
template <class F>
FE_HD F log1p_unit(F t) {
  const F p = polynomial<F>(t, 0.0053654225f, -0.0300683f, 0.07920883f, -0.13754188f, 0.19153848f, -0.24857217f,
      0.3332133f, -0.49999648f);
  return Lane<F>::fma(t * t, p, t);
}

// sigmoid and softplus from one exponential.
template <class F>
struct SigmoidSoftplus {
  F sigmoid, complement, softplus;  // 1 / (1 + e^-l), 1 / (1 + e^l), log(1 + e^l)
};

template <class F>
FE_HD SigmoidSoftplus<F> logistic(F l) {
  using L = Lane<F>;
  const F t = exp_negative<F>(-absolute<F>(l));
  const F large = L::divide(L::splat(1.0f), t + 1.0f);
  const F small = t * large;
  const auto positive = l > 0.0f;
  return {positive ? large : small, positive ? small : large, (positive ? l : L::splat(0.0f)) + log1p_unit<F>(t)};
}

// -log p and -log p - (1 - p) for p in (0, 1] with y = 1 - p given, so that nothing is lost where p is near 1. Both are
// >= 0. p = 2^n (1 - f) with f in [0, 1/2); -log(1 - f) - f = f^2 P(f) to 4.2e-8 of it. p is normal; NaN comes with a y
// that is NaN. Where `any`, p may be above 1 and y is not looked at.
template <class F>
struct NegativeLog {
  F value, remainder;
};

template <class F, class Mask>
FE_HD NegativeLog<F> negative_log(F p, F y, Mask any) {
  using L = Lane<F>;
  using U = typename L::Unsigned;
  using I = typename L::Signed;
  const U bits = L::bits(p);
  const I n = (I)(bits - 0x3f000001u) >> 23;
  const auto scaled = (p <= 0.5f) | any;  // false for NaN, which y hands on
  const F f = scaled ? 1.0f - L::from_bits(bits - ((U)n << 23)) : y;
  const F q = polynomial<F>(f, 1.294697f, -1.5030594f, 1.0970887f, -0.1730198f, 0.22429298f, 0.1943126f, 0.25026745f,
      0.33332908f, 0.5f);
  const F tail = f * f * q;
  const F value = L::fma(L::from_signed(n), L::splat(-kLog2), f + tail);
  return {value, scaled ? value - y : tail};
}

template <class F>
FE_HD NegativeLog<F> negative_log(F p, F y) {
  return negative_log<F>(p, y, p <= 0.5f);
}

// log(x + low) = n log 2 + f - tail for x > 0, normal, |low| <= ulp(x): f in [sqrt(1/2) - 1, sqrt(2) - 1) and
// tail = f - log(1 + f) = f^2 P(f) to 6e-8 of it. lost is what rounding took from f.
template <class F>
struct LogParts {
  F n, f, tail, lost;

  FE_HD F value() const {
    using L = Lane<F>;
    return L::fma(n, L::splat(kLog2High), L::fma(n, L::splat(kLog2Low), f - tail));
  }
  // v - log(x + low) where v is near: the difference of v and f is exact in two parts.
  FE_HD F below(F v) const {
    using L = Lane<F>;
    const F difference = v - f;
    const F back = difference - v;
    const F low = (v - (difference - back)) - (f + back);
    const F high = L::fma(n, L::splat(-kLog2High), difference);
    return high + (L::fma(n, L::splat(-kLog2Low), low - lost) + tail);
  }
};

template <class F>
FE_HD LogParts<F> log_parts(F x, F low) {
  using L = Lane<F>;
  using U = typename L::Unsigned;
  using I = typename L::Signed;
  const U bits = L::bits(x);
  const U exponent = (U)((I)(bits - 0x3f3504f3u) >> 23) << 23;
  const F leading = L::from_bits(bits - exponent) - 1.0f;
  const F scaled = (low * 0.5f) * L::from_bits(0x40000000u - exponent);  // 2^(1 - n): n = 128 has no 2^-n
  const F f = leading + scaled;
  const F q = polynomial<F>(f, 0.07580942f, -0.12705529f, 0.13154551f, -0.14208244f, 0.16624007f, -0.20001063f,
      0.25000873f, -0.3333333f, 0.49999997f);
  return {L::from_signed((I)exponent >> 23), f, f * f * q, scaled - (f - leading)};
}

// For x > 0, normal, or infinity or NaN.
template <class F>
FE_HD F log_positive(F x) {
  const F value = log_parts<F>(x, Lane<F>::splat(0.0f)).value();
  return x < kInf ? value : x;
}

// log2 x for x > 0, normal: what log_positive takes, less what e and the edges of the range cost.
template <class F>
FE_HD F log2_normal(F x) {
  using L = Lane<F>;
  using U = typename L::Unsigned;
  using I = typename L::Signed;
  const U bits = L::bits(x);
  const U exponent = (U)((I)(bits - 0x3f3504f3u) >> 23) << 23;
  const F f = L::from_bits(bits - exponent) - 1.0f;
  const F q = polynomial<F>(f, 0.07580942f, -0.12705529f, 0.13154551f, -0.14208244f, 0.16624007f, -0.20001063f,
      0.25000873f, -0.3333333f, 0.49999997f);
  return L::fma(L::fma(-(f * f), q, f), L::splat(1.44269504f), L::from_signed((I)exponent >> 23));
}

// IEEE's for every x: subnormal numbers are scaled first; -infinity at 0, NaN below.
template <class F>
FE_HD F log(F x) {
  using L = Lane<F>;
  const auto subnormal = x < 0x1p-126f;
  LogParts<F> parts = log_parts<F>(subnormal ? x * 0x1p24f : x, L::splat(0.0f));
  parts.n = subnormal ? parts.n - 24.0f : parts.n;
  const F edge = x == 0.0f ? L::splat(-kInf) : (x < 0.0f ? L::splat(kNaN) : x);
  return ((x > 0.0f) & (x < kInf)) ? parts.value() : edge;
}

// log(1 + v) where v is given beside the ratio 1 + v, which is the better known of the two when v is below -3/4.
template <class F>
FE_HD LogParts<F> log1p_parts(F v, F ratio) {
  using L = Lane<F>;
  const F sum = v + 1.0f;
  const F lost = v > 1.0f ? 1.0f - (sum - v) : v - (sum - 1.0f);
  const auto far = v < -0.75f;
  return log_parts<F>(far ? ratio : sum, far ? L::splat(0.0f) : lost);
}

// Stirling's corrections for z >= 1, given t = 1 / z:
// lgamma(z + 1) = z log z - z + log(2 pi z) / 2 + d(t), to 1.7e-8;
// digamma(z) = log z - t / 2 - h(t), to 4.5e-7 of h.
template <class F>
FE_HD F stirling_lgamma(F t) {
  const F q = polynomial<F>(t, -0.00015859712f, 0.00041221562f, 0.00036679066f, -0.0029123991f, 2.1191578e-05f,
      0.08333225f);
  return t * q;
}

template <class F>
FE_HD F stirling_digamma(F t) {
  const F q = polynomial<F>(t, 0.0008632962f, -0.003508227f, 0.0049403505f, -6.523505e-05f, -0.0083500445f,
      2.2636445e-06f, 0.0833333f);
  return t * t * q;
}

// For z in [0, 1]: lgamma(1 + z) to 5.1e-9, digamma(1 + z) to 5.3e-8.
template <class F>
FE_HD F lgamma1p_unit(F z) {
  const F q = polynomial<F>(z, -0.00397641f, 0.024160154f, -0.06914408f, 0.12976721f, -0.19309828f, 0.26732078f,
      -0.40025285f, 0.8224385f, -0.577215f);
  return z * q;
}

template <class F>
FE_HD F digamma1p_unit(F z) {
  const F q = polynomial<F>(z, 0.02299398f, -0.13841909f, 0.3852506f, -0.67926276f, 0.8957928f, -1.0076114f, 1.0780616f,
      -1.2017297f, 1.6449239f, -0.5772156f);
  return q;
}

}  // namespace fe::inline FE_ISA
