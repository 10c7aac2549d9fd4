// Radial kernels of Stein's method, k = phi(u) with u = t / h, t the squared distance: docs/svgd.md. Beside the value
// two derivatives, signed and scaled so that they are not negative: first = -2 phi'(u), second = 4 phi''(u). Each takes u
// times a constant of its own, kScale, which costs nothing in the factor that makes t a u.
#pragma once

#include "core/functions.h"

namespace fe {

// Throws std::invalid_argument. Whoever calls a kernel by its code has checked it before, so that this never happens.
[[noreturn]] void no_such_kernel(int64_t code);

}  // namespace fe

namespace fe::inline FE_ISA {

struct RadialParams {
  float beta, c;  // of the inverse multiquadric
};

template <class F>
struct Radial {
  F value, first, second;
};

// u is infinite between distinct points where h = 0; every kernel is then 0, to the last derivative.
inline constexpr float kFarthest = 3.0e38f;

// What a kernel is where it does not say otherwise.
struct RadialKernel {
  static constexpr bool kFirstIsValue = false;      // first = 2 value, so that one weight serves both
  static constexpr bool kNeedsDifferences = false;  // of the root of t: of inner products half the digits would be left
  static constexpr bool kHasDiscrepancy = true;     // a finite one
  static constexpr float kScale = 1.0f;
};

template <class F>
struct RbfKernel : RadialKernel {
  static constexpr const char* kName = "rbf";
  static constexpr bool kFirstIsValue = true;
  static constexpr float kScale = -1.44269504f;
  explicit FE_HD RbfKernel(const RadialParams&) {}

  FE_HD Radial<F> operator()(F scaled) const {
    const F k = exp2_negative<F>(scaled);
    return {k, k + k, k * 4.0f};
  }
};

template <class F>
struct ImqKernel : RadialKernel {
  static constexpr const char* kName = "imq";
  float beta, c2;
  explicit FE_HD ImqKernel(const RadialParams& params) : beta(params.beta), c2(params.c * params.c) {}

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

// Not differentiable where two points coincide: both derivatives are then taken as 0. The square root halves the digits
// that a distance from inner products has where points are close, and the first derivative grows without bound.
template <class F>
struct LaplaceKernel : RadialKernel {
  static constexpr const char* kName = "laplace";
  static constexpr bool kNeedsDifferences = true;
  static constexpr bool kHasDiscrepancy = false;
  explicit FE_HD LaplaceKernel(const RadialParams&) {}

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

// Twice differentiable but for coincident points, where second grows without bound and is taken as 0, as are its products
// with t and with differences, which vanish.
template <class F>
struct Matern32Kernel : RadialKernel {
  static constexpr const char* kName = "matern32";
  static constexpr bool kNeedsDifferences = true;
  static constexpr float kScale = 3.0f;
  explicit FE_HD Matern32Kernel(const RadialParams&) {}

  FE_HD Radial<F> operator()(F scaled) const {
    using L = Lane<F>;
    const F s = L::sqrt(scaled);
    const F decay = exp_negative<F>(-s);
    const F k = L::fma(s, decay, decay);
    const F second = L::divide(decay * 9.0f, s);
    return {scaled > kFarthest ? L::splat(0.0f) : k, decay * 3.0f, scaled > 0.0f ? second : L::splat(0.0f)};
  }
};

template <class... Kernels>
struct KernelList {
  static constexpr int kCount = sizeof...(Kernels);

  // body.operator()<Kernel>() for the kernel with this code; whether there is one.
  template <class Body>
  static bool visit(int64_t code, const Body& body) {
    int64_t at = 0;
    return ((at++ == code && (body.template operator()<Kernels>(), true)) || ...);
  }
};

// In the order of their codes, which is that of fekernels/_catalogue/stein.py: every pass and every check takes them from here.
template <class F>
using RadialKernels = KernelList<RbfKernel<F>, ImqKernel<F>, LaplaceKernel<F>, Matern32Kernel<F>>;

template <class F, class Body>
void with_kernel(int64_t code, const Body& body) {
  if (!RadialKernels<F>::visit(code, body)) no_such_kernel(code);
}

// The same kernel where inner products leave too few digits: for few coordinates, and for a bandwidth far below the spread of
// the points.
template <class Kernel>
struct Sharp : Kernel {
  static constexpr bool kNeedsDifferences = true;
  using Kernel::Kernel;
};

inline constexpr float kLeastBandwidth = 1.17549435e-38f;  // one below has no inverse, and counts as 0

// 1 / h, and 0 where h counts as 0: points that coincide do not repel, and all others have no weight.
FE_HD float inverse_bandwidth(float h) { return h < kLeastBandwidth ? 0.0f : 1.0f / h; }

// What makes a squared distance above 0 the kernel's argument: infinite where h counts as 0.
template <class Kernel>
FE_HD float scale_of(float h) {
  return Kernel::kScale / (h < kLeastBandwidth ? 0.0f : h);
}

}  // namespace fe::inline FE_ISA
