// The direction of few particles with very many coordinates, such as the networks of an ensemble: the n x n weights are kept
// whole, and the coordinates pass twice, a block of columns at a time that stays in the L2 cache: once for the inner
// products, once for the sums. Nothing of the size of the particles is written but the result.
#include "cpu/stein/svgd_weights.h"
#include "cpu/stein/wide_products.h"

namespace fe::FE_ISA {

namespace {

template <class Kernel>
class Wide {
 public:
  // The columns of the call, out of `d` in all; `products` of all of them: inner products, or squared distances for a kernel of
  // differences. means: of the call's columns.
  Wide(const SvgdCall& call, int64_t d, const float* products, const float* means)
      : call_(call), kernel_(call.params), shape_{call.n, d}, products_(products), means_(means), weights_(shape_.tiles()) {}

  static void run(const SvgdCall& call) {
    const WideShape shape{call.n, call.d};
    float* means = call.workspace + shape.floats();
    wide_products<Kernel::kNeedsDifferences>({call.particles, call.particles_dtype, call.d, 0, call.d}, shape, means,
                                             call.workspace, call.parallel_for);
    const Wide wide(call, call.d, call.workspace, means);
    if constexpr (!Kernel::kNeedsDifferences)
      if (wide.sharp()) return Wide<Sharp<Kernel>>::run(call);
    wide.direct();
  }

  void direct() const {
    const int64_t n = call_.n, d = call_.d, rows = shape_.blocks() * kTile;
    const Buffer<float> row_units(rows * kUnit), column_sums(rows), norms(rows);
    if (!Kernel::kNeedsDifferences) gather_norms(norms);
    __builtin_memset(row_units, 0, rows * kUnit * sizeof(float));
    __builtin_memset(column_sums, 0, rows * sizeof(float));
    weigh_all(norms, row_units, column_sums);
    for (int64_t row = 0; row < n; ++row) column_sums[row] += unit_total(row_units + row * kUnit);
    const int64_t slices = (d + kDepth - 1) / kDepth;
    in_parallel(call_.parallel_for, slices, (1 << 19) / (n * n * kDepth) + 1, [&](int64_t begin, int64_t end) {
      const int64_t size = rows * kDepth;
      const Buffer<float> memory(Points::floats(n, kDepth) + 3 * size);
      for (int64_t slice = begin; slice < end; ++slice) add(slice * kDepth, column_sums, memory, size);
    });
  }

 private:
  static constexpr bool kJoined = Kernel::kFirstIsValue && !Kernel::kNeedsDifferences;

  Columns particles(int64_t begin, int64_t count) const {
    return {call_.particles, call_.particles_dtype, call_.d, begin, count};
  }

  bool sharp() const {
    const Buffer<float> norms(shape_.blocks() * kTile);
    gather_norms(norms);
    return is_sharp(norms, call_.n, call_.bandwidth);
  }

  void gather_norms(float* norms) const {
    const Points points(call_.n, 0, nullptr);
    for (int64_t b = 0; b < shape_.blocks(); ++b) {
      const float* diagonal = products_ + shape_.tile(b, b) * kTile * kTile;
      for (int i = 0; i < kTile; ++i) norms[b * kTile + i] = i < points.count(b) ? diagonal[i * kTile + i] : 0.0f;
    }
  }

  void weigh_all(const float* norms, float* row_units, float* column_sums) const {
    const Points points(call_.n, 0, nullptr);
    for (int64_t b = 0; b < shape_.blocks(); ++b)
      for (int64_t a = 0; a <= b; ++a) {
        Weights& weights = weights_[shape_.tile(a, b)];
        __builtin_memcpy(weights.value, products_ + shape_.tile(a, b) * kTile * kTile, sizeof weights.value);
        const TileEdges edges{points.count(a), points.count(b), norms + a * kTile, norms + b * kTile, a == b};
        weigh<Kernel::kNeedsDifferences>(kernel_, scale_of<Kernel>(call_.bandwidth), edges, weights,
                                         row_units + a * kTile * kUnit, a == b ? nullptr : column_sums + b * kTile);
      }
  }

