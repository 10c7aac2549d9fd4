// What the optimizers' kernels of a span take, by the operation's name: LangevinAdamSpan, LangevinAdamKernel.
#pragma once

#include "cpu/optimizers/span.h"
#include "formulas/optimizers.def"

namespace fe {

template <template <class> class Coefficients>
struct StepSpan : Span {
  Coefficients<float> single;
  Coefficients<double> for_double;  // of float64 parameters
};

#define FE_OPTIMIZER(Name, name)                  \
  using Name##Span = StepSpan<Name##Coefficients>; \
  using Name##Kernel = void(const Name##Span& span);
#include "formulas/optimizers.def"

}  // namespace fe
