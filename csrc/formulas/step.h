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
