// What the registration files share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "table.h"

namespace fe {

inline constexpr int64_t kParallelElements = 32768;  // fewest for a second thread: starting one costs as much as these

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

#if defined(FE_HAVE_CUDA)
void* current_stream(int32_t device);
void check_cuda(int error, const char* what);
#endif

}  // namespace fe
