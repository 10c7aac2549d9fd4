// The KL of a weight's Gaussian to its prior N(0, 1 / (ess weight_decay)) on one element.
#pragma once

#include "core/functions.h"

namespace fe {

struct VariationalKlCoefficients {
  float root_prior_precision, prior_precision;  // prior_precision: ess weight_decay
  float weight_decay, heat;                     // heat: (temperature - 1) weight_decay
  bool deviations;                              // whether `spread` is std itself, not the loss's curvature
};

}  // namespace fe

namespace fe::inline FE_ISA {

// r, the ratio of the variances, and r - 1 without the subtraction, which near r = 1 leaves no digits.
// kDeviations is c.deviations, once for all elements.
template <bool kDeviations, class F>
struct VarianceRatio {
  F value, excess;

  static FE_HD VarianceRatio of(F spread, const VariationalKlCoefficients& c) {
    using L = Lane<F>;
    if constexpr (kDeviations) {
      const F root = spread * c.root_prior_precision;
      return {root * root, L::fma(root, root, L::splat(-1.0f))};
    } else {
      const F inverse = L::divide(L::splat(1.0f), spread + c.weight_decay);
      return {inverse * (c.weight_decay + c.heat), (c.heat - spread) * inverse};
    }
  }
};

// twice_kl = prior_precision mean^2 + r - 1 - log r, and log r.
template <bool kDeviations, class F>
struct VariationalKl {
  F twice_kl, log_ratio;

  static FE_HD VariationalKl of(F mean, const VarianceRatio<kDeviations, F>& r, const VariationalKlCoefficients& c) {
    using L = Lane<F>;
    const F ratio = r.value, excess = r.excess;
    // Nearly always the posterior is narrower than the prior, of which the logarithm is half the work.
    const auto narrower = ratio <= 1.0f;
    F remainder = negative_log<F>(ratio, -excess).remainder;
    if (!L::all(narrower)) {
      const F wider = log1p_parts<F>(excess, ratio).below(excess);
      remainder = narrower ? remainder : wider;
    }
    return {L::fma(mean * c.prior_precision, mean, remainder), excess - remainder};
  }
};

}  // namespace fe::inline FE_ISA
