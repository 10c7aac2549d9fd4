// Plain stochastic gradient Langevin dynamics (Welling & Teh 2011) on one element: no state.
#pragma once

#include "formulas/step.h"

namespace fe {

struct SgldSettings : StepSettings {};

template <class S>
struct SgldCoefficients {
  S lr, noise_scale, weight_decay, prior_precision, grad_scale;
  bool noisy, maximize, decay, prior, scaled;

  FE_HD bool extras() const { return maximize || decay || prior || scaled; }
};

}  // namespace fe

namespace fe::inline FE_ISA {

template <class S>
FE_HD SgldCoefficients<S> sgld_coefficients(const SgldSettings& settings, double grad_scale) {
  SgldCoefficients<S> c{};
  c.lr = static_cast<S>(settings.lr);
  c.noisy = settings.noisy();
  c.noise_scale = static_cast<S>(Lane<double>::sqrt(2.0 * settings.temperature * settings.lr));
  c.maximize = settings.has(kMaximize);
  c.decay = settings.weight_decay != 0.0;
  c.weight_decay = static_cast<S>(settings.weight_decay);
  c.prior = settings.prior_precision != 0.0;
  c.prior_precision = static_cast<S>(settings.prior_precision);
  c.scaled = grad_scale != 1.0;
  c.grad_scale = static_cast<S>(grad_scale);
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

// As LangevinAdam of formulas/langevin_adam.h.
struct Sgld : StepTraits {
  static FE_HD uint32_t operands(const SgldSettings&) { return 1u << kParam | 1u << kGrad; }
  template <class S>
  static FE_HD SgldCoefficients<S> coefficients(const SgldSettings& settings, double grad_scale, uint32_t, double) {
    return sgld_coefficients<S>(settings, grad_scale);
  }
  static FE_HD double noise_unit(const SgldSettings&) { return 0.0; }
};

}  // namespace fe::inline FE_ISA
