// How csrc/torch/host calls the kernel of most free energies: by address, in a tenth of the time that Python's way through
// the dispatcher takes. Of plain types, because the two are libraries with headers of their own.
#pragma once

#include <cstdint>

namespace fe {

// Tensors are handles as in PyTorch's stable ABI: pointers to an at::Tensor. The operands' are taken over; each result's, of
// `free_energy.plain` and in its order, is `take`'s only while it runs. No result: another kernel's.
struct PlainFreeEnergy {
  void *prediction, *target, *mean, *logvar;
  int64_t likelihood, reduction;
  double beta;
  int64_t needs;
  bool inplace;
  void* context;
  void (*take)(void* context, void* tensor);
};
using PlainFreeEnergyKernel = void(const PlainFreeEnergy&);

}  // namespace fe
