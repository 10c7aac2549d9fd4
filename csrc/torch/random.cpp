// Counter-based noise.
#include <torch/csrc/stable/library.h>

#include "cpu/dispatch.h"
#include "torch/registration.h"

#if defined(FE_HAVE_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <fe::Draw kDraw>
void check_draw(const Tensor& out, int64_t stream, int64_t step, int64_t offset, int64_t purpose) {
  constexpr bool kWords = kDraw == fe::Draw::kBits;
  STD_TORCH_CHECK(out.scalar_type() == (kWords ? ScalarType::Int : ScalarType::Float) && out.is_contiguous(),
                  "out must be contiguous and ", kWords ? "int32" : "float32");
  fe::check_key(stream, step, offset, purpose, out.numel());
}

template <fe::Draw kDraw>
void philox_cpu(Tensor out, int64_t seed, int64_t stream, int64_t step, int64_t offset, int64_t purpose) {
  check_draw<kDraw>(out, stream, step, offset, purpose);
  const fe::NoiseKey key = fe::noise_key(seed, static_cast<uint32_t>(step), static_cast<uint32_t>(stream),
                                         static_cast<uint32_t>(purpose));
  char* to = static_cast<char*>(out.mutable_data_ptr());
  fe::FillPhilox* fill = fe::cpu_kernels().fill_philox;
  torch::stable::parallel_for(0, out.numel(), fe::kParallelElements, [&](int64_t begin, int64_t end) {
    fill(kDraw, to + begin * 4, end - begin, static_cast<uint64_t>(offset + begin), key);
  });
}

#if defined(FE_HAVE_CUDA)
template <fe::Draw kDraw>
void philox_cuda(Tensor out, int64_t seed, int64_t stream, int64_t step, int64_t offset, int64_t purpose) {
  check_draw<kDraw>(out, stream, step, offset, purpose);
  torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  void* cuda_stream = fe::current_stream(out.get_device_index());
  void* to = out.mutable_data_ptr();
  const auto fill = [&](auto* function, auto* typed) {
    fe::check_cuda(function(typed, out.numel(), seed, static_cast<uint32_t>(stream), static_cast<uint32_t>(step), offset,
                        static_cast<uint32_t>(purpose), cuda_stream),
               "philox");
  };
  if (kDraw == fe::Draw::kBits) fill(fe::cuda::fe_cuda_philox_bits, static_cast<uint32_t*>(to));
  if (kDraw == fe::Draw::kUniform) fill(fe::cuda::fe_cuda_philox_uniform, static_cast<float*>(to));
  if (kDraw == fe::Draw::kNormal) fill(fe::cuda::fe_cuda_philox_normal, static_cast<float*>(to));
}

#endif

}  // namespace

#define FE_RANDOM_ARGUMENTS "(Tensor(a!) out, int seed, int stream, int step, int offset, int purpose) -> ()"

STABLE_TORCH_LIBRARY_FRAGMENT(fekernels_native, m) {
  m.def("philox_bits" FE_RANDOM_ARGUMENTS);
  m.def("philox_uniform" FE_RANDOM_ARGUMENTS);
  m.def("philox_normal" FE_RANDOM_ARGUMENTS);
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) {
  m.impl("philox_bits", TORCH_BOX(&philox_cpu<fe::Draw::kBits>));
  m.impl("philox_uniform", TORCH_BOX(&philox_cpu<fe::Draw::kUniform>));
  m.impl("philox_normal", TORCH_BOX(&philox_cpu<fe::Draw::kNormal>));
}

#if defined(FE_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CUDA, m) {
  m.impl("philox_bits", TORCH_BOX(&philox_cuda<fe::Draw::kBits>));
  m.impl("philox_uniform", TORCH_BOX(&philox_cuda<fe::Draw::kUniform>));
  m.impl("philox_normal", TORCH_BOX(&philox_cuda<fe::Draw::kNormal>));
}
#endif
