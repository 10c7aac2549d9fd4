// Gradients of L = <G, phi>. With a = G_i.s_j + G_j.s_i and b = (G_i - G_j).(x_i - x_j) of a pair, T the temperature, and
// k, first, second of its kernel (formulas/radial_kernels.h), the pair's share of dL/dt is
// M = -(first a / h + T second b / h^2) / 2n, and
//   dL/ds_i = (1/n) (k(0) G_i + sum_j k G_j)
//   dL/dx_i = (T/nh) sum_j first (G_i - G_j) + 2 sum_j M (x_i - x_j)
//   dL/dh   = (1/n) sum_{i<j} [u first a / 2h + T (u second / 2 - first) b / h^2]
#include "cpu/stein/tiles.h"
#include "cpu/stein/block_rounds.h"
#include "cpu/stein/svgd_direction.h"

namespace fe::FE_ISA {

namespace {


struct Tiles {
  alignas(64) float value[kTile * kTile];  // first the products that t is made of
  alignas(64) float first[kTile * kTile];  // a
  alignas(64) float along[kTile * kTile];  // b, then M
};

// Sums over a row's columns by lanes, and the sums that fall to it as a column.
struct RowSums {
  float units[kUnit];
  float columns;

  float total() { return unit_total(units) + columns; }
};

template <class Kernel>
class Backward {
 public:
  explicit Backward(const SvgdCall& call)
      : call_(call), n_(static_cast<float>(call.n)), x_(call.n, call.d, call.workspace),
        s_(call.n, call.d, call.workspace + Points::floats(call.n, call.d)),
        g_(call.n, call.d, call.workspace + 2 * Points::floats(call.n, call.d)), kernel_(call.params),
        inverse_(inverse_bandwidth(call.bandwidth)), to_scaled_(scale_of<Kernel>(call.bandwidth)) {
    const int64_t rows = x_.blocks() * kTile;
    value_sums_ = call.workspace + 3 * Points::floats(call.n, call.d);
    first_sums_ = value_sums_ + rows * x_.stride;
    along_sums_ = first_sums_ + rows * x_.stride;
    dots_ = along_sums_ + rows * x_.stride;
    bandwidth_units_ = dots_ + rows;
    repelling_ = reinterpret_cast<RowSums*>(bandwidth_units_ + rows * kUnit);
    along_ = repelling_ + rows;
    means_ = reinterpret_cast<float*>(along_ + rows);
  }

