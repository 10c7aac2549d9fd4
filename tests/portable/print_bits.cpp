// Writes the bits of some noise and of one Langevin-Adam step of each kind, for comparison between compilers and processors.
#include <cstdio>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/lanes.h"

// The exact sums lie 2^-60 beside the middle of two floats: whoever rounds to double first rounds them the wrong way.
static void print_hard_fmas() {
  const fe::FloatV a = {0x1.001p0f, 0x1.001p0f, 0x1.003p0f, 0x1.003p0f}, b = a;
  const fe::FloatV c = {0x1p-60f, -0x1p-60f, 0x1p-60f, -0x1p-60f};
  const fe::FloatV sums = fe::Lane<fe::FloatV>::fma(a, b, c);
  std::fwrite(&sums, 4, 4, stdout);
}

int main() {
  print_hard_fmas();
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
    const fe::LangevinAdamGroup group{1e-2, temperature, 0.9, 0.999, 1e-6, 0.1, 0.2, 0, 0, 1,
                                      static_cast<fe::Noise>(noise % 3), fe::kBiasCorrection};
    fe::LangevinAdamSpan span{};
    span.data[fe::kParam] = param.data();
    span.data[fe::kGrad] = grad.data();
    span.data[fe::kExpAvg] = exp_avg.data();
    span.data[fe::kExpAvgSq] = exp_avg_sq.data();
    span.count = n;
    span.index = 5;
    span.noise = fe::noise_key(11, 5, 3, fe::kLangevinNoise);
    span.single = fe::langevin_adam_coefficients<float>(group, 5);
    fe::cpu_kernels().langevin_adam(span);
    for (const auto* result : {&param, &exp_avg, &exp_avg_sq}) std::fwrite(result->data(), 4, n, stdout);
  }
}
