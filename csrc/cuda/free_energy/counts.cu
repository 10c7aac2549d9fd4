#include "cuda/free_energy/elementwise.h"

namespace fe::cuda {

int launch_counts_terms(int32_t term, const TermPass& pass, void* stream) {
  return launch_likelihood<TermFile::counts>(term, pass, stream);
}

}  // namespace fe::cuda