  void run() {
    const int64_t n = call_.n, d = call_.d, blocks = x_.blocks();
    const int64_t grain = kGrainFlops / (16 * kTile * d) + 1;
    const auto prepare_all = [&](const float* means) {
      in_parallel(call_.parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) prepare(block, means);
      });
    };
    differences_ = Kernel::kNeedsDifferences || d <= kDirectDimensions;
    if (!differences_) {
      column_means(columns(call_.particles, call_.particles_dtype), n, means_);
      prepare_all(means_);
      differences_ = is_sharp(x_.norms, n, call_.bandwidth);
    }
    if (differences_) prepare_all(nullptr);  // as they are given
    const int64_t tile_flops = kTile * kTile * (16 * d + 64);
    for_all_pairs(call_.parallel_for, blocks, group_size(blocks, d), kGrainFlops / tile_flops + 1,
                  [&](int64_t i, int64_t j) {
                    if (differences_)
                      add_pair<true>(i, j);
                    else
                      add_pair<Kernel::kNeedsDifferences>(i, j);
                  });
    in_parallel(call_.parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) finish(block);
    });
    if (!call_.grad_bandwidth) return;
    double sum = 0.0;
    for (int64_t row = 0; row < n; ++row) sum += unit_total(bandwidth_units_ + row * kUnit);
    *call_.grad_bandwidth = static_cast<float>(sum / static_cast<double>(n));
  }

 private:
  float* rows_of(float* matrix, int64_t block) const { return matrix + block * kTile * x_.stride; }

  Columns columns(const void* data, DType dtype) const { return {data, dtype, call_.d, 0, call_.d}; }

  void prepare(int64_t block, const float* means) {
    pack(columns(call_.particles, call_.particles_dtype), means, block, x_);
    pack(columns(call_.scores, call_.scores_dtype), nullptr, block, s_);
    pack(columns(call_.grad, call_.grad_dtype), nullptr, block, g_);
    const int64_t first = block * kTile;
    for (int i = 0; i < kTile; i += kLanes) {
      FloatV dot{};
      if (i < x_.count(block))
        for (int64_t k = 0; k < call_.d; ++k)
          dot = Lane<FloatV>::fma(load(x_.panel(block) + k * kTile + i), load(g_.panel(block) + k * kTile + i), dot);
      store(dots_ + first + i, dot);
    }
    for (float* sums : {value_sums_, first_sums_, along_sums_})
      __builtin_memset(rows_of(sums, block), 0, kTile * x_.stride * sizeof(float));
    __builtin_memset(bandwidth_units_ + first * kUnit, 0, kTile * kUnit * sizeof(float));
    for (RowSums* sums : {repelling_, along_}) __builtin_memset(sums + first, 0, kTile * sizeof(RowSums));
  }

  template <bool kDifferences>
  void add_pair(int64_t a, int64_t b) {
    Tiles tiles;
    const int rows = x_.count(a), columns = x_.count(b), padded = static_cast<int>(round_up(columns, kUnit));
    const auto cross = [&](const Points& one, const Points& other, float* tile) {
      products<false>(one.row_block(a), one.stride, rows, other.panel(b), padded, one.d, false, tile);
      products<false>(other.row_block(a), one.stride, rows, one.panel(b), padded, one.d, true, tile);
    };
    block_products<kDifferences>(x_, a, x_, b, tiles.value);
    cross(g_, s_, tiles.first);
    if (kDifferences)
      block_difference_products(g_, x_, a, b, tiles.along);
    else
      cross(g_, x_, tiles.along);
    weigh<kDifferences>(a, b, rows, columns, padded, tiles);
    const int64_t stride = x_.stride;
    const auto add = [&](const float* tile, float* values, float* sums) {
      weighted_sums<false>(tile, rows, columns, rows_of(values, b), stride, stride, rows_of(sums, a));
      if (a != b) weighted_sums<true>(tile, columns, rows, rows_of(values, a), stride, stride, rows_of(sums, b));
    };
    const auto add_apart = [&](const float* tile, float* values, float* sums) {
      const auto run = [&]<bool kTransposed>(int64_t one, int64_t other) {
        difference_sums<kTransposed>(tile, x_.count(one), x_.count(other), rows_of(values, one), rows_of(values, other), stride,
                                     stride, rows_of(sums, one));
      };
      run.template operator()<false>(a, b);
      if (a != b) run.template operator()<true>(b, a);
    };
    add(tiles.value, g_.rows, value_sums_);
    if (kDifferences) {
      add_apart(Kernel::kFirstIsValue ? tiles.value : tiles.first, g_.rows, first_sums_);
      add_apart(tiles.along, x_.rows, along_sums_);
    } else {
      if (!Kernel::kFirstIsValue) add(tiles.first, g_.rows, first_sums_);
      add(tiles.along, x_.rows, along_sums_);
    }
  }

  template <bool kDifferences>
  void weigh(int64_t a, int64_t b, int rows, int columns, int padded, Tiles& tiles) {
    using L = Lane<FloatV>;
    const float temperature = call_.temperature;
    const FloatV pull = L::splat(-0.5f * inverse_ / n_), bend = L::splat(-0.5f * temperature * inverse_ * inverse_ / n_);
    const float once = a == b ? 0.5f : 1.0f;  // a diagonal tile holds every pair twice
    const FloatV stretch = L::splat(0.5f * once * inverse_), shrink = L::splat(once * temperature * inverse_ * inverse_);
    const float *norms_a = x_.norms + a * kTile, *norms_b = x_.norms + b * kTile, *dots_b = dots_ + b * kTile;
    FloatV down_repelling[kTile / kLanes] = {}, down_along[kTile / kLanes] = {};
    for (int i = 0; i < rows; ++i) {
      float *value = tiles.value + i * kTile, *first = tiles.first + i * kTile, *along = tiles.along + i * kTile;
      alignas(64) float bandwidth[kTile];
      const FloatV dot = L::splat(dots_[a * kTile + i]);
      for (int j = 0; j < padded; j += kLanes) {
        const FloatV t = sq_dist<kDifferences>(value + j, norms_a[i], norms_b + j);
        const Radial<FloatV> k = kernel_(t <= 0.0f ? FloatV{} : t * to_scaled_);
        const FloatV u = t * inverse_, pair_a = load(first + j);
        const FloatV pair_b = kDifferences ? load(along + j) : dot + load(dots_b + j) - load(along + j);
        const FloatV curve = L::fma(u * 0.5f, k.second, -k.first);
        store(value + j, k.value);
        store(first + j, k.first);
        store(along + j, L::fma(bend * k.second, pair_b, pull * k.first * pair_a));
        store(bandwidth + j, L::fma(shrink * curve, pair_b, stretch * u * k.first * pair_a));
      }
      for (int j = columns; j < padded; ++j) value[j] = first[j] = along[j] = bandwidth[j] = 0.0f;
      if (a == b) value[i] = first[i] = along[i] = bandwidth[i] = 0.0f;
      const int64_t row = a * kTile + i;
      const float* repelling = Kernel::kFirstIsValue ? value : first;
      for (int j = 0; j < padded; j += kLanes) {
        add_to_unit(bandwidth_units_ + row * kUnit, j, load(bandwidth + j));
        if (kDifferences) continue;
        add_to_unit(repelling_[row].units, j, load(repelling + j));
        add_to_unit(along_[row].units, j, load(along + j));
        down_repelling[j / kLanes] = down_repelling[j / kLanes] + load(repelling + j);
        down_along[j / kLanes] = down_along[j / kLanes] + load(along + j);
      }
    }
    if (kDifferences || a == b) return;
    for (int j = 0; j < columns; ++j) {
      repelling_[b * kTile + j].columns += down_repelling[j / kLanes][j % kLanes];
      along_[b * kTile + j].columns += down_along[j / kLanes][j % kLanes];
    }
  }

  void finish(int64_t block) {
    using L = Lane<FloatV>;
    const int64_t d = call_.d, stride = x_.stride;
    const float at_zero = kernel_(FloatV{}).value[0], inverse_n = 1.0f / n_;
    const float repulsion = call_.temperature * inverse_ * (Kernel::kFirstIsValue ? 2.0f : 1.0f) * inverse_n;
    const float* repelled = Kernel::kFirstIsValue && !differences_ ? value_sums_ : first_sums_;
    for (int i = 0; i < x_.count(block); ++i) {
      const int64_t row = block * kTile + i;
      const float *x = x_.row_block(block) + i * stride, *g = g_.row_block(block) + i * stride;
      float *sums = value_sums_ + row * stride, *along = along_sums_ + row * stride;
      const FloatV push = L::splat(repelling_[row].total()), pull = L::splat(along_[row].total());
      for (int64_t k = 0; k < d; k += kLanes) {
        FloatV apart = load(repelled + row * stride + k), moved = load(along + k);
        if (!differences_) {
          apart = L::fma(push, load(g + k), -apart);
          moved = L::fma(pull, load(x + k), -moved);
        }
        store(along + k, L::fma(L::splat(repulsion), apart, moved + moved));
        store(sums + k, L::fma(L::splat(at_zero), load(g + k), load(sums + k)) * inverse_n);
      }
      const int count = static_cast<int>(d);
      if (call_.grad_particles) from_float(along, count, call_.grad_particles, call_.particles_dtype, row * d);
      if (call_.grad_scores) from_float(sums, count, call_.grad_scores, call_.scores_dtype, row * d);
    }
  }

  const SvgdCall& call_;
  float n_;
  Points x_, s_, g_;
  Kernel kernel_;
  float inverse_, to_scaled_;
  bool differences_ = false;
  float *means_, *value_sums_, *first_sums_, *along_sums_, *dots_, *bandwidth_units_;
  RowSums *repelling_, *along_;
};

}  // namespace

int64_t svgd_direction_backward_workspace(int64_t n, int64_t d) {
  const int64_t rows = round_up(n, kTile), stride = round_up(d, kUnit);
  return 3 * Points::floats(n, d) + stride + 3 * rows * stride + rows * (1 + kUnit + 2 * sizeof(RowSums) / sizeof(float));
}

void svgd_direction_backward(const SvgdCall& call) {
  with_kernel<FloatV>(call.kernel, [&]<class Kernel>() { Backward<Kernel>(call).run(); });
}

}  // namespace fe::FE_ISA
