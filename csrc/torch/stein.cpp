// The ops of Stein's method on the CPU: batches of problems, their workspaces and threads.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "torch/large_tensors.h"
#include "torch/registration.h"
#include "torch/stein_codes.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

struct Shape {
  int64_t batch, n, d;
};

void check_dtype(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "particles, scores and grad must be float32, bfloat16 or float16");
}

Shape shape_of(const Tensor& particles, std::initializer_list<const Tensor*> alike, const Tensor& bandwidth) {
  STD_TORCH_CHECK(particles.dim() == 3 && particles.is_contiguous(), "particles must be contiguous, [batch, n, d]");
  check_dtype(particles);
  const Shape shape{particles.size(0), particles.size(1), particles.size(2)};
  for (const Tensor* tensor : alike) {
    check_dtype(*tensor);
    STD_TORCH_CHECK(tensor->dim() == 3 && tensor->size(0) == shape.batch && tensor->size(1) == shape.n &&
                        tensor->size(2) == shape.d && tensor->is_contiguous(),
                    "scores and grad must be contiguous and of particles' shape");
  }
  STD_TORCH_CHECK(bandwidth.scalar_type() == ScalarType::Float && bandwidth.is_contiguous() &&
                      bandwidth.numel() == shape.batch,
                  "bandwidth must be contiguous float32 of shape [batch]");
  return shape;
}

// Where each problem of a batch lies. Asking a tensor costs tens of nanoseconds, as much as a tenth of a small problem.
template <class Byte>
struct Problems {
  Byte* data;
  int64_t bytes;

  auto operator[](int64_t index) const { return data ? data + index * bytes : nullptr; }
};

int64_t bytes(const Tensor& tensor, const Shape& shape) {
  return shape.n * shape.d * (tensor.scalar_type() == ScalarType::Float ? 4 : 2);
}

Problems<const char> problems(const Tensor& tensor, const Shape& shape) {
  return {static_cast<const char*>(tensor.const_data_ptr()), bytes(tensor, shape)};
}

Problems<char> problems(Tensor& tensor, const Shape& shape) {
  return {static_cast<char*>(tensor.data_ptr()), bytes(tensor, shape)};
}

inline constexpr int64_t kSideBySide = 512;  // particles of a problem that a thread takes on its own
inline constexpr int64_t kSmallWorkspace = 1 << 18;  // floats: a problem that stays in the L2 cache of one processor

// Runs solve(problem, workspace, parallel_for): small problems side by side, large ones one after the other, each on all
// threads. A problem's result is the same either way.
template <class Solve>
void each_problem(const Shape& shape, int64_t workspace_floats, const Tensor& like_float, Solve solve) {
  const int64_t batch = shape.batch, padded = workspace_floats + 16;
  const auto aligned = [](float* memory) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  };
  if (workspace_floats == 0 || (batch > 1 && padded <= kSmallWorkspace)) {
    // Work goes with the workspace, which is of whole tiles, or where there is none with the pairs. A kernel without one
    // has no use for threads either.
    const int64_t pairs = shape.n * shape.n * (3 * shape.d / 8 + 2);
    const int64_t grain = fe::kParallelElements / (workspace_floats > 0 ? padded : pairs) + 1;
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      const auto memory = std::make_unique_for_overwrite<float[]>(padded);
      for (int64_t b = begin; b < end; ++b) solve(b, aligned(memory.get()), nullptr);
    });
    return;
  }
  const Tensor memory = fe::empty_large(like_float, {&padded, size_t{1}});
  for (int64_t b = 0; b < batch; ++b) solve(b, aligned(static_cast<float*>(memory.data_ptr())), fe::parallel_for);
}

// What the calls of a batch share, and what is each problem's own.
class SvgdCalls {
 public:
  SvgdCalls(const Tensor& particles, const Tensor& scores, const Tensor& bandwidth, const Shape& shape, int64_t kernel,
            double beta, double c, double temperature)
      : particles_(problems(particles, shape)), scores_(problems(scores, shape)),
        bandwidths_(static_cast<const float*>(bandwidth.const_data_ptr())) {
    shared_.n = shape.n;
    shared_.d = shape.d;
    shared_.particles_dtype = fe::dtype_of(particles);
    shared_.scores_dtype = fe::dtype_of(scores);
    shared_.kernel = static_cast<int>(kernel);
    shared_.params = {static_cast<float>(beta), static_cast<float>(c)};
    shared_.temperature = static_cast<float>(temperature);
  }

