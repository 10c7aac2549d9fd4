// z = mean + exp(logvar / 2) eps, and its gradients, with eps made from its index: never stored.
#pragma once

#include "core/philox.h"
#include "core/pointer_table.h"

namespace fe {

struct ReparameterizeCall {
  int64_t elements;  // of mean, [rows, latents]
  int64_t samples;
  uint64_t index;    // of the first element in the whole batch
  NoiseKey key;      // of sample 0; sample k has stream + k
  const void* mean;    // forward
  const void* logvar;
  void* z;             // forward: [samples, elements], as mean
  const void* grad;    // backward: [samples, elements]
  void* grad_mean;     // backward, as grad
  void* grad_logvar;   // backward, as logvar
  DType dtype, logvar_dtype;  // of mean, z, grad, grad_mean; of logvar, grad_logvar
};

// Elements begin .. end - 1.
using ReparameterizeKernel = void(const ReparameterizeCall& call, int64_t begin, int64_t end);

}  // namespace fe
