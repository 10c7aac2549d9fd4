#include "cpu/optimizers/formula_span.h"

namespace fe::FE_ISA {

namespace {

// RoundedStepFormula, by way of StepFormula: the mean takes the parameter's place.
void step_rounded(const VariationalAdamSpan& span) {
  run_buffered<float>(span, span.begin, span.count, RoundedStepFormula::kLoaded, RoundedStepFormula::kSaved,
                      [&](Buffers<float>& s, uint64_t index, int blocks) {
                        float* data[kOperands];
                        for (int operand = 0; operand < kOperands; ++operand) data[operand] = s.data[operand];
                        data[kParam] = s.data[kMaxExpAvgSq];
                        formula_blocks<StepFormula>(data, blocks, index, span);
                        __builtin_memcpy(s.data[kParam], s.data[kMaxExpAvgSq], sizeof s.data[kParam]);
                      });
}

}  // namespace

void variational_adam_span(const VariationalAdamSpan& span) {
  const DType param = span.dtypes[kParam];
  if (span.single.summed) return formula_span<SummedStepFormula>(span);
  if (param == kBFloat16 || param == kFloat16) return step_rounded(span);
  formula_span<StepFormula>(span);
}

}  // namespace fe::FE_ISA
