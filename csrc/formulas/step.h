// What the optimizers' operations have in common on one element and one step.
#pragma once

#include "core/lane.h"
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
