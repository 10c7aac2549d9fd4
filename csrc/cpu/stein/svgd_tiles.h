// The direction by tiles of pairs, all coordinates at once: what a block of 64 particles holds, what two blocks that meet add to
// each other's sums, and a row's total of them.
//
// A block lies in two records: what is only read (particles, values and what inner products are taken of), and the sums.
// Processes that share one problem hand blocks on, or their sums alone: each record is one piece of memory, which says all
// about its block wherever it lies.
#pragma once

#include "cpu/stein/direct_tiles.h"
#include "cpu/stein/svgd_weights.h"

namespace fe::inline FE_ISA {

static_assert(2 * kDirectDimensions <= kUnit);

template <class Kernel>
class SvgdTiles {
 public:
  struct Block {
    Points points;   // of this block alone
    float* values;   // what is summed: scores, or scores - scale x
    float* panels;   // of few coordinates: particles and scores, [coordinate][row], kDirectDimensions each
    float *sums, *row_units, *column_sums;
    float* pulls;    // sums of particles, where those are not in `sums`
  };

  static bool direct(int64_t d) { return Kernel::kNeedsDifferences && d <= kDirectDimensions; }

  // Floats of a block's two records; whole cache lines.
  static int64_t fixed_floats(int64_t d) {
    return 2 * kTile * round_up(d, kUnit) + (direct(d) ? 2 * kDirectDimensions * kTile : kTile * (d + 1));
  }
  static int64_t sum_floats(int64_t d) {
    return (kJoined || direct(d) ? 1 : 2) * kTile * round_up(d, kUnit) + kTile * (kUnit + 1);
  }

  // Records of blocks so many floats apart. The call's particles and scores are read by `prepare` and `finish` alone.
  SvgdTiles(const SvgdCall& call, float* fixed, int64_t fixed_stride, float* sums, int64_t sums_stride)
      : call_(call), kernel_(call.params), to_scaled_(scale_of<Kernel>(call.bandwidth)),
        scale_(repulsion_scale<Kernel>(call)), fixed_(fixed), sums_(sums), fixed_stride_(fixed_stride),
        sums_stride_(sums_stride) {}
  explicit SvgdTiles(const SvgdShare& share)
      : SvgdTiles(share.call, share.fixed, share.fixed_stride, share.sums, share.sums_stride) {}

  // Block number `index` of all n particles, in record `slot`.
  Block at(int64_t slot, int64_t index) const {
    const int64_t d = call_.d, left = call_.n - index * kTile, size = kTile * round_up(d, kUnit);
    float *fixed = fixed_ + slot * fixed_stride_, *sums = sums_ + slot * sums_stride_, *panels = fixed + 2 * size;
    float* column_sums = sums + size + kTile * kUnit;
    return {Points(left < kTile ? left : kTile, d, fixed, panels, panels + kTile * d), fixed + size, panels, sums, sums + size,
            column_sums, column_sums + kTile};
  }

  // From particles and scores `first` and so on, less `means` where inner products are taken; with sums of 0.
  void prepare(const Block& block, int64_t first, const float* means) const {
    const int64_t d = call_.d, stride = block.points.stride;
    const Columns particles = rows(call_.particles, call_.particles_dtype, first);
    if (direct(d))
      pack_rows(particles, nullptr, 0, block.points);
    else
      pack(particles, Kernel::kNeedsDifferences ? nullptr : means, 0, block.points);
    const Columns scores = rows(call_.scores, call_.scores_dtype, first);
    const int count = block.points.count(0);
    for (int i = 0; i < count; ++i) {
      float* value = block.values + i * stride;
      scores.row(i, value);
      for (int64_t k = d; k < stride; ++k) value[k] = 0.0f;
      if (kJoined) join_values(d, scale_, block.points.rows + i * stride, value);
    }
    __builtin_memset(block.sums, 0, sum_floats(d) * sizeof(float));
    if (!direct(d)) return;
    __builtin_memset(block.panels, 0, 2 * kDirectDimensions * kTile * sizeof(float));
    for (int i = 0; i < count; ++i)
      for (int64_t k = 0; k < d; ++k) {
        block.panels[k * kTile + i] = block.points.rows[i * stride + k];
        block.panels[(kDirectDimensions + k) * kTile + i] = block.values[i * stride + k];
      }
  }

