// What the algorithms of a Stein direction share: a tile's weights, and a row before and after its sum.
//
// The sum over j of k_ij s_j + temperature g_ij (x_i - x_j), g = first / h, is kept as sums of values: those of s_j under the
// weight k_ij and of x_j under g_ij, or, where the two weights are proportional, of s_j - scale x_j under one. The part of
// x_i, scale r_i x_i with r_i the sum of its weights, is added at the end. Its rounding is that of x_i r_i, up to eight times
// the sum where the bandwidth is not far below the spread of the points (`is_sharp`). Where it is, for the Laplace kernel and
// for few coordinates the differences x_i - x_j themselves are summed.
#pragma once

#include "cpu/stein/tiles.h"
#include "cpu/stein/svgd_direction.h"

namespace fe::inline FE_ISA {

// The second algorithm, for few particles with very many coordinates.
SvgdKernel svgd_direction_wide;
SvgdWorkspace svgd_direction_wide_workspace;

// The third, for few particles with few coordinates; it takes no workspace and no threads. It does without the packing of
// whole tiles, but takes five operations per pair and coordinate where those take two: from 64 particles of 48 coordinates
// on (rbf) they are as fast, at 16 of 6 four times slower.
inline constexpr int kSmallDimensions = 48;
inline bool is_small(int64_t n, int64_t d) { return n <= kTile && d <= kSmallDimensions; }
SvgdKernel svgd_direction_small;

// Weights of one tile: the kernel's values and, where those are not proportional, its first derivatives.
struct Weights {
  alignas(64) float value[kTile * kTile];
  alignas(64) float first[kTile * kTile];
};

// The edges of a tile: its norms, and whether its diagonal is that of the whole matrix.
struct TileEdges {
  int rows, columns;
  const float *row_norms, *column_norms;
  bool diagonal;
};

// From `products` in `value`: the weights, and (without differences) the sums of those that repel (`first`, or `value` where it
// serves for both) over columns into row_units, 16 floats per row, and over rows into column_sums (null: not wanted).
template <bool kDifferences, class Kernel>
void weigh(const Kernel& kernel, float scale, const TileEdges& edges, Weights& weights, float* row_units,
           float* column_sums) {
  FloatV down[kTile / kLanes] = {};
  const auto all_rows = [&]<bool kWhole>() __attribute__((always_inline)) {
    const int padded = kWhole ? kTile : static_cast<int>(round_up(edges.columns, kUnit));
    for (int i = 0; i < edges.rows; ++i) {
      float *value = weights.value + i * kTile, *first = weights.first + i * kTile;
      float* repelling = Kernel::kFirstIsValue ? value : first;
      FloatV across[kUnit / kLanes] = {};
      const auto sum = [&](int j, FloatV weight) {
        if (kDifferences) return;
        across[j % kUnit / kLanes] = across[j % kUnit / kLanes] + weight;
        down[j / kLanes] = down[j / kLanes] + weight;
      };
#pragma GCC unroll 4
      for (int j = 0; j < padded; j += kLanes) {
        const FloatV t = sq_dist<kDifferences>(value + j, edges.row_norms[i], edges.column_norms + j);
        const Radial<FloatV> k = kernel(t <= 0.0f ? FloatV{} : t * scale);
        // Coincident points do not push each other: of first x_i - first x_j the rounding would be left, times 1 / h.
        const FloatV push = Kernel::kFirstIsValue ? k.value : t <= 0.0f ? FloatV{} : k.first;
        store(value + j, k.value);
        if (!Kernel::kFirstIsValue) store(first + j, push);
        if (kWhole) sum(j, push);
      }
      if (!kWhole) {
        if (edges.diagonal) value[i] = repelling[i] = 0.0f;
        for (int j = edges.columns; j < padded; ++j) value[j] = repelling[j] = 0.0f;
        for (int j = 0; j < padded; j += kLanes) sum(j, load(repelling + j));
      }
      if (kDifferences) continue;
      for (int j = 0; j < kUnit; j += kLanes) add_to_unit(row_units + i * kUnit, j, across[j / kLanes]);
    }
  };
  // 64 columns and no diagonal are nearly every tile, and nothing is to be cleared.
  if (edges.columns == kTile && !edges.diagonal) all_rows.template operator()<true>();
  else all_rows.template operator()<false>();
  if (!column_sums) return;
  for (int j = 0; j < edges.columns; j += kLanes) store(column_sums + j, load(column_sums + j) + down[j / kLanes]);
}

// What a tile's repelling weight is to be multiplied by.
template <class Kernel>
float repulsion_scale(const SvgdCall& call) {
  return call.temperature * (Kernel::kFirstIsValue ? 2.0f : 1.0f) * inverse_bandwidth(call.bandwidth);
}

// values = scores - scale x, in edges.
FE_HD void join_values(int64_t count, float scale, const float* x, float* values) {
  for (int64_t k = 0; k < count; k += kLanes)
    store(values + k, Lane<FloatV>::fma(Lane<FloatV>::splat(-scale), load(x + k), load(values + k)));
}

// The row's sum over all others, in place of the sum of its values; `pull` is the sum of x_j where that is apart, or of
// x_i - x_j where that is not in it.
template <class Kernel>
FE_HD void total_row(int64_t count, float scale, float repelling, const float* x, const float* pull, float* sum) {
  const FloatV push = Lane<FloatV>::splat(scale * repelling), pulling = Lane<FloatV>::splat(-scale);
  for (int64_t k = 0; k < count; k += kLanes) {
    FloatV total = load(sum + k);
    if (Kernel::kNeedsDifferences) {
      if (pull) total = Lane<FloatV>::fma(Lane<FloatV>::splat(scale), load(pull + k), total);
    } else {
      total = Lane<FloatV>::fma(push, load(x + k), total);
      if (!Kernel::kFirstIsValue) total = Lane<FloatV>::fma(pulling, load(pull + k), total);
    }
    store(sum + k, total);
  }
}

// The row's direction, in place of its total.
template <class Kernel>
FE_HD void complete_row(const Kernel& kernel, int64_t n, int64_t count, const float* scores, float* total) {
  const float inverse_n = 1.0f / static_cast<float>(n);
  const FloatV at_zero = kernel(FloatV{}).value;
  for (int64_t k = 0; k < count; k += kLanes)
    store(total + k, Lane<FloatV>::fma(at_zero, load(scores + k), load(total + k)) * inverse_n);
}

}  // namespace fe::inline FE_ISA
