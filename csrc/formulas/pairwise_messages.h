// What arrives at one end of an edge of a pairwise graph, over lanes of edges: sums or maxima over the states of the other.
#pragma once

#include <utility>

#include "core/functions.h"

namespace fe::inline FE_ISA {

// Sums of products below this may have lost terms to underflow, and are taken again among logarithms. Factors and tables
// are scaled to at most 1 and what underflows is below 2e-38, so that above it at most 1e-8 times the states is lost.
inline constexpr float kLeastSum = 1e-30f;

// Sums are of logarithms to base 2, which cost a fifth less than natural ones. Maxima keep the caller's, so that sums of whole
// numbers stay exact and ties are ties.
inline constexpr float kLog2E = 1.44269504f;

template <class F>
FE_HD F larger(F a, F b) {
  return a > b ? a : b;
}

// body(0) .. body(n - 1), written out where n = N is known: states then live in registers, half the time of a loop that gcc
// does not unroll at -O2 (and -O3 takes five times as long to compile). 0: any n.
#define FE_INLINED __attribute__((always_inline))

template <int N, class Body>
FE_HD void each(int n, Body body) {
  if constexpr (N > 0) {
    [&]<int... Index>(std::integer_sequence<int, Index...>) FE_INLINED {
      (body(Index), ...);
    }(std::make_integer_sequence<int, N>{});
  } else {
    for (int index = 0; index < n; ++index) body(index);
  }
}

template <int N, class F>
FE_HD F largest(int n, const F* x) {
  // Where no state is possible: -infinity less -infinity would be NaN.
  F most = Lane<F>::splat(-kLargest);
  each<N>(n, [&](int s) FE_INLINED { most = larger<F>(most, x[s]); });
  return most;
}

// Logarithms to base 2, which become relative to their largest, to factors of at most 1. Returns the largest.
template <int N, class F>
FE_HD F to_factors(int n, F* logarithms, F* factors) {
  const F most = largest<N, F>(n, logarithms);
  each<N>(n, [&](int s) FE_INLINED {
    logarithms[s] = logarithms[s] - most;
    factors[s] = exp2_negative<F>(logarithms[s]);
  });
  return most;
}

template <int N, class F>
FE_HD void normalise(int n, F* message) {
  const F most = largest<N, F>(n, message);
  each<N>(n, [&](int s) FE_INLINED { message[s] = message[s] - most; });
}

// log2 sum_x 2^h_x e^(table_x - peak) for one target state, where the sum of products is too small to be trusted.
inline float log2_sum(int n, const float* h, const float* table, int64_t stride, float peak) {
  float most = -kLargest, sum = 0.0f;
  const auto term = [&](int x) { return h[x] + (table[x * stride] - peak) * kLog2E; };
  for (int x = 0; x < n; ++x) most = larger(most, term(x));
  for (int x = 0; x < n; ++x) sum += exp2_negative<float>(term(x) - most);
  return most + log<float>(sum) * kLog2E;
}

// The part of the old message that stays. -infinity cannot be averaged: the new one counts then.
template <class F>
FE_HD F damped(F fresh, F old, float damping) {
  using L = Lane<F>;
  const F mixed = L::fma(L::splat(damping), old - fresh, fresh);
  return ((fresh < -kLargest) | (old < -kLargest)) ? fresh : mixed;
}

template <class F>
FE_HD F distance(F a, F b) {
  return a == b ? Lane<F>::splat(0.0f) : absolute<F>(a - b);  // two that are -infinity are the same
}

}  // namespace fe::inline FE_ISA
