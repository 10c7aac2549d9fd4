#include "cuda/free_energy_terms.h"

namespace fe::cuda {

int launch_count_terms(int32_t term, const TermPass& pass, void* stream) {
  switch (static_cast<Likelihood>(term)) {
    case Likelihood::kPoisson:
      return launch_any<Poisson>(pass, stream);
    case Likelihood::kNegativeBinomial:
      return launch_any<NegativeBinomial>(pass, stream);
    case Likelihood::kZeroInflatedNegativeBinomial:
      return launch_any<ZeroInflatedNegativeBinomial>(pass, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace fe::cuda
