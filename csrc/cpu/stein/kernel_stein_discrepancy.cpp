// k_p(x, y) = k s.s' + (first / h) [(s - s').(x - y) + d] - (second / h^2) t, with k, first and second as in formulas/radial_kernels.h
// (Liu, Lee & Jordan 2016, arXiv:1602.03253, for any radial kernel).
#include "cpu/stein/kernel_stein_discrepancy.h"

#include "cpu/stein/tiles.h"
#include "cpu/stein/block_rounds.h"

namespace fe::FE_ISA {

namespace {


struct Tiles {
  alignas(64) float stein[kTile * kTile];  // first the products that t is made of
  alignas(64) float scores[kTile * kTile];
  alignas(64) float cross[kTile * kTile];
  alignas(64) float weighted[kTile * kTile];
};

template <class Kernel>
class Discrepancy {
 public:
  explicit Discrepancy(const DiscrepancyCall& call)
      : call_(call), x_(call.n, call.d, call.workspace),
        s_(call.n, call.d, call.workspace + Points::floats(call.n, call.d)), kernel_(call.params),
        width_(round_up(call.columns, kUnit)), inverse_(inverse_bandwidth(call.bandwidth)), to_scaled_(scale_of<Kernel>(call.bandwidth)) {
    const int64_t rows = x_.blocks() * kTile;
    sums_ = reinterpret_cast<double*>(call.workspace + 2 * Points::floats(call.n, call.d));
    dots_ = reinterpret_cast<float*>(sums_ + x_.blocks() * width_);
    weights_ = dots_ + rows;
    means_ = weights_ + rows * width_;
  }

