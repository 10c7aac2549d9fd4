// The natural-gradient step of a mean-field Gaussian on one element: IVON (Shen et al. 2024, arXiv:2402.17641, algorithm 1),
// at a temperature that scales the variance.
#pragma once

#include "formulas/langevin_adam.h"

namespace fe {

struct VariationalAdamSettings : StepSettings {
  double ess, beta1, beta2, clip_radius;
  double lr_scale;  // of lr: hess_init + weight_decay, or 1
  double samples;   // 0: a gradient and the normal of its draw; else grad and anchor have the sums of so many
};

template <class S>
struct VariationalAdamCoefficients {
  S one_minus_beta1, one_minus_beta2, inverse_bias1, step_size, weight_decay, precision, clip_radius;
  S grad_scale;  // gradients, and their products, are divided by it: samples times GradScaler's
  bool curved, scaled, summed;

  // As VariationalDrawCoefficients of formulas/variational_draw.h; `summed` has a formula of its own.
  FE_HD bool plain() const { return curved && !scaled; }
  FE_HD VariationalAdamCoefficients as_plain() const {
    VariationalAdamCoefficients c = *this;
    c.curved = true;
    c.scaled = false;
    return c;
  }
};

}  // namespace fe

namespace fe::inline FE_ISA {

// `product`: the gradient times the draw's normal. h + weight_decay stays positive: the update is half a square completed
// (Lin et al. 2020), at least half of what it was.
template <class F, class S = typename Lane<F>::Scalar>
FE_HD void variational_adam(F& mean, F grad, F& exp_avg, F& hessian, F product, const VariationalAdamCoefficients<S>& c) {
  using L = Lane<F>;
  if (c.scaled) {
    grad = L::divide(grad, L::splat(c.grad_scale));
    product = L::divide(product, L::splat(c.grad_scale));
  }
  exp_avg = flushed<kAboveOfMomentum>(L::fma(L::splat(c.one_minus_beta1), grad - exp_avg, exp_avg));
  if (c.curved) {
    const F precision = hessian + c.weight_decay;
    const F curvature = product * L::sqrt(precision * c.precision);
    const F move = (curvature - hessian) * c.one_minus_beta2;
    hessian = hessian + L::fma(L::divide(move, precision) * 0.5f, move, move);
  }
  const F drift = L::fma(L::splat(c.weight_decay), mean, exp_avg * c.inverse_bias1);
  F move = L::divide(drift, hessian + c.weight_decay);
  const F radius = L::splat(c.clip_radius);
  move = move > radius ? radius : move;
  move = move < -radius ? -radius : move;
  mean = L::fma(L::splat(-c.step_size), move, mean);
}

// As DrawFormula of formulas/variational_draw.h. After one draw since the last step:
struct StepFormula {
  static constexpr uint32_t kStates = 1u << kExpAvg | 1u << kExpAvgSq;
  static constexpr uint32_t kLoaded = 1u << kParam | 1u << kGrad | kStates, kSaved = 1u << kParam | kStates;
  static constexpr bool kNoise = true, kFollows = false;

  template <class F, class C>
  static FE_HD void update(F* x, F normal, const C& c) {
    variational_adam(x[kParam], x[kGrad], x[kExpAvg], x[kExpAvgSq], x[kGrad] * normal, c);
  }
};

// The same where the parameter, of 16 bits, is the rounding of the mean.
struct RoundedStepFormula {
  static constexpr uint32_t kStates = StepFormula::kStates | 1u << kMaxExpAvgSq;
  static constexpr uint32_t kLoaded = 1u << kGrad | kStates, kSaved = 1u << kParam | kStates;
  static constexpr bool kNoise = true, kFollows = false;

  template <class F, class C>
  static FE_HD void update(F* x, F normal, const C& c) {
    variational_adam(x[kMaxExpAvgSq], x[kGrad], x[kExpAvg], x[kExpAvgSq], x[kGrad] * normal, c);
    x[kParam] = x[kMaxExpAvgSq];
  }
};

// By the sums of several draws.
struct SummedStepFormula {
  static constexpr uint32_t kLoaded = StepFormula::kLoaded | 1u << kAnchor, kSaved = StepFormula::kSaved;
  static constexpr bool kNoise = false, kFollows = false;

  template <class F, class C>
  static FE_HD void update(F* x, F, const C& c) {
    variational_adam(x[kParam], x[kGrad], x[kExpAvg], x[kExpAvgSq], x[kAnchor], c);
  }
};

// As LangevinAdam of formulas/langevin_adam.h. max_exp_avg_sq: the mean, of which a 16-bit parameter is the rounding; others
// are the mean. anchor: the sum of products. The row's noise_unit has the number of the draw, and does not change.
struct VariationalAdam : StepTraits {
  static constexpr Purpose kNoise = kWeightSample;
  static constexpr bool kWritesUnit = false;

  static FE_HD uint32_t noise_step(uint32_t, double draw) { return static_cast<uint32_t>(draw); }
  static FE_HD bool numbered(const StepSettings& settings) { return settings.temperature > 0.0; }
  static FE_HD uint32_t operands(const VariationalAdamSettings& settings) {
    return 1u << kParam | 1u << kGrad | 1u << kExpAvg | 1u << kExpAvgSq | (settings.samples != 0.0 ? 1u << kAnchor : 0u);
  }
  template <class S>
  static FE_HD VariationalAdamCoefficients<S> coefficients(const VariationalAdamSettings& settings, double grad_scale,
                                                           uint32_t t, double) {
    VariationalAdamCoefficients<S> c{};
    c.one_minus_beta1 = static_cast<S>(1.0 - settings.beta1);
    c.one_minus_beta2 = static_cast<S>(1.0 - settings.beta2);
    c.inverse_bias1 = static_cast<S>(1.0 / (1.0 - integer_power(settings.beta1, t)));
    c.step_size = static_cast<S>(settings.lr * settings.lr_scale);
    c.weight_decay = static_cast<S>(settings.weight_decay);
    c.curved = settings.temperature > 0.0;
    c.precision = static_cast<S>(c.curved ? settings.ess / settings.temperature : 0.0);
    c.clip_radius = static_cast<S>(settings.clip_radius);
    c.summed = settings.samples != 0.0;
    const double scale = c.summed ? grad_scale * settings.samples : grad_scale;
    c.scaled = scale != 1.0;
    c.grad_scale = static_cast<S>(scale);
    return c;
  }
  static FE_HD double noise_unit(const VariationalAdamSettings&) { return 0.0; }
};

}  // namespace fe::inline FE_ISA
