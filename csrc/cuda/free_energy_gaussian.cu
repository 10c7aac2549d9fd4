// The terms that are bound by memory.
#include "cuda/free_energy_terms.h"

namespace fe::cuda {

int launch_gaussian_terms(int32_t term, const TermPass& pass, void* stream) {
  switch (term) {
    case kStandardNormalKl:
      return launch_plain_or_any<NormalKl, 4, 1>(pass, stream);  // without column gradients: no prior
    case kNormalKl:
      return launch_plain_or_any<NormalPriorKl, 1, 2>(pass, stream);
    case kValue:
      return launch_any<Value>(pass, stream);
    case static_cast<int32_t>(Likelihood::kMse):
      return launch_plain_or_any<Mse, 4>(pass, stream);
    case static_cast<int32_t>(Likelihood::kGaussian):
      return launch_plain_or_any<Gaussian, 4>(pass, stream);
    case static_cast<int32_t>(Likelihood::kGaussianLearned):
      return launch_plain_or_any<GaussianLearned, 2>(pass, stream);
    case static_cast<int32_t>(Likelihood::kBernoulli):
      return launch_plain_or_any<Bernoulli, 4>(pass, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace fe::cuda
