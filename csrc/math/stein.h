// Radial kernels of Stein's method, k = phi(u) with u = t / h, t the squared distance: docs/svgd.md. Beside the value
// two derivatives, signed and scaled so that they are not negative: first = -2 phi'(u), second = 4 phi''(u). Each takes u
// times a constant of its own, kScale, which costs nothing in the factor that makes t a u.
#pragma once

#include "math/functions.h"

namespace fe::inline FE_ISA {

enum SteinKernel { kRbf, kImq, kLaplace };

struct SteinKernelParams {
  float beta, c;  // of the inverse multiquadric
};

template <class F>
struct Radial {
  F value, first, second;
};

// u is infinite between distinct points where h = 0; every kernel is 0 there, to the last derivative.
inline constexpr float kFarthest = 3.0e38f;

template <class F>
struct RbfKernel {
  static constexpr bool kFirstIsValue = true;  // first = 2 value, so that one weight serves both
  static constexpr bool kNeedsDifferences = false;
  static constexpr float kScale = -1.44269504f;
  explicit FE_HD RbfKernel(const SteinKernelParams&) {}

  FE_HD Radial<F> operator()(F scaled) const {
    const F k = exp2_negative<F>(scaled);
    return {k, k + k, k * 4.0f};
  }
};

template <class F>
struct ImqKernel {
  static constexpr bool kFirstIsValue = false;
  static constexpr bool kNeedsDifferences = false;
  static constexpr float kScale = 1.0f;
  float beta, c2;
  explicit FE_HD ImqKernel(const SteinKernelParams& params) : beta(params.beta), c2(params.c * params.c) {}

  FE_HD Radial<F> operator()(F u) const {
    using L = Lane<F>;
    const F base = u + c2;
    const F inverse = L::divide(L::splat(1.0f), base);
    const F power = exp<F>(log_positive<F>(base) * beta);
    const F k = u > kFarthest ? L::splat(0.0f) : power;
    const F first = k * inverse * (-2.0f * beta);
    return {k, first, first * inverse * (2.0f - 2.0f * beta)};
  }
};

// Not differentiable where two points coincide: both derivatives are taken as 0 there. The square root halves the digits
// that a distance from inner products has where points are close, and the first derivative grows without bound.
template <class F>
struct LaplaceKernel {
  static constexpr bool kFirstIsValue = false;
  static constexpr bool kNeedsDifferences = true;
  static constexpr float kScale = 1.0f;
  explicit FE_HD LaplaceKernel(const SteinKernelParams&) {}

  FE_HD Radial<F> operator()(F u) const {
    using L = Lane<F>;
    const F s = L::sqrt(u);
    const F k = exp_negative<F>(-s);
    const F inverse = L::divide(L::splat(1.0f), s);
    const F first = k * inverse;
    const F second = first * inverse * (inverse + 1.0f);
    const auto apart = u > 0.0f;
    return {k, apart ? first : L::splat(0.0f), u > 1.0e-24f ? second : L::splat(0.0f)};
  }
};

// The same kernel where inner products leave too few digits: for few coordinates, and for a bandwidth far below the spread of
// the points.
template <class Kernel>
struct Sharp : Kernel {
  static constexpr bool kNeedsDifferences = true;
  using Kernel::Kernel;
};

inline constexpr float kLeastBandwidth = 1.17549435e-38f;  // one below has no inverse, and counts as 0

// 1 / h, and 0 where h counts as 0: points that coincide do not repel, and all others do not meet.
FE_HD float inverse_bandwidth(float h) { return h < kLeastBandwidth ? 0.0f : 1.0f / h; }

}  // namespace fe::inline FE_ISA
