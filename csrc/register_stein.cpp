// The ops of Stein's method on the CPU: batches of problems, their workspaces and threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "large_tensors.h"
#include "register.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void parallel_for(int64_t tasks, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, tasks, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

struct Shape {
  int64_t batch, n, d;
};

Shape shape_of(const Tensor& particles, std::initializer_list<const Tensor*> alike, const Tensor& bandwidth) {
  STD_TORCH_CHECK(particles.dim() == 3 && particles.is_contiguous(), "particles must be contiguous, [batch, n, d]");
  const Shape shape{particles.size(0), particles.size(1), particles.size(2)};
  for (const Tensor* tensor : alike)
    STD_TORCH_CHECK(tensor->dim() == 3 && tensor->size(0) == shape.batch && tensor->size(1) == shape.n &&
                        tensor->size(2) == shape.d && tensor->is_contiguous(),
                    "scores and grad must be contiguous and of particles' shape");
  STD_TORCH_CHECK(bandwidth.scalar_type() == ScalarType::Float && bandwidth.is_contiguous() &&
                      bandwidth.numel() == shape.batch,
                  "bandwidth must be contiguous float32 of shape [batch]");
  return shape;
}

size_t bytes(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float ? 4 : 2; }

const void* problem(const Tensor& tensor, const Shape& shape, int64_t index) {
  return static_cast<const char*>(tensor.const_data_ptr()) + index * shape.n * shape.d * bytes(tensor);
}

void* problem(Tensor& tensor, const Shape& shape, int64_t index) {
  return static_cast<char*>(tensor.data_ptr()) + index * shape.n * shape.d * bytes(tensor);
}

inline constexpr int64_t kSideBySide = 512;  // particles of a problem that a thread takes on its own
inline constexpr int64_t kSmallWorkspace = 1 << 18;  // floats: a problem that stays in the L2 cache of one processor

// Runs solve(problem, workspace, parallel_for): small problems side by side, large ones one after the other, each on all
// threads. A problem's result is the same both ways.
template <class Solve>
void each_problem(int64_t batch, int64_t workspace_floats, const Tensor& like_float, Solve solve) {
  const int64_t padded = workspace_floats + 16;
  const auto aligned = [](float* memory) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  };
  if (batch > 1 && padded <= kSmallWorkspace) {
    const int64_t grain = std::max<int64_t>(1, fe::kParallelElements / padded);
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> memory(padded);
      for (int64_t b = begin; b < end; ++b) solve(b, aligned(memory.data()), nullptr);
    });
    return;
  }
  const Tensor memory = fe::empty_large(like_float, {&padded, size_t{1}});
  for (int64_t b = 0; b < batch; ++b) solve(b, aligned(static_cast<float*>(memory.data_ptr())), parallel_for);
}

fe::SvgdCall svgd_call(const Tensor& particles, const Tensor& scores, const Tensor& bandwidth, const Shape& shape,
                       int64_t index, int64_t kernel, double beta, double c, double temperature) {
  fe::SvgdCall call{};
  call.n = shape.n;
  call.d = shape.d;
  call.particles = problem(particles, shape, index);
  call.scores = problem(scores, shape, index);
  call.particles_dtype = fe::dtype_of(particles);
  call.scores_dtype = fe::dtype_of(scores);
  call.kernel = static_cast<int>(kernel);
  call.params = {static_cast<float>(beta), static_cast<float>(c)};
  call.bandwidth = static_cast<const float*>(bandwidth.const_data_ptr())[index];
  call.temperature = static_cast<float>(temperature);
  return call;
}

void check_kernel(int64_t kernel) {
  STD_TORCH_CHECK(kernel >= fe::kRbf && kernel <= fe::kLaplace, "kernel must be 0 (rbf), 1 (imq) or 2 (laplace)");
}

Tensor svgd_direction_cpu(Tensor particles, Tensor scores, Tensor bandwidth, int64_t kernel, double beta, double c,
                          double temperature, int64_t) {
  check_kernel(kernel);
  const Shape shape = shape_of(particles, {&scores}, bandwidth);
  Tensor out = fe::empty_large(particles, particles.sizes());
  if (out.numel() == 0) return out;
  const fe::CpuKernels& kernels = fe::cpu_kernels();
  each_problem(shape.batch, kernels.svgd_direction_workspace(shape.n, shape.d), bandwidth,
               [&](int64_t index, float* workspace, fe::ParallelFor threads) {
                 fe::SvgdCall call =
                     svgd_call(particles, scores, bandwidth, shape, index, kernel, beta, c, temperature);
                 call.direction = problem(out, shape, index);
                 call.workspace = workspace;
                 call.parallel_for = threads;
                 kernels.svgd_direction(call);
               });
  return out;
}

