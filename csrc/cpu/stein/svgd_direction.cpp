#include "cpu/stein/svgd_direction.h"

#include "cpu/stein/direct_tiles.h"
#include "cpu/stein/block_rounds.h"
#include "cpu/stein/svgd_weights.h"
#include "cpu/stein/wide_products.h"

namespace fe::FE_ISA {

namespace {

static_assert(2 * kDirectDimensions <= kUnit);

inline constexpr int64_t kGrainFlops = 1 << 19;  // fewest for a second thread: some ten microseconds

int64_t tiles_workspace(int64_t n, int64_t d) {
  const int64_t rows = round_up(n, kTile), stride = round_up(d, kUnit);
  return Points::floats(n, d) + stride + rows * (3 * stride + kUnit + 1);
}

// Particles by tiles of pairs, all coordinates at once, in tiles_workspace floats.
template <class Kernel>
class Direction {
 public:
  explicit Direction(const SvgdCall& call)
      : call_(call), points_(call.n, call.d, call.workspace), kernel_(call.params),
        to_scaled_(Kernel::kScale / call.bandwidth), scale_(repulsion_scale<Kernel>(call)) {
    const int64_t rows = points_.blocks() * kTile;
    means_ = call.workspace + Points::floats(call.n, call.d);
    values_ = means_ + points_.stride;
    sums_ = values_ + rows * points_.stride;
    row_units_ = sums_ + rows * points_.stride;
    column_sums_ = row_units_ + rows * kUnit;
    pulls_ = panels_ = column_sums_ + rows;  // of few coordinates nothing is pulled apart from the sums
  }

