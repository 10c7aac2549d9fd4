// Diagnostics of a sampler's draws.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dispatch.h"
#include "torch/large_tensors.h"
#include "torch/registration.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// [3, weights]: R-hat, bulk and tail effective sample size of draws [chains, draws, weights]; NaN where not wanted.
Tensor chain_statistics_cpu(Tensor draws, Tensor scores, int64_t wanted) {
  STD_TORCH_CHECK(draws.dim() == 3 && draws.is_contiguous() && draws.size(0) >= 1 && draws.size(1) >= 4 &&
                      (draws.scalar_type() == ScalarType::Float || draws.scalar_type() == ScalarType::Double) &&
                      draws.size(0) * draws.size(1) < (int64_t{1} << 31),
                  "draws must be contiguous float32 or float64 [chains, draws >= 4, weights]");
  const int64_t half = draws.size(1) / 2, m = 2 * draws.size(0) * half;
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Double && scores.is_contiguous() && scores.numel() == 2 * m - 1,
                  "scores must be contiguous float64 [", 2 * m - 1, "]; got ", scores.numel());
  STD_TORCH_CHECK(wanted > 0 && wanted < 8, "wanted must be in [1, 8); got ", wanted);
  const int64_t shape[2] = {3, draws.size(2)};
  Tensor out = fe::empty_cpu(aoti_torch_dtype_float64(), {shape, size_t{2}});
  fe::ChainCall call{};
  call.chains = draws.size(0);
  call.draws = draws.size(1);
  call.weights = draws.size(2);
  call.data = draws.const_data_ptr();
  call.is_double = draws.scalar_type() == ScalarType::Double;
  call.scores = static_cast<const double*>(scores.const_data_ptr());
  call.least_tau = 1 / std::log10(static_cast<double>(m));
  call.wanted = wanted;
  call.out = static_cast<double*>(out.mutable_data_ptr());
  std::fill(call.out, call.out + out.numel(), std::nan(""));
  fe::ChainKernel* kernel = fe::cpu_kernels().chain_statistics;
  const int64_t blocks = (call.weights + fe::kWeightBlock - 1) / fe::kWeightBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(call.scratch_doubles());
    kernel(call, begin, end, scratch.data());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fekernels_native, m) {
  m.def("chain_statistics(Tensor draws, Tensor scores, int wanted) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) { m.impl("chain_statistics", TORCH_BOX(&chain_statistics_cpu)); }
