// The terms that are bound by memory.
#include "cuda/free_energy/elementwise.h"

namespace fe::cuda {

int launch_memory_bound(int32_t term, const TermPass& pass, void* stream) {
  switch (term) {
    case kStandardNormalKl:
      return launch_plain_or_any<NormalKl, 4, 1>(pass, stream);  // without column gradients: no prior
    case kNormalKl:
      return launch_plain_or_any<NormalPriorKl, 1, 2>(pass, stream);
    case kValue:
      return launch_any<Value>(pass, stream);
    default:
      return launch_likelihood<TermFile::memory_bound>(term, pass, stream);
  }
}

}  // namespace fe::cuda
