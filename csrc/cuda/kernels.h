// The GPU kernels' host entry points: device pointers in, a cudaError_t (as int, 0 = success) out, no torch header.
// They launch on the current device and on `stream` (a cudaStream_t), and neither allocate nor synchronise, so that
// every one of them can be captured into a CUDA graph.
#pragma once

#include <cstdint>

#include "formulas/free_energy_codes.h"
#include "formulas/optimizers.def"
#include "core/pointer_table.h"

namespace fe::cuda {

// What the operations' steps have in common. Pointers are the device's; those marked so may be null.
struct StepCall {
  const TableRow* rows;
  const int64_t* layouts;  // may be null when every row's layout is 0
  const int32_t* chunks;   // [n_chunks, 2]: (row, chunk in row); a row's last chunk may be short of kChunk elements
  int32_t* scratch;        // one zero; zero again afterwards
  const void* lr_tensor;   // one element, replaces the lr of the settings; may be null
  const void* temperature_tensor;  // likewise
  const float* grad_scale;         // gradients are divided by it; may be null
  const float* found_inf;          // other than 0: nothing changes; may be null
  int64_t n_rows, n_chunks;        // rows with no chunk still advance their step
  int64_t dtypes;  // as in TableRow, the same in all rows of this call (the anchor's and the step's may differ by row)
  int64_t flags, seed;
  int32_t lr_dtype, temperature_dtype;  // kFloat32 or kFloat64, of the tensors above
};

template <class Settings>
struct OptimizerCall {
  StepCall step;
  Settings settings;
};

// Whether a kernel exists for these dtypes (TableRow::dtypes; the anchor's and the step's do not matter). The gradient
// has the parameter's dtype; the states have it too, or are float32 under bfloat16 and float16 parameters, or bfloat16
// under float32 parameters. Everything else makes the step return cudaErrorInvalidValue with nothing launched.
#define FE_OPTIMIZER(Name, name)                               \
  using Name##Call = OptimizerCall<Name##Settings>;            \
  extern "C" bool fe_cuda_##name##_supports(int64_t dtypes);   \
  extern "C" int fe_cuda_##name(const Name##Call* call, void* stream);
#include "formulas/optimizers.def"

// One operand of the free energy: [rows or 1, columns or 1] in elements, inner stride 1.
struct FreeEnergyOperand {
  const void* data;
  int64_t rows, columns, row_stride;
  void* gradient;  // contiguous, of the operand's shape and dtype; null: not wanted. That of params[0] may be its data.
  int32_t dtype;
};

// The contract of torch.ops.fekernels_native.free_energy. `categorical` has one parameter, [rows, columns, classes], and
// it, its target and its mask are contiguous. formulas/likelihoods.h asserts that there is room for any likelihood's parameters.
struct FreeEnergyCall {
  FreeEnergyOperand params[kMaxParams], latent[kMaxParams];
  FreeEnergyOperand target;  // [rows, columns]; int64 when categorical
  const uint8_t* mask;       // [rows, columns], nonzero: observed; may be null
  const uint8_t* latent_mask;  // [rows, latents], likewise
  int64_t mask_stride, latent_mask_stride;
  const float* weight;       // [rows]; may be null; a row whose weight is 0 is not looked at
  const float* upstream[2];  // [rows], of energy and KL; may be null
  float* out[3];             // free energy, energy, KL: [rows] without a reduction, else one
  void* scratch;             // fe_cuda_free_energy_scratch bytes on a multiple of 16; need not be cleared
  int64_t rows, columns, latents, classes;  // [rows, latents]: the shape of latent[0]
  double beta;
  int32_t n_params, n_latent;
  int32_t likelihood;
  Reduction reduction;
};

// `scratch` and `out` of the call need not be set.
extern "C" int64_t fe_cuda_free_energy_scratch(const FreeEnergyCall* call);
extern "C" int fe_cuda_free_energy(const FreeEnergyCall* call, void* stream);

struct ReparameterizeCall {
  const void* mean;    // forward: [rows, latents]
  const void* logvar;
  void* z;             // forward: [samples, rows, latents], as mean
  const void* grad;    // backward: [samples, rows, latents]
  void* grad_mean;     // backward: [rows, latents], as grad
  void* grad_logvar;   // likewise, as logvar
  int64_t rows, latents, samples;
  int64_t offset, seed;  // offset: of the first row in the whole batch
  uint32_t stream, step;
  int32_t dtype, logvar_dtype;  // of mean, z, grad, grad_mean; of logvar, grad_logvar
};

// All contiguous.
extern "C" int fe_cuda_reparameterize(const ReparameterizeCall* call, void* stream);
extern "C" int fe_cuda_reparameterize_backward(const ReparameterizeCall* call, void* stream);

struct ScaledTensor {
  void* data;  // contiguous
  int64_t count;
  int32_t dtype;
};

// Up to this many tensors per call; more make it return cudaErrorInvalidValue with nothing launched.
inline constexpr int kMaxScaled = 8;

struct ScaleCall {
  ScaledTensor tensors[kMaxScaled];
  const float* factor;  // at 1 nothing is read or written
  int64_t n_tensors;
};

extern "C" int fe_cuda_scale(const ScaleCall* call, void* stream);

// Fill out[0 .. count) with elements offset .. offset + count of the draw named by the rest.
extern "C" int fe_cuda_philox_bits(uint32_t* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                   int64_t offset, uint32_t purpose, void* stream);
extern "C" int fe_cuda_philox_uniform(float* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                      int64_t offset, uint32_t purpose, void* stream);
extern "C" int fe_cuda_philox_normal(float* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                     int64_t offset, uint32_t purpose, void* stream);

}  // namespace fe::cuda