  fe::SvgdCall at(int64_t index, float* workspace, fe::ParallelFor threads) const {
    fe::SvgdCall call = shared_;
    call.particles = particles_[index];
    call.scores = scores_[index];
    call.bandwidth = bandwidths_[index];
    call.workspace = workspace;
    call.parallel_for = threads;
    return call;
  }

 private:
  fe::SvgdCall shared_{};
  Problems<const char> particles_, scores_;
  const float* bandwidths_;
};

Tensor svgd_direction_cpu(Tensor particles, Tensor scores, Tensor bandwidth, int64_t kernel, double beta, double c,
                          double temperature, int64_t) {
  fe::check_kernel(kernel);
  const Shape shape = shape_of(particles, {&scores}, bandwidth);
  Tensor out = fe::empty_large(particles, particles.sizes());
  if (out.numel() == 0) return out;
  const fe::CpuKernels& kernels = fe::cpu_kernels();
  const SvgdCalls calls(particles, scores, bandwidth, shape, kernel, beta, c, temperature);
  const Problems<char> directions = problems(out, shape);
  each_problem(shape, kernels.svgd_direction_workspace(shape.n, shape.d), bandwidth,
               [&](int64_t index, float* workspace, fe::ParallelFor threads) {
                 fe::SvgdCall call = calls.at(index, workspace, threads);
                 call.direction = directions[index];
                 kernels.svgd_direction(call);
               });
  return out;
}

std::vector<Tensor> svgd_direction_backward_cpu(Tensor grad, Tensor particles, Tensor scores, Tensor bandwidth,
                                                int64_t kernel, double beta, double c, double temperature, int64_t,
                                                int64_t needs) {
  fe::check_kernel(kernel);
  const Shape shape = shape_of(particles, {&scores, &grad}, bandwidth);
  const int64_t nothing = 0;
  const auto result = [&](int which, const Tensor& operand) {
    return needs >> which & 1 ? fe::empty_large(operand, operand.sizes())
                              : torch::stable::new_empty(operand, {&nothing, size_t{1}});
  };
  std::vector<Tensor> results{result(0, particles), result(1, scores), result(2, bandwidth)};
  if (particles.numel() == 0) {
    if (needs & 4) torch::stable::zero_(results[2]);
    return results;
  }
  const fe::CpuKernels& kernels = fe::cpu_kernels();
  const SvgdCalls calls(particles, scores, bandwidth, shape, kernel, beta, c, temperature);
  const Problems<const char> grads = problems(std::as_const(grad), shape);
  const fe::DType grad_dtype = fe::dtype_of(grad);
  const Problems<char> none{}, by_particles = needs & 1 ? problems(results[0], shape) : none,
                               by_scores = needs & 2 ? problems(results[1], shape) : none;
  float* by_bandwidth = needs & 4 ? static_cast<float*>(results[2].data_ptr()) : nullptr;
  each_problem(shape, kernels.svgd_direction_backward_workspace(shape.n, shape.d), bandwidth,
               [&](int64_t index, float* workspace, fe::ParallelFor threads) {
                 fe::SvgdCall call = calls.at(index, workspace, threads);
                 call.grad = grads[index];
                 call.grad_dtype = grad_dtype;
                 call.grad_particles = by_particles[index];
                 call.grad_scores = by_scores[index];
                 if (by_bandwidth) call.grad_bandwidth = by_bandwidth + index;
                 kernels.svgd_direction_backward(call);
               });
  return results;
}

Tensor kernel_stein_discrepancy_cpu(Tensor particles, Tensor scores, Tensor bandwidth, Tensor weights, int64_t kernel,
                                    double beta, double c) {
  fe::check_kernel(kernel, true);
  const Shape shape = shape_of(particles, {&scores}, bandwidth);
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.dim() == 3 && weights.is_contiguous() &&
                      (weights.size(0) == 1 || weights.size(0) == shape.batch) && weights.size(1) == shape.n,
                  "weights must be contiguous float32 of shape [1 or batch, n, columns]");
  const int64_t columns = weights.size(2), size[2] = {shape.batch, columns};
  Tensor sums = torch::stable::empty({size, size_t{2}}, ScalarType::Double);
  if (particles.numel() == 0 || columns == 0) return torch::stable::zero_(sums);
  const fe::CpuKernels& kernels = fe::cpu_kernels();
  const Problems<const char> xs = problems(std::as_const(particles), shape), ss = problems(std::as_const(scores), shape);
  each_problem(shape, kernels.kernel_stein_discrepancy_workspace(shape.n, shape.d, columns), bandwidth,
               [&](int64_t index, float* workspace, fe::ParallelFor threads) {
                 const int64_t row = weights.size(0) == 1 ? 0 : index;
                 kernels.kernel_stein_discrepancy(
                     {shape.n, shape.d, columns, xs[index], ss[index], fe::dtype_of(particles), fe::dtype_of(scores),
                      static_cast<const float*>(weights.const_data_ptr()) + row * shape.n * columns,
                      static_cast<int>(kernel), {static_cast<float>(beta), static_cast<float>(c)},
                      static_cast<const float*>(bandwidth.const_data_ptr())[index],
                      static_cast<double*>(sums.data_ptr()) + index * columns, workspace, threads});
               });
  return sums;
}

