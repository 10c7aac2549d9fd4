// What the optimizers' operations have in common on one element and one step.
#pragma once

#include "core/lane.h"
#include "core/philox.h"
#include "core/pointer_table.h"

namespace fe {

// The head of every operation's settings, whose own numbers follow. The settings are one row of float64, in this order,
// as StepSettings.row of fekernels/ops/optimizers/step.py writes it; tensors, where given, replace lr and temperature.
struct StepSettings {
  double lr, temperature, weight_decay, prior_precision;
  double flags;  // a sum of StepFlags

  FE_HD bool has(StepFlags flag) const { return static_cast<int64_t>(flags) & flag; }
  FE_HD bool noisy() const { return temperature > 0.0 && lr > 0.0; }
};

}  // namespace fe

namespace fe::inline FE_ISA {

// 0 for what is below the smallest normal number, or below 2^kAbove times that. Averages of a dead unit's gradients decay
// to denormal numbers, where rounding then holds them for ever, and most CPUs take a hundred times as long over one of
// them: the steps of a network with dead units were 5 times slower from the thousandth on.
template <int kAbove, class F, class S = typename Lane<F>::Scalar>
FE_HD F flushed(F average) {
  static_assert((kAbove & (kAbove + 1)) == 0, "a mask of the exponent's low bits");
  if constexpr (sizeof(S) == sizeof(float)) {
    return Lane<F>::where_any_bit(average, 0x7f800000u & ~(kAbove << 23));
  } else {
    constexpr S smallest = 0x1p-1022 * static_cast<S>(1ull << kAbove);
    return average < smallest && average > -smallest ? F{} : average;
  }
}

// Of exp_avg, so that its product with a learning rate is a normal number too: below 2^-95 in float32, 2^-991 in float64.
inline constexpr int kAboveOfMomentum = 31;

}  // namespace fe::inline FE_ISA

namespace fe {

// What an operation is unless it says otherwise.
struct StepTraits {
  static constexpr Purpose kNoise = kLangevinNoise;
  static constexpr bool kAdvances = true;    // the parameter's t goes up by one
  static constexpr bool kWritesUnit = true;  // the row's noise_unit is the step's to write

  // The noise's counter, of step t and of what stands at the row's noise_unit.
  static FE_HD uint32_t noise_step(uint32_t t, double) { return t; }
  // Whether the elements' indices matter; else a dense row may be gone through as it lies in memory.
  static FE_HD bool numbered(const StepSettings& settings) { return settings.noisy(); }
};

}  // namespace fe
