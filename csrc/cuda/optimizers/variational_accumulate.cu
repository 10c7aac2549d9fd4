#include "cuda/optimizers/formula_rows.h"

namespace fe::cuda {
namespace {

template <bool kFirst>
auto kernel_for(int64_t dtypes) {
  return formula_kernel_for<VariationalAccumulate, VariationalAccumulateSettings, AccumulateFormula<kFirst>,
                            AccumulateFormula<kFirst>>(dtypes);
}

}  // namespace

extern "C" bool fe_cuda_variational_accumulate_supports(int64_t dtypes) { return kernel_for<true>(dtypes) != nullptr; }

extern "C" int fe_cuda_variational_accumulate(const VariationalAccumulateCall* call, void* stream) {
  const int64_t dtypes = call->step.dtypes;
  return launch_formula(call->settings.samples == 0.0 ? kernel_for<true>(dtypes) : kernel_for<false>(dtypes), *call, stream);
}

}  // namespace fe::cuda
