#include "cpu/optimizers/formula_span.h"

namespace fe::FE_ISA {

namespace {

// See RoundedDrawFormula.
void follow(Buffers<float>& s, DType dtype) {
  const float* param = s.data[kParam] + s.shift;
  float* mean = s.data[kExpAvg] + s.shift;
  for (int i = 0; i < s.count; ++i) {
    const float rounded = dtype == kBFloat16 ? bf16_to_float(float_to_bf16(mean[i])) : fp16_to_float(float_to_fp16(mean[i]));
    if (Lane<float>::bits(rounded) != Lane<float>::bits(param[i])) mean[i] = param[i];
  }
}

}  // namespace

void variational_draw_span(const VariationalDrawSpan& span) {
  const DType param = span.dtypes[kParam];
  if (param == span.dtypes[kExpAvg] || param == kFloat64 || param == kFloat32) return formula_span<DrawFormula>(span);
  formula_buffered<RoundedDrawFormula>(span, span.begin, span.count, [&](Buffers<float>& s) { follow(s, param); });
}

}  // namespace fe::FE_ISA