  // Adds what each particle of one block does to those of the other, both ways; `same`: of one block, each pair once.
  void meet(const Block& a, const Block& b, bool same) const {
    if constexpr (Kernel::kNeedsDifferences)
      if (direct(call_.d)) return meet_directly(a, b, same);
    Weights weights;
    const int rows = a.points.count(0), columns = b.points.count(0);
    block_products<Kernel::kNeedsDifferences>(a.points, 0, b.points, 0, weights.value);
    const TileEdges edges{rows, columns, a.points.norms, b.points.norms, same};
    weigh<Kernel::kNeedsDifferences>(kernel_, to_scaled_, edges, weights, a.row_units, same ? nullptr : b.column_sums);
    const float* push = Kernel::kFirstIsValue ? weights.value : weights.first;
    if (narrow()) {
      alignas(64) float transposed[2][kTile * kTile];
      transpose(weights.value, rows, columns, transposed[0]);
      if (!Kernel::kFirstIsValue) transpose(weights.first, rows, columns, transposed[1]);
      add_narrow(transposed[0], transposed[1], a, b);
      if (!same) add_narrow(weights.value, push, b, a);
      return;
    }
    add<false>(weights.value, push, a, b);
    if (!same) add<true>(weights.value, push, b, a);
  }

  // total(i): float32 sums of row i over all others, up to the score's own term, which `complete_row` adds.
  template <class Total>
  void totals(const Block& block, Total total) const {
    const int64_t stride = block.points.stride;
    for (int i = 0; i < block.points.count(0); ++i) {
      alignas(64) float narrow_sum[kUnit], narrow_pull[kUnit];
      float* sum = row_of(block.sums, i, stride, narrow_sum);
      const float* pull = kJoined || direct(call_.d) ? nullptr : row_of(block.pulls, i, stride, narrow_pull);
      const float repelling = unit_total(block.row_units + i * kUnit) + block.column_sums[i];
      total_row<Kernel>(call_.d, scale_, repelling, block.points.rows + i * stride, pull, sum);
      total(i, sum);
    }
  }

  // Writes the directions of particles `first` and so on. The block's values are lost.
  void finish(const Block& block, int64_t first) const {
    const Columns scores = rows(call_.scores, call_.scores_dtype, first);
    totals(block, [&](int i, float* total) {
      scores.row(i, block.values);
      complete_row(kernel_, call_.n, call_.d, block.values, total);
      from_float(total, static_cast<int>(call_.d), call_.direction, call_.particles_dtype, (first + i) * call_.d);
    });
  }

 private:
  static constexpr bool kJoined = Kernel::kFirstIsValue && !Kernel::kNeedsDifferences;  // scores and particles in one sum

  Columns rows(const void* data, DType dtype, int64_t first) const {
    return {data, dtype, call_.d, first * call_.d, call_.d};
  }

  void meet_directly(const Block& a, const Block& b, bool same) const {
    const DirectTile tile{a.points.count(0), b.points.count(0), same, a.panels, a.panels + kDirectDimensions * kTile,
                          b.points.rows, b.values, b.points.stride, a.sums, b.sums};
    if (call_.d <= 2) return direct_pairs<2>(kernel_, to_scaled_, scale_, tile);
    if (call_.d <= 4) return direct_pairs<4>(kernel_, to_scaled_, scale_, tile);
    direct_pairs<8>(kernel_, to_scaled_, scale_, tile);
  }

  // Sums over the columns b, into the rows a.
  void add_narrow(const float* value, const float* push, const Block& a, const Block& b) const {
    const int64_t stride = b.points.stride, d = call_.d;
    const int rows = a.points.count(0), terms = b.points.count(0);
    narrow_sums(value, rows, terms, b.values, stride, d, a.sums);
    if (!kJoined) narrow_sums(push, rows, terms, b.points.rows, stride, d, a.pulls);
  }

  template <bool kTransposed>
  void add(const float* value, const float* push, const Block& a, const Block& b) const {
    const int64_t stride = b.points.stride;
    const int rows = a.points.count(0), terms = b.points.count(0);
    weighted_sums<kTransposed>(value, rows, terms, b.values, stride, stride, a.sums);
    if (Kernel::kNeedsDifferences)
      difference_sums<kTransposed>(push, rows, terms, a.points.rows, b.points.rows, stride, stride, a.pulls);
    else if (!kJoined)
      weighted_sums<kTransposed>(push, rows, terms, b.points.rows, stride, stride, a.pulls);
  }

  // Sums of so few coordinates lie as [coordinate][row].
  bool narrow() const { return Kernel::kNeedsDifferences ? direct(call_.d) : call_.d <= kUnit; }

  float* row_of(float* sums, int i, int64_t stride, float* gathered) const {
    if (!narrow()) return sums + i * stride;
    for (int64_t k = 0; k < kUnit; ++k) gathered[k] = k < call_.d ? sums[k * kTile + i] : 0.0f;
    return gathered;
  }

  const SvgdCall& call_;
  Kernel kernel_;
  float to_scaled_, scale_;
  float *fixed_, *sums_;
  int64_t fixed_stride_, sums_stride_;
};

}  // namespace fe::inline FE_ISA
