// A tile of the direction's sums in few coordinates, all at once: rows stand in the lanes of a vector, and a pair's difference
// serves its distance and the push of both its points, so that no tile of weights is written, transposed and read again. (Of 4000
// particles in two dimensions half of the time that tiles take.)
//
// A column's sum is kept as that of each of 16 lanes, lane i % 16 for row i, and those are added up as `unit_total` does: the
// bits are those of every instruction set.
#pragma once

#include "cpu/stein/tiles.h"

namespace fe::inline FE_ISA {

struct DirectTile {
  int rows, columns;
  bool diagonal;  // of the whole matrix: every pair is in it twice, and its sums go to the rows alone
  const float *own_particles, *own_scores;  // the rows', [coordinate][kTile], zero in the padding
  const float *particles, *scores;          // the columns', `stride` apart, zero in the padding
  int64_t stride;
  float *row_sums, *column_sums;  // [coordinate][kTile], added to
};

// Adds the totals of four units, `stride` apart, to four sums.
FE_HD void add_totals(const float* units, int stride, float* sums) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  Four part[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Four* unit = reinterpret_cast<const Four*>(units + i * stride);
    part[i] = (unit[0] + unit[2]) + (unit[1] + unit[3]);
  }
  const auto across = [&](int lane) { return Four{part[0][lane], part[1][lane], part[2][lane], part[3][lane]}; };
  *reinterpret_cast<Four*>(sums) += (across(0) + across(2)) + (across(1) + across(3));
}

FE_HD SignedV counting_lanes() {
  SignedV lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// sum += value s_j + push (x_i - x_j) of each pair, push = scale first, for kDimensions coordinates.
template <int kDimensions, class Kernel>
void direct_pairs(const Kernel& kernel, float to_scaled, float scale, const DirectTile& tile) {
  using L = Lane<FloatV>;
  constexpr int kParts = kUnit / kLanes;
  alignas(64) float across[kTile * kDimensions * kUnit];
  alignas(64) static constexpr uint32_t kKeep[2 * kUnit] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u,
                                                            ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
  const int padded = static_cast<int>(round_up(tile.columns, 4));
  if (!tile.diagonal) __builtin_memset(across, 0, padded * kDimensions * kUnit * sizeof(float));
  for (int base = 0; base < tile.rows; base += kUnit) {
    const int rows_left = tile.rows - base < kUnit ? tile.rows - base : kUnit;
    FloatV sum[kDimensions][kParts] = {};
    for (int j = 0; j < tile.columns; ++j) {
      const float *x = tile.particles + j * tile.stride, *s = tile.scores + j * tile.stride;
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = base + part * kLanes;
        FloatV apart[kDimensions], t{};
#pragma GCC unroll 8
        for (int k = 0; k < kDimensions; ++k) {
          apart[k] = load(tile.own_particles + k * kTile + at) - x[k];
          t = L::fma(apart[k], apart[k], t);
        }
        const Radial<FloatV> radial = kernel(t <= 0.0f ? FloatV{} : t * to_scaled);
        UnsignedV keep;
        __builtin_memcpy(&keep, kKeep + kUnit - rows_left + part * kLanes, sizeof keep);
        if (tile.diagonal) keep &= (UnsignedV)(counting_lanes() != j - static_cast<int>(at));
        const FloatV value = L::from_bits(L::bits(radial.value) & keep);
        const FloatV push = (Kernel::kFirstIsValue ? value : L::from_bits(L::bits(radial.first) & keep)) * scale;
#pragma GCC unroll 8
        for (int k = 0; k < kDimensions; ++k)
          sum[k][part] = L::fma(value, L::splat(s[k]), L::fma(push, apart[k], sum[k][part]));
        if (tile.diagonal) continue;
        float* to = across + j * kDimensions * kUnit + part * kLanes;
#pragma GCC unroll 8
        for (int k = 0; k < kDimensions; ++k) {
          const FloatV own = load(tile.own_scores + k * kTile + at);
          store(to + k * kUnit, L::fma(value, own, L::fma(-push, apart[k], load(to + k * kUnit))));
        }
      }
    }
    for (int k = 0; k < kDimensions; ++k)
      for (int part = 0; part < kParts; ++part) {
        float* to = tile.row_sums + k * kTile + base + part * kLanes;
        store(to, load(to) + sum[k][part]);
      }
  }
  if (tile.diagonal) return;
  for (int j = 0; j < padded; j += 4)
    for (int k = 0; k < kDimensions; ++k)
      add_totals(across + (j * kDimensions + k) * kUnit, kDimensions * kUnit, tile.column_sums + k * kTile + j);
}

}  // namespace fe::inline FE_ISA
