// The unified Langevin-Adam step on one element, and the coefficients that one step of one parameter shares.
// Adam: Kingma & Ba 2015; AMSGrad: Reddi et al. 2018; decoupled decay: Loshchilov & Hutter 2019; preconditioned noise:
// Li et al. 2016 (pSGLD); noise in the momentum: preconditioned SGHMC (Chen, Fox & Guestrin 2014).
#pragma once

#include "formulas/step.h"

namespace fe {

// kAny, as a template argument, leaves the choice to the coefficients.
enum class Noise : int { kMomentum = 0, kPreconditioned = 1, kIsotropic = 2, kNone = 3, kAny = 4 };

// Of the rarer terms, those that a loop is made for: none, a frozen preconditioner alone, or what the coefficients say.
enum class RareTerms : int { kPlain = 0, kFrozen = 1, kAll = 2 };

struct LangevinAdamSettings : StepSettings {
  double beta1, beta2, eps;
  double noise_code;

  FE_HD Noise noise() const { return static_cast<Noise>(static_cast<int>(noise_code)); }
  // What the preconditioner is made of. Frozen, it is only read, and nothing but the maximum where there is one.
  FE_HD Operand second_moment() const { return has(kFrozen) && has(kAmsgrad) ? kMaxExpAvgSq : kExpAvgSq; }
};

template <class S>
struct LangevinAdamCoefficients {
  S one_minus_beta1, beta2, one_minus_beta2, inverse_root_bias2, eps, step_size;
  S noise_scale;     // of the normal number, where `noise` puts it
  S momentum_scale;  // of exp_avg, whose old noise is in another unit than this step's: sqrt(previous unit / unit)
  S weight_decay, decay_factor, prior_precision, smallest_denominator, grad_scale;
  Noise noise;
  Operand second_moment;
  bool maximize, amsgrad, coupled_decay, decoupled_decay, prior, scaled, rescaled, frozen;  // amsgrad: not where frozen

  // The loop that serves.
  FE_HD RareTerms rare_terms() const {
    if (maximize || amsgrad || coupled_decay || decoupled_decay || prior || scaled || rescaled) return RareTerms::kAll;
    return frozen ? RareTerms::kFrozen : RareTerms::kPlain;
  }
};

}  // namespace fe

