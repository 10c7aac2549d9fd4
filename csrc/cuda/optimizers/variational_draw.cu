#include "cuda/optimizers/formula_rows.h"

namespace fe::cuda {
namespace {

auto kernel_for(int64_t dtypes) {  // a draw takes no gradient
  const int64_t param = dtypes & 0xff;
  return formula_kernel_for<VariationalDraw, VariationalDrawSettings, DrawFormula, RoundedDrawFormula>(
      (dtypes & ~int64_t{0xff00}) | param << 8);
}

}  // namespace

extern "C" bool fe_cuda_variational_draw_supports(int64_t dtypes) { return kernel_for(dtypes) != nullptr; }

extern "C" int fe_cuda_variational_draw(const VariationalDrawCall* call, void* stream) {
  return launch_formula(kernel_for(call->step.dtypes), *call, stream);
}

}  // namespace fe::cuda
