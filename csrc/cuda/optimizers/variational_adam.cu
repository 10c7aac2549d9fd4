#include "cuda/optimizers/formula_rows.h"

namespace fe::cuda {
namespace {

template <class Formula, class RoundedFormula>
auto kernel_for(int64_t dtypes) {
  return formula_kernel_for<VariationalAdam, VariationalAdamSettings, Formula, RoundedFormula>(dtypes);
}

}  // namespace

extern "C" bool fe_cuda_variational_adam_supports(int64_t dtypes) {
  return kernel_for<StepFormula, RoundedStepFormula>(dtypes) != nullptr;
}

// Sums are stepped in the states' dtype: with 16-bit parameters there are none.
extern "C" int fe_cuda_variational_adam(const VariationalAdamCall* call, void* stream) {
  const int64_t dtypes = call->step.dtypes;
  if (call->settings.samples == 0.0) return launch_formula(kernel_for<StepFormula, RoundedStepFormula>(dtypes), *call, stream);
  return launch_formula(kernel_for<SummedStepFormula, SummedStepFormula>(dtypes), *call, stream);
}

}  // namespace fe::cuda
