// The direction of few particles with few coordinates, such as those of many small problems at once. Rows stand in the
// lanes of a vector, and both terms come from differences: exact where points lie close together, whatever the bandwidth,
// so that neither means nor a form for sharp bandwidths are needed. A particle's own term is one of the sum, exactly
// kernel(0) s_i. Nothing is packed, and all of a problem stays in the L1 cache.
//
// Every sum is in the order of its index, so that the bits are those of every instruction set.
#include "cpu/stein/svgd_weights.h"

namespace fe::FE_ISA {

namespace {

inline constexpr int kTogether = 4;  // columns at a time: their kernel functions fill each other's waiting
inline constexpr int kMostValues = kTile * kSmallDimensions;

// Coordinates and sums of kLanes rows, [coordinate][row].
struct Rows {
  alignas(64) float particles[kSmallDimensions * kLanes];
  alignas(64) float attraction[kSmallDimensions * kLanes];
  alignas(64) float repulsion[kSmallDimensions * kLanes];
};

const float* floats(const void* data, DType dtype, int count, float* converted) {
  if (dtype == kFloat32) return static_cast<const float*>(data);
  to_float(data, dtype, 0, count, converted);
  return converted;
}

// to[c][r] = from[r][c], by fours where there are as many; the last four overlap those before them.
void transpose(const float* from, int from_stride, int rows, int columns, float* to, int to_stride) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  if (rows < 4 || columns < 4) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
    return;
  }
  for (int row = 0; row < rows; row += 4)
    for (int column = 0; column < columns; column += 4) {
      const int r = row < rows - 4 ? row : rows - 4, c = column < columns - 4 ? column : columns - 4;
      const auto in = [&](int i) { return *reinterpret_cast<const Four*>(from + (r + i) * from_stride + c); };
      const Four v0 = in(0), v1 = in(1), v2 = in(2), v3 = in(3);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<Four*>(to + (c + i) * to_stride + r) = Four{v0[i], v1[i], v2[i], v3[i]};
    }
}

// Adds the terms of kColumns particles, whose coordinates and scores are given.
template <int kColumns, class Kernel>
FE_HD void add_pairs(const Kernel& kernel, float to_scaled, int d, const float* particles, const float* scores, Rows& rows) {
  FloatV t[kColumns] = {}, value[kColumns], push[kColumns];
  for (int k = 0; k < d; ++k) {
    const FloatV x = load(rows.particles + k * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const FloatV apart = x - particles[j * d + k];
      t[j] = Lane<FloatV>::fma(apart, apart, t[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) {
    const Radial<FloatV> radial = kernel(t[j] <= 0.0f ? FloatV{} : t[j] * to_scaled);
    value[j] = radial.value;
    push[j] = Kernel::kFirstIsValue ? radial.value : radial.first;
  }
  for (int k = 0; k < d; ++k) {
    const FloatV x = load(rows.particles + k * kLanes);
    float *attraction = rows.attraction + k * kLanes, *repulsion = rows.repulsion + k * kLanes;
    FloatV attracted = load(attraction), repelled = load(repulsion);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      attracted = Lane<FloatV>::fma(value[j], Lane<FloatV>::splat(scores[j * d + k]), attracted);
      repelled = Lane<FloatV>::fma(push[j], x - particles[j * d + k], repelled);
    }
    store(attraction, attracted);
    store(repulsion, repelled);
  }
}

template <class Kernel>
void direction(const SvgdCall& call) {
  const Kernel kernel(call.params);
  const int n = static_cast<int>(call.n), d = static_cast<int>(call.d);
  const float to_scaled = scale_of<Kernel>(call.bandwidth), scale = repulsion_scale<Kernel>(call);
  const float inverse_n = 1.0f / static_cast<float>(n);
  float converted_particles[kMostValues], converted_scores[kMostValues], result[kMostValues];
  const float* particles = floats(call.particles, call.particles_dtype, n * d, converted_particles);
  const float* scores = floats(call.scores, call.scores_dtype, n * d, converted_scores);
  float* out = call.particles_dtype == kFloat32 ? static_cast<float*>(call.direction) : result;
  Rows rows;
  for (int first = 0; first < n; first += kLanes) {
    const int count = n - first < kLanes ? n - first : kLanes;
    if (count < kLanes) __builtin_memset(rows.particles, 0, d * kLanes * sizeof(float));
    transpose(particles + first * d, d, count, d, rows.particles, kLanes);
    __builtin_memset(rows.attraction, 0, d * kLanes * sizeof(float));
    __builtin_memset(rows.repulsion, 0, d * kLanes * sizeof(float));
    int j = 0;
    for (; j + kTogether <= n; j += kTogether)
      add_pairs<kTogether>(kernel, to_scaled, d, particles + j * d, scores + j * d, rows);
    for (; j < n; ++j) add_pairs<1>(kernel, to_scaled, d, particles + j * d, scores + j * d, rows);
    for (int k = 0; k < d; ++k) {
      float* sum = rows.attraction + k * kLanes;
      store(sum, Lane<FloatV>::fma(Lane<FloatV>::splat(scale), load(rows.repulsion + k * kLanes), load(sum)) * inverse_n);
    }
    transpose(rows.attraction, kLanes, d, count, out + first * d, d);
  }
  if (out == result) from_float(result, n * d, call.direction, call.particles_dtype, 0);
}

}  // namespace

void svgd_direction_small(const SvgdCall& call) {
  with_kernel<FloatV>(call.kernel, [&]<class Kernel>() { direction<Kernel>(call); });
}

}  // namespace fe::FE_ISA
