#include "cpu/optimizers/formula_span.h"

namespace fe::FE_ISA {

namespace {

// RoundedDrawFormula, by way of DrawFormula: the mean takes the parameter's place before the draw.
void draw_rounded(const VariationalDrawSpan& span) {
  const DType dtype = span.dtypes[kParam];
  run_buffered<float>(span, span.begin, span.count, RoundedDrawFormula::kLoaded, RoundedDrawFormula::kSaved,
                      [&](Buffers<float>& s, uint64_t index, int blocks) {
                        float* param = s.data[kParam] + s.shift;
                        const float* mean = s.data[kExpAvg] + s.shift;
                        for (int i = 0; i < s.count; ++i) {
                          const float rounded = dtype == kBFloat16 ? bf16_to_float(float_to_bf16(mean[i]))
                                                                   : fp16_to_float(float_to_fp16(mean[i]));
                          if (Lane<float>::bits(rounded) == Lane<float>::bits(param[i])) param[i] = mean[i];
                        }
                        float* data[kOperands];
                        for (int operand = 0; operand < kOperands; ++operand) data[operand] = s.data[operand];
                        formula_blocks<DrawFormula>(data, blocks, index, span);
                      });
}

}  // namespace

void variational_draw_span(const VariationalDrawSpan& span) {
  const DType param = span.dtypes[kParam];
  if (param == kBFloat16 || param == kFloat16) return draw_rounded(span);
  formula_span<DrawFormula>(span);
}

}  // namespace fe::FE_ISA