  void run() {
    const int64_t n = call_.n, d = call_.d, blocks = x_.blocks();
    const auto prepare_all = [&](const float* means) {
      in_parallel(call_.parallel_for, blocks, kGrainFlops / (8 * kTile * d) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) prepare(block, means);
      });
    };
    bool differences = Kernel::kNeedsDifferences || d <= kDirectDimensions;
    if (!differences) {
      column_means(columns(call_.particles, call_.particles_dtype), n, means_);
      prepare_all(means_);
      differences = is_sharp(x_.norms, n, call_.bandwidth);
    }
    if (differences) prepare_all(nullptr);  // as they are given
    const int64_t tile_flops = kTile * kTile * (8 * d + 2 * width_ + 64);
    for_all_pairs(call_.parallel_for, blocks, group_size(blocks, d), kGrainFlops / tile_flops + 1,
                  [&](int64_t i, int64_t j) { differences ? add_pair<true>(i, j) : add_pair<Kernel::kNeedsDifferences>(i, j); });
    for (int64_t c = 0; c < call_.columns; ++c) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) sum += sums_[block * width_ + c];
      call_.sums[c] = sum;
    }
  }

 private:
  Columns columns(const void* data, DType dtype) const { return {data, dtype, call_.d, 0, call_.d}; }

  void prepare(int64_t block, const float* means) {
    pack(columns(call_.particles, call_.particles_dtype), means, block, x_);
    pack(columns(call_.scores, call_.scores_dtype), nullptr, block, s_);
    const int count = x_.count(block);
    for (int i = 0; i < kTile; i += kLanes) {
      FloatV dot{};
      if (i < count)
        for (int64_t k = 0; k < call_.d; ++k)
          dot = Lane<FloatV>::fma(load(x_.panel(block) + k * kTile + i), load(s_.panel(block) + k * kTile + i), dot);
      store(dots_ + block * kTile + i, dot);
    }
    float* weights = weights_ + block * kTile * width_;
    __builtin_memset(weights, 0, kTile * width_ * sizeof(float));
    for (int i = 0; i < count; ++i)
      __builtin_memcpy(weights + i * width_, call_.weights + (block * kTile + i) * call_.columns,
                       call_.columns * sizeof(float));
    for (int64_t c = 0; c < width_; ++c) sums_[block * width_ + c] = 0.0;
  }

  template <bool kDifferences>
  void add_pair(int64_t a, int64_t b) {
    Tiles tiles;
    const int rows = x_.count(a), columns = x_.count(b), padded = static_cast<int>(round_up(columns, kUnit));
    block_products<kDifferences>(x_, a, x_, b, tiles.stein);
    block_products<false>(s_, a, s_, b, tiles.scores);
    if (kDifferences) {
      block_difference_products(x_, s_, a, b, tiles.cross);
    } else {
      products<false>(s_.row_block(a), s_.stride, rows, x_.panel(b), padded, s_.d, false, tiles.cross);
      products<false>(x_.row_block(a), x_.stride, rows, s_.panel(b), padded, x_.d, true, tiles.cross);
    }
    weigh<kDifferences>(a, b, rows, columns, padded, tiles);
    const double times = a == b ? 1.0 : 2.0;
    for (int64_t column = 0; column < width_; column += kTile) {
      const int64_t width = width_ - column < kTile ? width_ - column : kTile;
      __builtin_memset(tiles.weighted, 0, sizeof tiles.weighted);
      multiply(tiles, rows, columns, weights_ + b * kTile * width_ + column, width);
      for (int i = 0; i < rows; ++i) {
        const float* weights = weights_ + (a * kTile + i) * width_ + column;
        for (int64_t c = 0; c < width; ++c)
          sums_[a * width_ + column + c] += times * static_cast<double>(weights[c]) * tiles.weighted[i * kTile + c];
      }
    }
  }

  // weighted = stein . weights: rows of `weights` are width_ apart, those of the tile kTile.
  void multiply(Tiles& tiles, int rows, int columns, const float* weights, int64_t width) const {
    alignas(64) float values[kTile * kTile];
    for (int j = 0; j < columns; ++j) __builtin_memcpy(values + j * kTile, weights + j * width_, width * sizeof(float));
    weighted_sums<false>(tiles.stein, rows, columns, values, kTile, width, tiles.weighted);
  }

  template <bool kDifferences>
  void weigh(int64_t a, int64_t b, int rows, int columns, int padded, Tiles& tiles) const {
    using L = Lane<FloatV>;
    const float *norms_a = x_.norms + a * kTile, *norms_b = x_.norms + b * kTile, *dots_b = dots_ + b * kTile;
    const float dimensions = static_cast<float>(call_.d);
    for (int i = 0; i < rows; ++i) {
      float* stein = tiles.stein + i * kTile;
      const FloatV dot = L::splat(dots_[a * kTile + i]);
      for (int j = 0; j < padded; j += kLanes) {
        const FloatV t = sq_dist<kDifferences>(stein + j, norms_a[i], norms_b + j);
        const Radial<FloatV> k = kernel_(t <= 0.0f ? FloatV{} : t * to_scaled_);
        const FloatV cross = load(tiles.cross + i * kTile + j);
        const FloatV apart = (kDifferences ? cross : dot + load(dots_b + j) - cross) + dimensions;
        const FloatV bend = k.second * (t * inverse_) * inverse_;
        const FloatV value = L::fma(k.value, load(tiles.scores + i * kTile + j), L::fma(k.first * inverse_, apart, -bend));
        store(stein + j, value);
      }
      for (int j = columns; j < padded; ++j) stein[j] = 0.0f;
      if (a == b) stein[i] = 0.0f;
    }
  }

  const DiscrepancyCall& call_;
  Points x_, s_;
  Kernel kernel_;
  int64_t width_;
  float inverse_, to_scaled_;
  double* sums_;
  float *dots_, *weights_, *means_;
};

}  // namespace

int64_t kernel_stein_discrepancy_workspace(int64_t n, int64_t d, int64_t columns) {
  const int64_t rows = round_up(n, kTile), blocks = rows / kTile, width = round_up(columns, kUnit);
  return 2 * Points::floats(n, d) + rows * (1 + width) + 2 * blocks * width + round_up(d, kUnit);
}

void kernel_stein_discrepancy(const DiscrepancyCall& call) {
  with_kernel<FloatV>(call.kernel, [&]<class Kernel>() {
    if constexpr (Kernel::kHasDiscrepancy)
      Discrepancy<Kernel>(call).run();
    else
      no_such_kernel(call.kernel);
  });
}

}  // namespace fe::FE_ISA
