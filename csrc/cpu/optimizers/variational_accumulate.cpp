#include "cpu/optimizers/formula_span.h"

namespace fe::FE_ISA {

void variational_accumulate_span(const VariationalAccumulateSpan& span) {
  span.single.first ? formula_span<AccumulateFormula<true>>(span) : formula_span<AccumulateFormula<false>>(span);
}

}  // namespace fe::FE_ISA
