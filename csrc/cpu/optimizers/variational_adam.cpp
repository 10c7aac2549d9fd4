#include "cpu/optimizers/formula_span.h"

namespace fe::FE_ISA {

void variational_adam_span(const VariationalAdamSpan& span) {
  if (span.single.summed) return formula_span<SummedStepFormula>(span);
  const DType param = span.dtypes[kParam];
  if (param == kBFloat16 || param == kFloat16) return formula_span<RoundedStepFormula>(span);
  formula_span<StepFormula>(span);
}

}  // namespace fe::FE_ISA
