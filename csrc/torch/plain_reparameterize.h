// How csrc/torch/host calls the kernels of a reparameterised sample, as those of plain_free_energy.h.
#pragma once

#include <cstdint>

namespace fe {

// Of float32 without gaps. The handles are taken over; `take` gets z, or in the backward pass the two gradients.
struct PlainReparameterize {
  void *operand, *logvar;  // operand: mean [rows, latents], or in the backward pass z's gradient [samples, rows, latents]
  int64_t seed, stream, step, offset, samples;
  bool backward;
  void* context;
  void (*take)(void* context, void* tensor);
};
using PlainReparameterizeKernel = void(const PlainReparameterize&);

}  // namespace fe
