// Writes the bits of some noise, of one Langevin-Adam step of each kind, of each term of a free energy and of a
// reparameterised sample, for comparison between compilers and processors.
#include <cstdio>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/simd.h"

// The exact sums lie 2^-60 beside the middle of two floats: whoever rounds to double first rounds them the wrong way.
static void print_hard_fmas() {
  const fe::FloatV a = {0x1.001p0f, 0x1.001p0f, 0x1.003p0f, 0x1.003p0f}, b = a;
  const fe::FloatV c = {0x1p-60f, -0x1p-60f, 0x1p-60f, -0x1p-60f};
  const fe::FloatV sums = fe::Lane<fe::FloatV>::fma(a, b, c);
  std::fwrite(&sums, 4, 4, stdout);
}

static void print_term(int term, int n_params) {
  const int n = 777;
  std::vector<float> params[fe::kMaxParams], grads[fe::kMaxParams], target(n);
  const std::vector<float> row_scale(1, 0.7f);
  double sum = 0.0;
  fe::TermCall call{};
  call.term = term;
  call.rows = 1;
  call.columns = n;
  call.row_scale = row_scale.data();
  call.sums = &sum;
  for (int i = 0; i < n; ++i) target[i] = term == 0 ? i * 0.01f : static_cast<float>(i % 3 ? 0 : i % 7);
  for (int p = 0; p < n_params; ++p) {
    params[p].resize(n);
    grads[p].resize(n);
    for (int i = 0; i < n; ++i) params[p][i] = 0.05f + 0.013f * ((i * (7 + p)) % 311);
    call.inputs[p] = {params[p].data(), n, true, fe::kFloat32};
    call.grads[p] = {fe::GradKind::kFull, fe::kFloat32, grads[p].data(), n, false};
  }
  call.inputs[fe::kTarget] = {target.data(), n, true, fe::kFloat32};
  fe::cpu_kernels().free_energy_kernel(call.term)(call, 0, call.tasks());
  std::fwrite(&sum, 8, 1, stdout);
  for (int p = 0; p < n_params; ++p) std::fwrite(grads[p].data(), 4, n, stdout);
}

static void print_sample() {
  const int n = 777;
  std::vector<float> mean(n), logvar(n), z(2 * n);
  for (int i = 0; i < n; ++i) {
    mean[i] = 0.01f * i;
    logvar[i] = 0.1f * (i % 31) - 2.0f;
  }
  fe::ReparameterizeCall call{};
  call.elements = n;
  call.samples = 2;
  call.index = 99;
  call.key = fe::noise_key(5, 1, 2, fe::kLatentSample);
  call.mean = mean.data();
  call.logvar = logvar.data();
  call.z = z.data();
  fe::cpu_kernels().reparameterize(call, 0, n);
  std::fwrite(z.data(), 4, z.size(), stdout);
}

static std::vector<float> wave(int64_t size, int period) {
  std::vector<float> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = 0.037f * ((i * 29 + i / 7) % period) - 1.1f;
  return values;
}

