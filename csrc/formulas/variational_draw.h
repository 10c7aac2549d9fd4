// A draw from a mean-field Gaussian over the weights on one element (Blundell et al. 2015; Shen et al. 2024, arXiv:2402.17641):
// mean + deviation * normal.
#pragma once

#include "formulas/step.h"

namespace fe {

struct VariationalDrawSettings : StepSettings {
  double ess;         // number of data points that the loss is the mean of
  double deviations;  // not 0: exp_avg_sq has the standard deviations themselves, not the curvature of the loss
};

template <class S>
struct VariationalDrawCoefficients {
  S variance, weight_decay;
  bool noisy, deviations;

  // Whether a loop serves that has no branch, and the same coefficients with the flags that it takes for granted.
  FE_HD bool plain() const { return noisy && !deviations; }
  FE_HD VariationalDrawCoefficients as_plain() const { return {variance, weight_decay, true, false}; }
};

}  // namespace fe

namespace fe::inline FE_ISA {

template <class F, class S = typename Lane<F>::Scalar>
FE_HD F variational_draw(F mean, F spread, F normal, const VariationalDrawCoefficients<S>& c) {
  using L = Lane<F>;
  if (!c.noisy) return mean;
  const F deviation = c.deviations ? spread : L::sqrt(L::divide(L::splat(c.variance), spread + c.weight_decay));
  return L::fma(deviation, normal, mean);
}

// The operands of a draw, for whoever goes through a table: kLoaded and kSaved, a bit for each; kNoise, whether it takes a
// normal; update(x, normal, coefficients), x being all operands in the order of the table.
struct DrawFormula {
  static constexpr uint32_t kLoaded = 1u << kParam | 1u << kExpAvgSq, kSaved = 1u << kParam | 1u << kExpAvg;
  static constexpr bool kNoise = true, kFollows = false;

  template <class F, class C>
  static FE_HD void update(F* x, F normal, const C& c) {
    x[kExpAvg] = x[kParam];
    x[kParam] = variational_draw(x[kExpAvg], x[kExpAvgSq], normal, c);
  }
};

// Where the parameter is the mean's rounding to its own dtype. kFollows: one that is not, somebody has set; before the
// update it becomes the mean.
struct RoundedDrawFormula {
  static constexpr uint32_t kLoaded = DrawFormula::kLoaded | 1u << kExpAvg, kSaved = DrawFormula::kSaved;
  static constexpr bool kNoise = true, kFollows = true;

  template <class F, class C>
  static FE_HD void update(F* x, F normal, const C& c) {
    x[kParam] = variational_draw(x[kExpAvg], x[kExpAvgSq], normal, c);
  }
};

// As LangevinAdam of formulas/langevin_adam.h. exp_avg: where the mean is kept. The row's step counts draws.
struct VariationalDraw : StepTraits {
  static constexpr Purpose kNoise = kWeightSample;

  static FE_HD bool numbered(const StepSettings& settings) { return settings.temperature > 0.0; }
  static FE_HD uint32_t operands(const VariationalDrawSettings&) { return 1u << kParam | 1u << kExpAvg | 1u << kExpAvgSq; }
  template <class S>
  static FE_HD VariationalDrawCoefficients<S> coefficients(const VariationalDrawSettings& settings, double, uint32_t, double) {
    VariationalDrawCoefficients<S> c{};
    c.variance = static_cast<S>(settings.temperature / settings.ess);
    c.weight_decay = static_cast<S>(settings.weight_decay);
    c.noisy = settings.temperature > 0.0;
    c.deviations = settings.deviations != 0.0;
    return c;
  }
  static FE_HD double noise_unit(const VariationalDrawSettings&) { return 0.0; }
};

}  // namespace fe::inline FE_ISA
