// The GPU kernels' host entry points: device pointers in, a cudaError_t (as int, 0 = success) out, no torch header.
// They launch on the current device and on `stream` (a cudaStream_t), and neither allocate nor synchronise, so that
// every one of them can be captured into a CUDA graph.
#pragma once

#include <cstdint>

#include "table.h"

namespace fe::cuda {

// What the two optimizers' steps have in common. Pointers are the device's; those marked so may be null.
struct StepCall {
  const TableRow* rows;
  const int64_t* layouts;  // may be null when every row's layout is 0
  const int32_t* chunks;   // [n_chunks, 2]: (row, chunk in row); a row's last chunk may be short of kChunk elements
  int32_t* scratch;        // one zero; zero again afterwards
  const void* lr_tensor;   // one element, replaces `lr`; may be null
  const void* temperature_tensor;  // likewise
  const float* grad_scale;         // gradients are divided by it; may be null
  const float* found_inf;          // other than 0: nothing changes; may be null
  int64_t n_rows, n_chunks;        // rows with no chunk still advance their step
  int64_t dtypes;  // as in TableRow, the same in all rows of this call (the anchor's and the step's may differ by row)
  int64_t flags, seed;
  double lr, temperature, weight_decay, prior_precision;
  int32_t lr_dtype, temperature_dtype;  // kFloat32 or kFloat64, of the tensors above
};

struct LangevinAdamCall {
  StepCall step;
  double* previous;  // [2]: lr and temperature of the last step that moved
  double beta1, beta2, eps;
  int64_t noise;  // a Noise of math/langevin_adam.h
};

// Whether a kernel exists for these dtypes (TableRow::dtypes; the anchor's and the step's do not matter). The gradient
// has the parameter's dtype; the states have it too, or are float32 under bfloat16 and float16 parameters, or bfloat16
// under float32 parameters. Everything else makes the step return cudaErrorInvalidValue with nothing launched.
extern "C" bool fe_cuda_langevin_adam_supports(int64_t dtypes);
extern "C" bool fe_cuda_sgld_supports(int64_t dtypes);

extern "C" int fe_cuda_langevin_adam(const LangevinAdamCall* call, void* stream);
extern "C" int fe_cuda_sgld(const StepCall* call, void* stream);

// Fill out[0 .. count) with elements offset .. offset + count of the draw named by the rest.
extern "C" int fe_cuda_philox_bits(uint32_t* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                   int64_t offset, uint32_t purpose, void* stream);
extern "C" int fe_cuda_philox_uniform(float* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                      int64_t offset, uint32_t purpose, void* stream);
extern "C" int fe_cuda_philox_normal(float* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                     int64_t offset, uint32_t purpose, void* stream);

}  // namespace fe::cuda
