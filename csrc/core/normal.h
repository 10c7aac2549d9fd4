// Uniform and normal numbers from Philox words. The polynomials are ours, so that no libm enters and the bits agree on
// every device (see core/lane.h).
#pragma once

#include "core/philox.h"

namespace fe::inline FE_ISA {

// (0, 1]: the smallest value is 2^-33, so |normal| <= sqrt(-2 log 2^-33) = 6.77.
template <class F, class U = typename Lane<F>::Unsigned>
FE_HD F uniform(U word) {
  using L = Lane<F>;
  return L::fma(L::from_unsigned(word), L::splat(0x1p-32f), L::splat(0x1p-33f));
}

// -2 log x for x in (0, 1], normal: x = 2^e (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1), and
// -2 log(1 + f) = -2 f + f^2 (1 + f P(f)) with P minimax to a relative error of 3.4e-8. Exactly 0 at x = 1, never below.
template <class F>
FE_HD F minus_two_log(F x) {
  using L = Lane<F>;
  using U = typename L::Unsigned;
  using I = typename L::Signed;
  const U bits = L::bits(x);
  const I exponent = (I)(bits - 0x3f3504f3u) >> 23;
  const F f = L::from_bits(bits - ((U)exponent << 23)) - 1.0f;
  F poly = L::splat(-0.17835739254951477f);
  poly = L::fma(poly, f, L::splat(0.2870040237903595f));
  poly = L::fma(poly, f, L::splat(-0.29753923416137695f));
  poly = L::fma(poly, f, L::splat(0.3313126862049103f));
  poly = L::fma(poly, f, L::splat(-0.3993079662322998f));
  poly = L::fma(poly, f, L::splat(0.5000349283218384f));
  poly = L::fma(poly, f, L::splat(-0.6666771769523621f));
  const F two_log = L::fma(L::from_signed(exponent), L::splat(1.3862943649291992f), f + f);
  return L::fma(L::fma(poly, f, L::splat(1.0f)), f * f, -two_log);
}

// sin and cos of the angle 2 pi word / 2^32: the quadrant is in the top bits (half a quadrant on, so that it is centred),
// the rest, signed, is an angle in [-pi/4, pi/4), where the minimax polynomials err by 1.3e-8 and 3.9e-8.
template <class F, class U = typename Lane<F>::Unsigned>
FE_HD void sincos_of_word(U word, F& sine, F& cosine) {
  using L = Lane<F>;
  using I = typename L::Signed;
  const U rotated = word + 0x20000000u;
  const F x = L::from_signed((I)((rotated & 0x3fffffffu) - 0x20000000u)) * 1.46291807926716e-9f;  // pi / 2^31
  const F x2 = x * x;
  F s = L::splat(-0.0001951729936990887f);
  s = L::fma(s, x2, L::splat(0.008332177996635437f));
  s = L::fma(s, x2, L::splat(-0.16666655242443085f));
  s = L::fma(s * x2, x, x);
  F c = L::splat(-0.0013591854367405176f);
  c = L::fma(c, x2, L::splat(0.041655778884887695f));
  c = L::fma(c, x2, L::splat(-0.4999988377094269f));
  c = L::fma(c, x2, L::splat(1.0f));
  const auto odd = (rotated & 0x40000000u) != 0u;
  sine = L::from_bits(L::bits(odd ? c : s) ^ (rotated & 0x80000000u));
  cosine = L::from_bits(L::bits(odd ? s : c) ^ ((rotated + 0x40000000u) & 0x80000000u));
}

// Box and Muller (1958): two words make two independent normals.
template <class F, class U = typename Lane<F>::Unsigned>
FE_HD void box_muller(U a, U b, F& first, F& second) {
  const F radius = Lane<F>::sqrt(minus_two_log<F>(uniform<F>(a)));
  F s, c;
  sincos_of_word<F>(b, s, c);
  first = radius * c;
  second = radius * s;
}

// The normals of elements 4 block .. 4 block + 3.
template <class F>
struct Normals {
  F x, y, z, w;
};

template <class F, class U = typename Lane<F>::Unsigned>
FE_HD Normals<F> normals_of(const Words<U>& words) {
  Normals<F> n;
  box_muller<F>(words.x, words.y, n.x, n.y);
  box_muller<F>(words.z, words.w, n.z, n.w);
  return n;
}

template <class F, class U = typename Lane<F>::Unsigned>
FE_HD Normals<F> noise_normals(U low, uint32_t high, const NoiseKey& key) {
  return normals_of<F>(noise_words(low, high, key));
}

}  // namespace fe::inline FE_ISA