Tensor sq_dist_rank_cpu(Tensor particles, std::vector<int64_t> ranks, std::optional<Tensor> hint) {
  STD_TORCH_CHECK(particles.dim() == 3 && particles.is_contiguous(), "particles must be contiguous, [batch, n, d]");
  const Shape shape{particles.size(0), particles.size(1), particles.size(2)};
  check_dtype(particles);
  const int64_t count = static_cast<int64_t>(ranks.size()), size[2] = {shape.batch, count};
  STD_TORCH_CHECK(!hint || (hint->scalar_type() == ScalarType::Float && hint->is_contiguous() &&
                            hint->numel() == shape.batch * count),
                  "hint must be contiguous float32 of shape [batch, ranks]");
  Tensor out = torch::stable::empty({size, size_t{2}}, ScalarType::Float);
  const Problems<const char> xs = problems(std::as_const(particles), shape);
  const auto solve = [&](int64_t index, fe::ParallelFor threads) {
    fe::cpu_kernels().sq_dist_rank(
        {shape.n, shape.d, xs[index], fe::dtype_of(particles), count, ranks.data(),
         hint ? static_cast<const float*>(hint->const_data_ptr()) + index * count : nullptr,
         static_cast<float*>(out.data_ptr()) + index * count, threads});
  };
  if (shape.batch > 1 && shape.n <= kSideBySide)
    torch::stable::parallel_for(0, shape.batch, fe::kParallelElements / (shape.n * shape.n + 1) + 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t index = begin; index < end; ++index) solve(index, nullptr);
                                });
  else
    for (int64_t index = 0; index < shape.batch; ++index) solve(index, fe::parallel_for);
  return out;
}

// What sq_dist_rank orders, for tests of it: [batch, n, n].
Tensor sq_dist_cpu(Tensor particles) {
  STD_TORCH_CHECK(particles.dim() == 3 && particles.is_contiguous(), "particles must be contiguous, [batch, n, d]");
  const Shape shape{particles.size(0), particles.size(1), particles.size(2)};
  check_dtype(particles);
  const int64_t size[3] = {shape.batch, shape.n, shape.n};
  Tensor out = torch::stable::empty({size, size_t{3}}, ScalarType::Float);
  const Problems<const char> xs = problems(std::as_const(particles), shape);
  for (int64_t index = 0; index < shape.batch; ++index)
    fe::cpu_kernels().sq_dist(shape.n, shape.d, xs[index], fe::dtype_of(particles),
                              static_cast<float*>(out.data_ptr()) + index * shape.n * shape.n);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fekernels_native, m) {
  m.def(
      "svgd_direction(Tensor particles, Tensor scores, Tensor bandwidth, int kernel, float beta, float c, "
      "float temperature, int precision) -> Tensor");
  m.def(
      "svgd_direction_backward(Tensor grad, Tensor particles, Tensor scores, Tensor bandwidth, int kernel, float beta, "
      "float c, float temperature, int precision, int needs) -> Tensor[]");
  m.def(
      "kernel_stein_discrepancy(Tensor particles, Tensor scores, Tensor bandwidth, Tensor weights, int kernel, "
      "float beta, float c) -> Tensor");
  m.def("sq_dist_rank(Tensor particles, int[] ranks, Tensor? hint) -> Tensor");
  m.def("sq_dist(Tensor particles) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) {
  m.impl("svgd_direction", TORCH_BOX(&svgd_direction_cpu));
  m.impl("svgd_direction_backward", TORCH_BOX(&svgd_direction_backward_cpu));
  m.impl("kernel_stein_discrepancy", TORCH_BOX(&kernel_stein_discrepancy_cpu));
  m.impl("sq_dist_rank", TORCH_BOX(&sq_dist_rank_cpu));
  m.impl("sq_dist", TORCH_BOX(&sq_dist_cpu));
}
