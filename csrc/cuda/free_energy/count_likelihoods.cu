#include "cuda/free_energy/elementwise.h"

namespace fe::cuda {

int launch_count_likelihoods(int32_t term, const TermPass& pass, void* stream) {
  return launch_likelihood<TermFile::count_likelihoods>(term, pass, stream);
}

}  // namespace fe::cuda