std::vector<Tensor> svgd_direction_backward_cpu(Tensor grad, Tensor particles, Tensor scores, Tensor bandwidth,
                                                int64_t kernel, double beta, double c, double temperature, int64_t,
                                                int64_t needs) {
  check_kernel(kernel);
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
  each_problem(shape.batch, kernels.svgd_direction_backward_workspace(shape.n, shape.d), bandwidth,
               [&](int64_t index, float* workspace, fe::ParallelFor threads) {
                 fe::SvgdCall call =
                     svgd_call(particles, scores, bandwidth, shape, index, kernel, beta, c, temperature);
                 call.grad = problem(grad, shape, index);
                 call.grad_dtype = fe::dtype_of(grad);
                 if (needs & 1) call.grad_particles = problem(results[0], shape, index);
                 if (needs & 2) call.grad_scores = problem(results[1], shape, index);
                 if (needs & 4) call.grad_bandwidth = static_cast<float*>(results[2].data_ptr()) + index;
                 call.workspace = workspace;
                 call.parallel_for = threads;
                 kernels.svgd_direction_backward(call);
               });
  return results;
}

Tensor kernel_stein_discrepancy_cpu(Tensor particles, Tensor scores, Tensor bandwidth, Tensor weights, int64_t kernel,
                                    double beta, double c) {
  STD_TORCH_CHECK(kernel == fe::kRbf || kernel == fe::kImq, "kernel must be 0 (rbf) or 1 (imq)");
  const Shape shape = shape_of(particles, {&scores}, bandwidth);
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.dim() == 3 && weights.is_contiguous() &&
                      (weights.size(0) == 1 || weights.size(0) == shape.batch) && weights.size(1) == shape.n,
                  "weights must be contiguous float32 of shape [1 or batch, n, columns]");
  const int64_t columns = weights.size(2), size[2] = {shape.batch, columns};
  Tensor sums = torch::stable::empty({size, size_t{2}}, ScalarType::Double);
  if (particles.numel() == 0 || columns == 0) return torch::stable::zero_(sums);
  const fe::CpuKernels& kernels = fe::cpu_kernels();
  each_problem(shape.batch, kernels.kernel_stein_discrepancy_workspace(shape.n, shape.d, columns), bandwidth,
               [&](int64_t index, float* workspace, fe::ParallelFor threads) {
                 const int64_t row = weights.size(0) == 1 ? 0 : index;
                 kernels.kernel_stein_discrepancy(
                     {shape.n, shape.d, columns, problem(particles, shape, index), problem(scores, shape, index),
                      fe::dtype_of(particles), fe::dtype_of(scores),
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
  const int64_t count = static_cast<int64_t>(ranks.size()), size[2] = {shape.batch, count};
  STD_TORCH_CHECK(!hint || (hint->scalar_type() == ScalarType::Float && hint->is_contiguous() &&
                            hint->numel() == shape.batch * count),
                  "hint must be contiguous float32 of shape [batch, ranks]");
  Tensor out = torch::stable::empty({size, size_t{2}}, ScalarType::Float);
  const auto solve = [&](int64_t index, fe::ParallelFor threads) {
    fe::cpu_kernels().sq_dist_rank(
        {shape.n, shape.d, problem(particles, shape, index), fe::dtype_of(particles), count, ranks.data(),
         hint ? static_cast<const float*>(hint->const_data_ptr()) + index * count : nullptr,
         static_cast<float*>(out.data_ptr()) + index * count, threads});
  };
  if (shape.batch > 1 && shape.n <= kSideBySide)
    torch::stable::parallel_for(0, shape.batch, fe::kParallelElements / (shape.n * shape.n + 1) + 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t index = begin; index < end; ++index) solve(index, nullptr);
                                });
  else
    for (int64_t index = 0; index < shape.batch; ++index) solve(index, parallel_for);
  return out;
}

// What sq_dist_rank orders, for tests of it: [batch, n, n].
Tensor sq_dist_cpu(Tensor particles) {
  STD_TORCH_CHECK(particles.dim() == 3 && particles.is_contiguous(), "particles must be contiguous, [batch, n, d]");
  const Shape shape{particles.size(0), particles.size(1), particles.size(2)};
  const int64_t size[3] = {shape.batch, shape.n, shape.n};
  Tensor out = torch::stable::empty({size, size_t{3}}, ScalarType::Float);
  for (int64_t index = 0; index < shape.batch; ++index)
    fe::cpu_kernels().sq_dist(shape.n, shape.d, problem(particles, shape, index), fe::dtype_of(particles),
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
