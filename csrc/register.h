// What the registration files share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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

#if defined(FE_HAVE_CUDA)
void* current_stream(int32_t device);
void check_cuda(int error, const char* what);
#endif

}  // namespace fe