  void run() {
    const int64_t n = call_.n, d = call_.d, blocks = points_.blocks();
    const ParallelFor parallel_for = call_.parallel_for;
    if (!Kernel::kNeedsDifferences)
      in_parallel(parallel_for, (d + kTile - 1) / kTile, kGrainFlops / (n * kTile) + 1, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kTile, last = end * kTile < d ? end * kTile : d;
        column_means(columns(call_.particles, call_.particles_dtype).part(first, last - first), n, means_ + first);
      });
    const int64_t grain = kGrainFlops / (8 * kTile * d) + 1;
    in_parallel(parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) prepare(block);
    });
    if constexpr (!Kernel::kNeedsDifferences)
      if (is_sharp(points_.norms, n, call_.bandwidth)) return Direction<Sharp<Kernel>>(call_).run();
    const int64_t tile_flops = kTile * kTile * (6 * d + 32);
    for_all_pairs(parallel_for, blocks, group_size(blocks, d), kGrainFlops / tile_flops + 1,
                  [&](int64_t i, int64_t j) {
                    if constexpr (Kernel::kNeedsDifferences)
                      if (direct()) return meet_directly(i, j);
                    add_pair(i, j);
                  });
    in_parallel(parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) finish(block);
    });
  }

 private:
  static constexpr bool kJoined = Kernel::kFirstIsValue && !Kernel::kNeedsDifferences;  // scores and particles in one sum

  float* rows_of(float* matrix, int64_t block) const { return matrix + block * kTile * points_.stride; }

  Columns columns(const void* data, DType dtype) const { return {data, dtype, call_.d, 0, call_.d}; }

  void prepare(int64_t block) {
    const Columns particles = columns(call_.particles, call_.particles_dtype);
    if (direct())
      pack_rows(particles, nullptr, block, points_);
    else
      pack(particles, Kernel::kNeedsDifferences ? nullptr : means_, block, points_);
    const int64_t d = call_.d, stride = points_.stride;
    const int count = points_.count(block);
    for (int i = 0; i < count; ++i) {
      const float* x = points_.row_block(block) + i * stride;
      float* value = rows_of(values_, block) + i * stride;
      columns(call_.scores, call_.scores_dtype).row(block * kTile + i, value);
      for (int64_t k = d; k < stride; ++k) value[k] = 0.0f;
      if (kJoined) join_values(d, scale_, x, value);
    }
    // Sums of rows in the padding, up to the next kUnit, are made and not read; narrow ones lie a tile's width apart.
    const int64_t rows = narrow() ? kTile : round_up(count, kUnit);
    __builtin_memset(rows_of(sums_, block), 0, rows * stride * sizeof(float));
    __builtin_memset(row_units_ + block * kTile * kUnit, 0, rows * kUnit * sizeof(float));
    __builtin_memset(column_sums_ + block * kTile, 0, rows * sizeof(float));
    if (!kJoined) __builtin_memset(rows_of(pulls_, block), 0, rows * stride * sizeof(float));
    if (!direct()) return;
    float* panels = rows_of(panels_, block);
    for (int i = 0; i < count; ++i)
      for (int64_t k = 0; k < d; ++k) {
        panels[k * kTile + i] = points_.row_block(block)[i * stride + k];
        panels[(kDirectDimensions + k) * kTile + i] = rows_of(values_, block)[i * stride + k];
      }
  }

  void add_pair(int64_t a, int64_t b) {
    Weights weights;
    const int rows = points_.count(a), columns = points_.count(b);
    block_products<Kernel::kNeedsDifferences>(points_, a, points_, b, weights.value);
    const TileEdges edges{rows, columns, points_.norms + a * kTile, points_.norms + b * kTile, a == b};
    weigh<Kernel::kNeedsDifferences>(kernel_, to_scaled_, edges, weights, row_units_ + a * kTile * kUnit,
                                     a == b ? nullptr : column_sums_ + b * kTile);
    const float* push = Kernel::kFirstIsValue ? weights.value : weights.first;
    if (narrow()) {
      alignas(64) float transposed[2][kTile * kTile];
      transpose(weights.value, rows, columns, transposed[0]);
      if (!Kernel::kFirstIsValue) transpose(weights.first, rows, columns, transposed[1]);
      add_narrow(transposed[0], transposed[1], a, b);
      if (a != b) add_narrow(weights.value, push, b, a);
      return;
    }
    add<false>(weights.value, push, a, b);
    if (a != b) add<true>(weights.value, push, b, a);
  }

  void meet_directly(int64_t a, int64_t b) {
    const float* panels = rows_of(panels_, a);
    const DirectTile tile{points_.count(a), points_.count(b), a == b, panels, panels + kDirectDimensions * kTile,
                          points_.row_block(b), rows_of(values_, b), points_.stride, rows_of(sums_, a), rows_of(sums_, b)};
    if (call_.d <= 2) return direct_pairs<2>(kernel_, to_scaled_, scale_, tile);
    if (call_.d <= 4) return direct_pairs<4>(kernel_, to_scaled_, scale_, tile);
    direct_pairs<8>(kernel_, to_scaled_, scale_, tile);
  }

  // Sums over the columns b, into the rows a.
  void add_narrow(const float* value, const float* push, int64_t a, int64_t b) {
    const int64_t stride = points_.stride, d = call_.d;
    const int rows = points_.count(a), terms = points_.count(b);
    narrow_sums(value, rows, terms, rows_of(values_, b), stride, d, rows_of(sums_, a));
    if (!kJoined) narrow_sums(push, rows, terms, points_.row_block(b), stride, d, rows_of(pulls_, a));
  }

  template <bool kTransposed>
  void add(const float* value, const float* push, int64_t a, int64_t b) {
    const int64_t stride = points_.stride;
    const int rows = points_.count(a), terms = points_.count(b);
    weighted_sums<kTransposed>(value, rows, terms, rows_of(values_, b), stride, stride, rows_of(sums_, a));
    if (Kernel::kNeedsDifferences)
      difference_sums<kTransposed>(push, rows, terms, points_.row_block(a), points_.row_block(b), stride, stride,
                                   rows_of(pulls_, a));
    else if (!kJoined)
      weighted_sums<kTransposed>(push, rows, terms, points_.row_block(b), stride, stride, rows_of(pulls_, a));
  }

  void finish(int64_t block) {
    const int64_t d = call_.d, stride = points_.stride;
    float* scores = rows_of(values_, block);  // no longer needed as values
    for (int i = 0; i < points_.count(block); ++i) {
      const int64_t row = block * kTile + i;
      columns(call_.scores, call_.scores_dtype).row(row, scores);
      alignas(64) float narrow_sum[kUnit], narrow_pull[kUnit];
      float* sum = row_of_sums(sums_, block, i, narrow_sum);
      const float* pull = kJoined || direct() ? nullptr : row_of_sums(pulls_, block, i, narrow_pull);
      const float repelling = unit_total(row_units_ + row * kUnit) + column_sums_[row];
      finish_row(kernel_, call_.n, d, scale_, repelling, points_.row_block(block) + i * stride, scores, pull, sum);
      from_float(sum, static_cast<int>(d), call_.direction, call_.particles_dtype, row * d);
    }
  }

  // Sums of so few coordinates lie as [coordinate][row].
  bool narrow() const { return Kernel::kNeedsDifferences ? direct() : call_.d <= kUnit; }
  bool direct() const { return Kernel::kNeedsDifferences && call_.d <= kDirectDimensions; }

  float* row_of_sums(float* sums, int64_t block, int i, float* gathered) const {
    if (!narrow()) return rows_of(sums, block) + i * points_.stride;
    for (int64_t k = 0; k < kUnit; ++k) gathered[k] = k < call_.d ? rows_of(sums, block)[k * kTile + i] : 0.0f;
    return gathered;
  }

  const SvgdCall& call_;
  Points points_;
  Kernel kernel_;
  float to_scaled_, scale_;
  float *means_, *values_, *sums_, *row_units_, *column_sums_, *pulls_;
  float* panels_;  // particles and scores of a block, [coordinate][row], kDirectDimensions each
};

}  // namespace

int64_t svgd_direction_workspace(int64_t n, int64_t d) {
  if (is_small(n, d)) return 0;
  return WideShape::fits(n, d) ? svgd_direction_wide_workspace(n, d) : tiles_workspace(n, d);
}

void svgd_direction(const SvgdCall& call) {
  if (is_small(call.n, call.d)) return svgd_direction_small(call);
  if (WideShape::fits(call.n, call.d)) return svgd_direction_wide(call);
  with_kernel<FloatV>(call.kernel, [&]<class Kernel>() {
    if constexpr (!Kernel::kNeedsDifferences)
      if (call.d <= kDirectDimensions) return Direction<Sharp<Kernel>>(call).run();
    Direction<Kernel>(call).run();
  });
}

}  // namespace fe::FE_ISA
