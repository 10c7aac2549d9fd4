// What the registration files share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/pointer_table.h"
#include "formulas/free_energy_codes.h"

namespace fe {

inline constexpr int64_t kParallelElements = 32768;  // fewest for a second thread: starting one costs as much as these

// Torch's threads for a kernel that runs in several phases: cpu/threads.h.
inline void parallel_for(int64_t tasks, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, tasks, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

// float64 has a code but no kernel of the free energy: that is the reference's.
inline DType dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, "expected a float32, bfloat16 or float16 tensor"); return kFloat64;
  }
}

// A draw of `count` elements from index `offset` on must exist: elements are numbered by 48-bit counters of four words.
inline void check_key(int64_t stream, int64_t step, int64_t offset, int64_t purpose, int64_t count) {
  constexpr int64_t kIndices = int64_t{1} << 50;
  STD_TORCH_CHECK(stream >= 0 && stream <= 0xffffffff && step >= 0 && step <= 0xffffffff && purpose >= 0 &&
                      purpose <= 0xffff && offset >= 0 && count <= kIndices && offset <= kIndices - count,
                  "stream and step must be in [0, 2^32), purpose in [0, 2^16), elements in [0, 2^50); got stream ", stream,
                  ", step ", step, ", purpose ", purpose, ", offset ", offset, " of ", count, " elements");
}

// What reparameterize and its backward take: rows and latents of logvar, and as many in the other operand's last two
// dimensions, both without gaps and on one device; and noise for all of them.
inline void check_reparameterize(const torch::stable::Tensor& tensor, const torch::stable::Tensor& logvar, bool backward,
                                 int64_t samples, int64_t stream, int64_t step, int64_t offset) {
  const int64_t before = backward ? 1 : 0;
  STD_TORCH_CHECK(logvar.dim() == 2 && tensor.dim() == 2 + before && tensor.size(before) == logvar.size(0) &&
                      tensor.size(before + 1) == logvar.size(1) && tensor.is_contiguous() && logvar.is_contiguous() &&
                      tensor.is_cuda() == logvar.is_cuda() && tensor.is_cpu() == logvar.is_cpu() &&
                      tensor.get_device_index() == logvar.get_device_index() && samples >= 0,
                  backward ? "grad must be contiguous [samples, rows, latents]" : "mean must be contiguous [rows, latents]",
                  " on one device with logvar, which is contiguous [rows, latents]; samples must not be negative");
  const int64_t latents = std::max<int64_t>(1, logvar.size(1));
  STD_TORCH_CHECK(offset >= 0 && offset <= (int64_t{1} << 50) / latents, "offset must be in [0, 2^50 / latents]; got ", offset);
  check_key(stream, step, offset * logvar.size(1), 0, logvar.numel());
}

// What the free energy's kernels of every device take on trust from their operands, but for these themselves.
inline void check_free_energy(const std::vector<torch::stable::Tensor>& params, const std::optional<torch::stable::Tensor>& target,
                              const std::vector<torch::stable::Tensor>& latent, const std::vector<torch::stable::Tensor>& upstream,
                              int64_t expected_params, int64_t reduction, bool inplace) {
  STD_TORCH_CHECK(!params.empty() || !latent.empty(), "neither params nor latent");
  STD_TORCH_CHECK(params.empty() != target.has_value(), "params without a target, or a target without params");
  STD_TORCH_CHECK(params.empty() || static_cast<int64_t>(params.size()) == expected_params, "the likelihood has ",
                  expected_params, " parameters; got ", params.size());
  STD_TORCH_CHECK(latent.empty() || latent.size() == 2 || latent.size() == 4, "latent must hold 0, 2 or 4 tensors; got ",
                  latent.size());
  STD_TORCH_CHECK(upstream.empty() || upstream.size() == 2, "upstream must hold 0 or 2 tensors; got ", upstream.size());
  STD_TORCH_CHECK(reduction >= 0 && reduction < kReductions, "reduction must be in [0, ", kReductions, "); got ", reduction);
  STD_TORCH_CHECK(!inplace || (!params.empty() && params[0].is_contiguous()), "inplace needs a contiguous prediction");
}

inline void check_free_energy_mask(const std::optional<torch::stable::Tensor>& mask, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == torch::headeronly::ScalarType::Bool && mask->dim() == 2 &&
                            mask->size(0) == rows && mask->size(1) == columns &&
                            (columns <= 1 || mask->stride(1) == 1 || rows == 0)),
                  "mask must be bool, [", rows, ", ", columns, "], with inner stride 1");
}

// weight and upstream: [rows], float32.
inline void check_free_energy_rows(const torch::stable::Tensor& tensor, int64_t rows) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == rows,
                  "weight and upstream must be contiguous float32 of shape [", rows, "]");
}

#if defined(FE_HAVE_CUDA)
void* current_stream(int32_t device);
void check_cuda(int error, const char* what);
#endif

}  // namespace fe