// Several tiles at 150 x 20, differences at 70 x 3, and few particles with very many coordinates.
static void print_stein(int kernel, int64_t n, int64_t d) {
  const std::vector<float> particles = wave(n * d, 97), scores = wave(n * d, 61), grad = wave(n * d, 53);
  std::vector<float> direction(n * d), grad_particles(n * d), grad_scores(n * d);
  float grad_bandwidth = 0.0f, rank = 0.0f;
  const fe::CpuKernels& kernels = fe::cpu_kernels();
  fe::SvgdCall call{};
  call.n = n;
  call.d = d;
  call.particles = particles.data();
  call.scores = scores.data();
  call.grad = grad.data();
  call.kernel = kernel;
  call.params = {-0.3f, 1.2f};
  call.bandwidth = 1.3f * d;
  call.temperature = 0.7f;
  call.direction = direction.data();
  call.grad_particles = grad_particles.data();
  call.grad_scores = grad_scores.data();
  call.grad_bandwidth = &grad_bandwidth;
  const int64_t floats = kernels.svgd_direction_workspace(n, d) + kernels.svgd_direction_backward_workspace(n, d) +
                         kernels.kernel_stein_discrepancy_workspace(n, d, 2);
  std::vector<float> memory(floats + 16);
  call.workspace = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  kernels.svgd_direction(call);
  kernels.svgd_direction_backward(call);
  for (const auto* result : {&direction, &grad_particles, &grad_scores}) std::fwrite(result->data(), 4, n * d, stdout);
  std::fwrite(&grad_bandwidth, 4, 1, stdout);
  double sums[2] = {};
  const std::vector<float> weights = wave(2 * n, 31);
  bool finite = false;
  fe::RadialKernels<float>::visit(kernel, [&]<class Kernel>() { finite = Kernel::kHasDiscrepancy; });
  if (finite)
    kernels.kernel_stein_discrepancy({n, d, 2, particles.data(), scores.data(), fe::kFloat32, fe::kFloat32, weights.data(),
                                      kernel, call.params, call.bandwidth, sums, call.workspace, nullptr});
  std::fwrite(sums, 8, 2, stdout);
  const int64_t middle = n * (n - 1) / 4;
  kernels.sq_dist_rank({n, d, particles.data(), fe::kFloat32, 1, &middle, nullptr, &rank, nullptr});
  std::fwrite(&rank, 4, 1, stdout);
}

int main() {
  print_hard_fmas();
  for (int kernel = 0; kernel < fe::RadialKernels<float>::kCount; ++kernel) {
    print_stein(kernel, 150, 20);
    print_stein(kernel, 70, 3);
    print_stein(kernel, 10, 2100);
  }
  const int params_of_term[] = {1, 1, 2, 1, 1, 0, 2, 3, 1, 2, 3};
  for (int term = 0; term < 11; ++term)
    if (params_of_term[term]) print_term(term, params_of_term[term]);
  print_term(fe::kStandardNormalKl, 2);
  print_term(fe::kNormalKl, 4);
  print_term(fe::kValue, 1);
  print_sample();
  std::vector<float> normals(1003);
  const fe::NoiseKey key = fe::noise_key(123456789012, 9, 7, 4);
  fe::cpu_kernels().fill_philox(fe::Draw::kNormal, normals.data(), 1003, (uint64_t{1} << 34) - 500, key);
  std::fwrite(normals.data(), 4, normals.size(), stdout);
  for (int noise = 0; noise < 4; ++noise) {
    const int n = 777;
    std::vector<float> param(n), grad(n), exp_avg(n), exp_avg_sq(n);
    for (int i = 0; i < n; ++i) {
      param[i] = i * 0.01f - 3.0f;
      grad[i] = (i % 13) * 0.1f - 0.6f;
      exp_avg[i] = 0.01f * (i % 7);
      exp_avg_sq[i] = 0.001f * (i % 5);
    }
    const double temperature = noise == 3 ? 0.0 : 1e-3;
    const fe::LangevinAdamSettings settings{
        {1e-2, temperature, 0.1, 0.2, fe::kBiasCorrection}, 0.9, 0.999, 1e-6, double(noise % 3)};
    fe::LangevinAdamSpan span{};
    span.data[fe::kParam] = param.data();
    span.data[fe::kGrad] = grad.data();
    span.data[fe::kExpAvg] = exp_avg.data();
    span.data[fe::kExpAvgSq] = exp_avg_sq.data();
    span.count = n;
    span.index = 5;
    span.noise = fe::noise_key(11, 5, 3, fe::kLangevinNoise);
    span.single = fe::langevin_adam_coefficients<float>(settings, 1.0, 5, 0.0);
    fe::cpu_kernels().langevin_adam(span);
    for (const auto* result : {&param, &exp_avg, &exp_avg_sq}) std::fwrite(result->data(), 4, n, stdout);
  }
}
