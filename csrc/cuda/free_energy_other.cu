#include "cuda/free_energy_terms.h"

namespace fe::cuda {

int launch_other_terms(int32_t term, const TermPass& pass, void* stream) {
  switch (static_cast<Likelihood>(term)) {
    case Likelihood::kContinuousBernoulli:
      return launch_any<ContinuousBernoulli>(pass, stream);
    case Likelihood::kLaplace:
      return launch_any<Laplace>(pass, stream);
    case Likelihood::kStudentT:
      return launch_any<StudentT>(pass, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace fe::cuda
