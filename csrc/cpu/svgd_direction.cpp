#include "cpu/svgd_direction.h"

#include "cpu/rounds.h"
#include "cpu/svgd_weights.h"
#include "cpu/wide_products.h"

namespace fe::FE_ISA {

namespace {

inline constexpr int64_t kGrainFlops = 1 << 19;  // fewest for a second thread: some ten microseconds

// Particles by tiles of pairs, all coordinates at once.
template <class Kernel>
class Direction {
 public:
  static int64_t floats(int64_t n, int64_t d) {
    const int64_t rows = round_up(n, kTile), stride = round_up(d, kUnit);
    return Points::floats(n, d) + stride + rows * (2 * stride + kUnit + 1) + (Kernel::kFirstIsValue ? 0 : rows * stride);
  }

  explicit Direction(const SvgdCall& call)
      : call_(call), points_(call.n, call.d, call.workspace), kernel_(call.params),
        to_scaled_(Kernel::kScale / call.bandwidth), scale_(repulsion_scale<Kernel>(call)) {
    const int64_t rows = points_.blocks() * kTile;
    means_ = call.workspace + Points::floats(call.n, call.d);
    values_ = means_ + points_.stride;
    sums_ = values_ + rows * points_.stride;
    row_units_ = sums_ + rows * points_.stride;
    column_sums_ = row_units_ + rows * kUnit;
    pulls_ = column_sums_ + rows;
  }

  void run() {
    const int64_t n = call_.n, d = call_.d, blocks = points_.blocks();
    const ParallelFor parallel_for = call_.parallel_for;
    in_parallel(parallel_for, (d + kTile - 1) / kTile, kGrainFlops / (n * kTile) + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kTile, last = end * kTile < d ? end * kTile : d;
      column_means(columns(call_.particles, call_.particles_dtype).part(first, last - first), n, means_ + first);
    });
    const int64_t grain = kGrainFlops / (8 * kTile * d) + 1;
    in_parallel(parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) prepare(block);
    });
    const bool sharp = is_sharp(points_.norms, n, call_.bandwidth);
    if constexpr (Kernel::kFirstIsValue)
      if (sharp) return Direction<Sharp<Kernel>>(call_).run();
    const int64_t tile_flops = kTile * kTile * (6 * d + 32);
    for_all_pairs(parallel_for, blocks, group_size(blocks, d), kGrainFlops / tile_flops + 1, [&](int64_t i, int64_t j) {
      if (Kernel::kNeedsDifferences || sharp || d <= kDirectDimensions)
        meet<true>(i, j);
      else
        meet<Kernel::kNeedsDifferences>(i, j);
    });
    in_parallel(parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) finish(block);
    });
  }

 private:
  float* rows_of(float* matrix, int64_t block) const { return matrix + block * kTile * points_.stride; }

  Columns columns(const void* data, DType dtype) const { return {data, dtype, call_.d, 0, call_.d}; }

  void prepare(int64_t block) {
    pack(columns(call_.particles, call_.particles_dtype), means_, block, points_);
    const int64_t d = call_.d, stride = points_.stride;
    const int count = points_.count(block);
    for (int i = 0; i < count; ++i) {
      const float* x = points_.row_block(block) + i * stride;
      float* value = rows_of(values_, block) + i * stride;
      columns(call_.scores, call_.scores_dtype).row(block * kTile + i, value);
      for (int64_t k = d; k < stride; ++k) value[k] = 0.0f;
      if (Kernel::kFirstIsValue) join_values(d, scale_, x, value);
    }
    // Sums of rows in the padding, up to the next kUnit, are made and not read; narrow ones lie a tile's width apart.
    const int64_t rows = narrow() ? kTile : round_up(count, kUnit);
    __builtin_memset(rows_of(sums_, block), 0, rows * stride * sizeof(float));
    __builtin_memset(row_units_ + block * kTile * kUnit, 0, rows * kUnit * sizeof(float));
    __builtin_memset(column_sums_ + block * kTile, 0, rows * sizeof(float));
    if (!Kernel::kFirstIsValue) __builtin_memset(rows_of(pulls_, block), 0, rows * stride * sizeof(float));
  }

  template <bool kDifferences>
  void meet(int64_t a, int64_t b) {
    Weights weights;
    const int rows = points_.count(a), columns = points_.count(b);
    block_products<kDifferences>(points_, a, points_, b, weights.value);
    const Place place{rows, columns, points_.norms + a * kTile, points_.norms + b * kTile, a == b};
    weigh<kDifferences>(kernel_, to_scaled_, place, weights, row_units_ + a * kTile * kUnit,
                        a == b ? nullptr : column_sums_ + b * kTile);
    const int64_t stride = points_.stride, d = call_.d;
    const auto add = [&](const float* tile, float* values, float* sums) {
      if (narrow()) {
        alignas(64) float turned[kTile * kTile];
        transpose(tile, rows, columns, turned);
        narrow_sums(turned, rows, columns, rows_of(values, b), stride, d, rows_of(sums, a));
        if (a != b) narrow_sums(tile, columns, rows, rows_of(values, a), stride, d, rows_of(sums, b));
        return;
      }
      weighted_sums<false>(tile, rows, columns, rows_of(values, b), stride, stride, rows_of(sums, a));
      if (a != b) weighted_sums<true>(tile, columns, rows, rows_of(values, a), stride, stride, rows_of(sums, b));
    };
    add(weights.value, values_, sums_);
    if (!Kernel::kFirstIsValue) add(weights.first, points_.rows, pulls_);
  }

  void finish(int64_t block) {
    const int64_t d = call_.d, stride = points_.stride;
    float* scores = rows_of(values_, block);  // no longer needed as values
    for (int i = 0; i < points_.count(block); ++i) {
      const int64_t row = block * kTile + i;
      columns(call_.scores, call_.scores_dtype).row(row, scores);
      alignas(64) float narrow_sum[kUnit], narrow_pull[kUnit];
      float* sum = row_of_sums(sums_, block, i, narrow_sum);
      const float* pull = Kernel::kFirstIsValue ? nullptr : row_of_sums(pulls_, block, i, narrow_pull);
      const float repelling = unit_total(row_units_ + row * kUnit) + column_sums_[row];
      finish_row(kernel_, call_.n, d, scale_, repelling, points_.row_block(block) + i * stride, scores, pull, sum);
      from_float(sum, static_cast<int>(d), call_.direction, call_.particles_dtype, row * d);
    }
  }

  // Sums of so few coordinates lie as [coordinate][row].
  bool narrow() const { return call_.d <= kUnit; }

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
};

}  // namespace

int64_t svgd_direction_workspace(int64_t n, int64_t d) {
  if (is_small(n, d)) return 0;
  return WideShape::fits(n, d) ? svgd_direction_wide_workspace(n, d) : Direction<ImqKernel<FloatV>>::floats(n, d);
}

void svgd_direction(const SvgdCall& call) {
  if (is_small(call.n, call.d)) return svgd_direction_small(call);
  if (WideShape::fits(call.n, call.d)) return svgd_direction_wide(call);
  switch (call.kernel) {
    case kRbf: return Direction<RbfKernel<FloatV>>(call).run();
    case kImq: return Direction<ImqKernel<FloatV>>(call).run();
    case kLaplace: return Direction<LaplaceKernel<FloatV>>(call).run();
  }
}

}  // namespace fe::FE_ISA
