// Several tensors times one number, in place: what backward does to gradients that forward made.
#include "cuda/float_access.h"
#include "cuda/kernels.h"

namespace fe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;

FE_DEVICE void scale_tensor(const ScaledTensor& tensor, float factor, int64_t thread, int64_t threads) {
  const int64_t data = reinterpret_cast<int64_t>(tensor.data);
  const int64_t fours = takes_fours(data, tensor.dtype) ? tensor.count / 4 : 0;
#pragma unroll 2
  for (int64_t i = thread; i < fours; i += threads) {
    float values[4];
    load_four(tensor.dtype, data, 4 * i, values);
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k] *= factor;
    store_four(tensor.dtype, data, 4 * i, values);
  }
  for (int64_t i = 4 * fours + thread; i < tensor.count; i += threads) {
    store_float(tensor.dtype, data, i, load_float(tensor.dtype, data, i) * factor);
  }
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const ScaleCall call) {
  const float factor = *call.factor;
  if (factor == 1.0f) return;
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    scale_tensor(call.tensors[i], factor, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                 static_cast<int64_t>(gridDim.x) * kThreads);
  }
}

}  // namespace

extern "C" int fe_cuda_scale(const ScaleCall* call, void* stream) {
  if (call->n_tensors > kMaxScaled) return static_cast<int>(cudaErrorInvalidValue);
  int64_t most = 0;
  for (int64_t i = 0; i < call->n_tensors; ++i) most = call->tensors[i].count > most ? call->tensors[i].count : most;
  if (most == 0) return 0;
  const int64_t blocks = (most + 8 * kThreads - 1) / (8 * kThreads);
  return launch(scale_kernel, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, *call, stream);
}

}  // namespace fe::cuda