namespace fe::inline FE_ISA {

// base^exponent by repeated squaring: libm's pow differs in its last bit between devices.
FE_HD double integer_power(double base, uint32_t exponent) {
  double result = 1.0;
  for (; exponent; exponent >>= 1) {
    if (exponent & 1u) result *= base;
    base *= base;
  }
  return result;
}

// c_t: bias correction divides m, and with it the noises it remembers, by 1 - beta1^t. Scaled by c_t, each noise moves
// the parameter by its due in all, whenever it was drawn. 1 / c_t = sum_j beta1^(t j) (1 - beta1) / (1 - beta1^(j+1)).
FE_HD double momentum_noise_start(double beta1, double beta1_power_t) {
  double sum = 0.0, weight = 1.0, power = beta1;
  while (weight > 1e-10) {
    sum += weight * (1.0 - beta1) / (1.0 - power);
    weight *= beta1_power_t;
    power *= beta1;
  }
  return 1.0 / sum;
}

// q: noise put into exp_avg at each step has the variance 2 T D / q in it.
FE_HD double momentum_noise_unit(double lr, double beta1) { return lr * (1.0 + beta1) / (1.0 - beta1); }

// The same, 0 where this step puts none in.
FE_HD double momentum_noise_unit(double lr, double temperature, double beta1, Noise noise) {
  const bool noisy = noise == Noise::kMomentum && temperature > 0.0 && lr > 0.0;
  return noisy ? momentum_noise_unit(lr, beta1) : 0.0;
}

// Gradients are divided by `grad_scale`, 1 without a GradScaler. `t` is the 1-based step, `previous_unit` the noise unit
// of the parameter's last step that moved, 0 for none. At lr = 0 nothing moves and no noise is made.
template <class S>
FE_HD LangevinAdamCoefficients<S> langevin_adam_coefficients(const LangevinAdamSettings& settings, double grad_scale,
                                                             uint32_t t, double previous_unit) {
  const double h = settings.lr;
  const bool noisy = settings.noisy();
  const bool corrected = settings.has(kBiasCorrection), frozen = settings.has(kFrozen);
  const double beta1_t = corrected ? integer_power(settings.beta1, t) : 0.0;
  const double beta2_t = corrected && !frozen ? integer_power(settings.beta2, t) : 0.0;

  LangevinAdamCoefficients<S> c{};
  c.noise = noisy ? settings.noise() : Noise::kNone;
  c.one_minus_beta1 = static_cast<S>(1.0 - settings.beta1);
  c.beta2 = static_cast<S>(settings.beta2);
  c.one_minus_beta2 = static_cast<S>(1.0 - settings.beta2);
  c.inverse_root_bias2 = static_cast<S>(1.0 / Lane<double>::sqrt(1.0 - beta2_t));
  c.eps = static_cast<S>(settings.eps);
  c.step_size = static_cast<S>(h / (1.0 - beta1_t));

  if (c.noise == Noise::kMomentum) {
    const double start = corrected ? momentum_noise_start(settings.beta1, beta1_t) : 1.0;
    c.noise_scale = static_cast<S>((1.0 - settings.beta1) * start * Lane<double>::sqrt(2.0 * settings.temperature / h));
  } else if (noisy) {
    c.noise_scale = static_cast<S>(Lane<double>::sqrt(2.0 * settings.temperature * h));
  }
  // Noise of hot steps fades in cold ones, but until then it moves the parameter by what this lr and beta1 make of it.
  const double unit = momentum_noise_unit(h, settings.beta1);
  c.rescaled = settings.noise() == Noise::kMomentum && h > 0.0 && previous_unit > 0.0 && previous_unit != unit;
  c.momentum_scale = static_cast<S>(c.rescaled ? Lane<double>::sqrt(previous_unit / unit) : 1.0);

  c.second_moment = settings.second_moment();
  c.frozen = frozen;
  c.maximize = settings.has(kMaximize);
  c.amsgrad = settings.has(kAmsgrad) && !frozen;
  c.coupled_decay = settings.weight_decay != 0.0 && !settings.has(kDecoupled);
  c.decoupled_decay = settings.weight_decay != 0.0 && settings.has(kDecoupled);
  c.weight_decay = static_cast<S>(settings.weight_decay);
  c.decay_factor = static_cast<S>(1.0 - h * settings.weight_decay);
  c.prior = settings.prior_precision != 0.0;
  c.prior_precision = static_cast<S>(settings.prior_precision);
  c.smallest_denominator = static_cast<S>(h * settings.prior_precision);
  c.scaled = grad_scale != 1.0;
  c.grad_scale = static_cast<S>(grad_scale);
  return c;
}

// One element. `largest` (amsgrad) and `anchor` (prior) are read only where the coefficients say so; `normal` unless
// kNoise is kNone. `exp_avg_sq` is `coefficients.second_moment`, and stays as it is where frozen. kTerms is
// `coefficients.rare_terms()`, or one that has more.
template <Noise kNoise, RareTerms kTerms, class F, class S = typename Lane<F>::Scalar>
FE_HD void langevin_adam(F& param, F grad, F& exp_avg, F& exp_avg_sq, F& largest, F anchor, F normal,
                         const LangevinAdamCoefficients<S>& c) {
  using L = Lane<F>;
  constexpr bool kExtras = kTerms == RareTerms::kAll;
  const Noise noise = kNoise == Noise::kAny ? c.noise : kNoise;
  F drift = grad;
  if (kExtras) {
    if (c.scaled) grad = L::divide(grad, L::splat(c.grad_scale));
    if (c.maximize) grad = -grad;
    if (c.coupled_decay) grad = L::fma(L::splat(c.weight_decay), param, grad);
    if (c.decoupled_decay) param = param * c.decay_factor;
    drift = grad;
    if (c.prior) drift = L::fma(L::splat(c.prior_precision), param - anchor, grad);
    if (c.rescaled) exp_avg = exp_avg * c.momentum_scale;
  }
  exp_avg = L::fma(L::splat(c.one_minus_beta1), drift - exp_avg, exp_avg);
  if (noise != Noise::kMomentum) exp_avg = flushed<kAboveOfMomentum>(exp_avg);
  if (kTerms == RareTerms::kPlain || (kExtras && !c.frozen)) {
    exp_avg_sq = flushed<0>(L::fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2));
  }
  F second_moment = exp_avg_sq;
  if (kExtras && c.amsgrad) second_moment = largest = exp_avg_sq <= largest ? largest : exp_avg_sq;

  F denominator = L::fma(L::sqrt(second_moment), L::splat(c.inverse_root_bias2), L::splat(c.eps));
  // A weight whose gradient is always 0 has D = eps, and the prior's own step h * prior_precision / D would diverge.
  if (kExtras && c.prior) {
    const F smallest = L::splat(c.smallest_denominator);
    denominator = denominator < smallest ? smallest : denominator;
  }

  if (noise == Noise::kMomentum) exp_avg = L::fma(L::sqrt(denominator) * c.noise_scale, normal, exp_avg);
  F move = exp_avg * c.step_size;
  if (noise == Noise::kPreconditioned) move = L::fma(L::sqrt(denominator) * -c.noise_scale, normal, move);
  param = param - L::divide(move, denominator);
  if (noise == Noise::kIsotropic) param = L::fma(L::splat(c.noise_scale), normal, param);
}

// What formulas/optimizers.def names: the operation for whoever goes through a table of any operation's rows.
struct LangevinAdam : StepTraits {
  static FE_HD uint32_t operands(const LangevinAdamSettings& settings) {
    return 1u << kParam | 1u << kGrad | 1u << kExpAvg | 1u << settings.second_moment() |
           (settings.has(kAmsgrad) ? 1u << kMaxExpAvgSq : 0u);
  }
  template <class S>
  static FE_HD LangevinAdamCoefficients<S> coefficients(const LangevinAdamSettings& settings, double grad_scale,
                                                        uint32_t t, double previous_unit) {
    return langevin_adam_coefficients<S>(settings, grad_scale, t, previous_unit);
  }
  static FE_HD double noise_unit(const LangevinAdamSettings& settings) {
    return momentum_noise_unit(settings.lr, settings.temperature, settings.beta1, settings.noise());
  }
};

}  // namespace fe::inline FE_ISA
