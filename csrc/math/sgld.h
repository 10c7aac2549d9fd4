// Plain stochastic gradient Langevin dynamics (Welling & Teh 2011) on one element: no state.
#pragma once

#include "math/lane.h"
#include "table.h"

namespace fe {

struct SgldGroup {
  double lr, temperature, weight_decay, prior_precision, grad_scale;
  int64_t flags;
};

template <class S>
struct SgldCoefficients {
  S lr, noise_scale, weight_decay, prior_precision, grad_scale;
  bool noisy, maximize, decay, prior, scaled;

  FE_HD bool extras() const { return maximize || decay || prior || scaled; }
};

}  // namespace fe

namespace fe::inline FE_ISA {

template <class S>
FE_HD SgldCoefficients<S> sgld_coefficients(const SgldGroup& group) {
  SgldCoefficients<S> c{};
  c.lr = static_cast<S>(group.lr);
  c.noisy = group.temperature > 0.0 && group.lr > 0.0;
  c.noise_scale = static_cast<S>(Lane<double>::sqrt(2.0 * group.temperature * group.lr));
  c.maximize = group.flags & kMaximize;
  c.decay = group.weight_decay != 0.0;
  c.weight_decay = static_cast<S>(group.weight_decay);
  c.prior = group.prior_precision != 0.0;
  c.prior_precision = static_cast<S>(group.prior_precision);
  c.scaled = group.grad_scale != 1.0;
  c.grad_scale = static_cast<S>(group.grad_scale);
  return c;
}

template <bool kNoisy, bool kExtras, class F, class S = typename Lane<F>::Scalar>
FE_HD void sgld(F& param, F grad, F anchor, F normal, const SgldCoefficients<S>& c) {
  using L = Lane<F>;
  if (kExtras) {
    if (c.scaled) grad = L::divide(grad, L::splat(c.grad_scale));
    if (c.maximize) grad = -grad;
    if (c.decay) grad = L::fma(L::splat(c.weight_decay), param, grad);
    if (c.prior) grad = L::fma(L::splat(c.prior_precision), param - anchor, grad);
  }
  param = L::fma(L::splat(-c.lr), grad, param);
  if (kNoisy) param = L::fma(L::splat(c.noise_scale), normal, param);
}

}  // namespace fe::inline FE_ISA
