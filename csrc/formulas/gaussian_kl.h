// The elementwise KL of two Gaussians with its gradients in means and log-variances; formulas in docs/free_energy.md.
#pragma once

#include "core/functions.h"

namespace fe::inline FE_ISA {

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
    const ExponentialFactors<F> root = exponential<F>(p[3] * -0.5f);
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

}  // namespace fe::inline FE_ISA
