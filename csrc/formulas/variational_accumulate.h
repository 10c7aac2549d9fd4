// The sums, over several draws, of a gradient and of its product with the draw's normal, on one element.
#pragma once

#include "formulas/step.h"

namespace fe {

struct VariationalAccumulateSettings : StepSettings {
  double samples;  // in the sums already; at 0 they are overwritten
};

template <class S>
struct VariationalAccumulateCoefficients {
  bool first;
};

}  // namespace fe

namespace fe::inline FE_ISA {

template <bool kFirst, class F>
FE_HD void variational_accumulate(F grad, F normal, F& sum, F& product) {
  sum = kFirst ? grad : sum + grad;
  product = kFirst ? grad * normal : Lane<F>::fma(grad, normal, product);
}

// As DrawFormula of formulas/variational_draw.h.
template <bool kFirst>
struct AccumulateFormula {
  static constexpr uint32_t kSaved = 1u << kExpAvg | 1u << kExpAvgSq, kLoaded = 1u << kGrad | (kFirst ? 0u : kSaved);
  static constexpr bool kNoise = true, kFollows = false;

  template <class F, class C>
  static FE_HD void update(F* x, F normal, const C&) {
    variational_accumulate<kFirst>(x[kGrad], normal, x[kExpAvg], x[kExpAvgSq]);
  }
};

// As LangevinAdam of formulas/langevin_adam.h. exp_avg, exp_avg_sq: the two sums. The row's noise_unit has the number of
// the draw, and neither it nor the step changes.
struct VariationalAccumulate : StepTraits {
  static constexpr Purpose kNoise = kWeightSample;
  static constexpr bool kAdvances = false, kWritesUnit = false;

  static FE_HD uint32_t noise_step(uint32_t, double draw) { return static_cast<uint32_t>(draw); }
  static FE_HD bool numbered(const StepSettings&) { return true; }
  static FE_HD uint32_t operands(const VariationalAccumulateSettings&) { return 1u << kGrad | 1u << kExpAvg | 1u << kExpAvgSq; }
  template <class S>
  static FE_HD VariationalAccumulateCoefficients<S> coefficients(const VariationalAccumulateSettings& settings, double,
                                                                 uint32_t, double) {
    return {settings.samples == 0.0};
  }
  static FE_HD double noise_unit(const VariationalAccumulateSettings&) { return 0.0; }
};

}  // namespace fe::inline FE_ISA
