#include "cuda/free_energy/elementwise.h"

namespace fe::cuda {

int launch_compute_bound(int32_t term, const TermPass& pass, void* stream) {
  return launch_likelihood<TermFile::compute_bound>(term, pass, stream);
}

}  // namespace fe::cuda