  void add(int64_t begin, const float* repelling, float* memory, int64_t size) const {
    const int64_t count = call_.d - begin < kDepth ? call_.d - begin : kDepth;
    const float scale = repulsion_scale<Kernel>(call_);
    const Columns scores{call_.scores, call_.scores_dtype, call_.d, begin, count};
    const Points points(call_.n, count, memory);
    const int64_t stride = points.stride;
    float *values = memory + Points::floats(call_.n, kDepth), *sums = values + size, *pulls = sums + size;
    __builtin_memset(sums, 0, 2 * size * sizeof(float));
    const float* means = Kernel::kNeedsDifferences ? nullptr : means_ + begin;
    for (int64_t block = 0; block < shape_.blocks(); ++block) pack_rows(particles(begin, count), means, block, points);
    for (int64_t row = 0; row < call_.n; ++row) {
      scores.row(row, values + row * stride);
      for (int64_t k = count; k < stride; ++k) values[row * stride + k] = 0.0f;
      if (kJoined) join_values(count, scale, points.rows + row * stride, values + row * stride);
    }
    const auto at = [&](auto* matrix, int64_t block) { return matrix + block * kTile * stride; };
    const auto add = [&]<bool kTransposed>(int64_t a, int64_t b, const Weights& weights) {
      const int rows = points.count(a), terms = points.count(b);
      const float* push = Kernel::kFirstIsValue ? weights.value : weights.first;
      weighted_sums<kTransposed>(weights.value, rows, terms, at(values, b), stride, stride, at(sums, a));
      if (Kernel::kNeedsDifferences)
        difference_sums<kTransposed>(push, rows, terms, at(points.rows, a), at(points.rows, b), stride, stride, at(pulls, a));
      else if (!kJoined)
        weighted_sums<kTransposed>(push, rows, terms, at(points.rows, b), stride, stride, at(pulls, a));
    };
    for (int64_t b = 0; b < shape_.blocks(); ++b)
      for (int64_t a = 0; a <= b; ++a) {
        const Weights& weights = weights_[shape_.tile(a, b)];
        add.template operator()<false>(a, b, weights);
        if (a != b) add.template operator()<true>(b, a, weights);
      }
    for (int64_t row = 0; row < call_.n; ++row) {
      float* sum = sums + row * stride;
      scores.row(row, values + row * stride);
      total_row<Kernel>(count, scale, repelling[row], points.rows + row * stride, pulls + row * stride, sum);
      complete_row(kernel_, call_.n, count, values + row * stride, sum);
      from_float(sum, static_cast<int>(count), call_.direction, call_.particles_dtype, row * call_.d + begin);
    }
  }

  const SvgdCall& call_;
  Kernel kernel_;
  WideShape shape_;
  const float *products_, *means_;
  Buffer<Weights> weights_;
};

}  // namespace

int64_t svgd_direction_wide_workspace(int64_t n, int64_t d) { return WideShape{n, d}.floats() + d; }

void svgd_direction_wide(const SvgdCall& call) {
  with_kernel<FloatV>(call.kernel, [&]<class Kernel>() { Wide<Kernel>::run(call); });
}

void svgd_wide_products(const SvgdCall& columns, int64_t d, bool differences, float* segments) {
  const Columns points{columns.particles, columns.particles_dtype, columns.d, 0, columns.d};
  const WideShape shape{columns.n, d};
  const Buffer<float> means(columns.d);
  if (differences)
    segment_products<true>(points, shape, nullptr, segments, columns.parallel_for);
  else
    segment_products<false>(points, shape, means, segments, columns.parallel_for);
}

void svgd_wide_share(const SvgdCall& columns, int64_t d, bool sharp, const float* products) {
  const Buffer<float> means(columns.d);
  column_means({columns.particles, columns.particles_dtype, columns.d, 0, columns.d}, columns.n, means);
  with_kernel<FloatV>(columns.kernel, [&]<class Kernel>() {
    if constexpr (!Kernel::kNeedsDifferences)
      if (sharp) return Wide<Sharp<Kernel>>(columns, d, products, means).direct();
    Wide<Kernel>(columns, d, products, means).direct();
  });
}

}  // namespace fe::FE_ISA
