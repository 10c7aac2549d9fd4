// Tiles of pairs of points: inner products, squared distances, and sums weighted by a tile. Every sum has one order, that
// of the index with one fma a term, whatever the width of a vector: the bits are those of every instruction set.
//
// A tile is 64 x 64 floats, 16 KB: it and the 64 columns that it meets stay in the L1 cache between the inner products,
// the kernel function and the weighted sums. Points lie twice: as rows, padded to whole vectors, from which single values
// are broadcast and weighted sums are made; and as panels of 64 points, coordinate by coordinate, for the inner products.
#pragma once

#include "cpu/convert.h"
#include "cpu/lanes.h"
#include "math/stein.h"

namespace fe::inline FE_ISA {

inline constexpr int kTile = 64;
inline constexpr int kUnit = 16;    // columns of a tile and coordinates of a row come in units of this many
inline constexpr int kDepth = 256;  // terms of an inner product that are summed on their own before they are added
inline constexpr int kRows = 4;     // rows that a register tile holds

// Vectors of a register tile's row: four rows of them, their operands and a broadcast fill the registers.
#if defined(__AVX512F__)
inline constexpr int kVectors = 4;
#else
inline constexpr int kVectors = kUnit / kLanes;
#endif
static_assert(kVectors * kLanes % kUnit == 0);

FE_HD int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Distances of so few coordinates are summed from differences, which costs no more than inner products do and loses
// nothing where points lie close together.
inline constexpr int64_t kDirectDimensions = 8;

struct Points {
  int64_t n, d, stride;  // stride: d padded to kUnit
  float* rows;           // [blocks * kTile, stride], zero in the padding, up to the next kUnit of rows
  float* panels;         // [blocks, d, kTile], zero in the padding, up to the next kUnit of points
  float* norms;          // [blocks * kTile]: squared, summed as `products` sums

  static int64_t floats(int64_t n, int64_t d) { return round_up(n, kTile) * (round_up(d, kUnit) + d + 1); }
  Points(int64_t n, int64_t d, float* memory)
      : n(n), d(d), stride(round_up(d, kUnit)), rows(memory), panels(rows + blocks() * kTile * stride),
        norms(panels + blocks() * kTile * d) {}

  int64_t blocks() const { return (n + kTile - 1) / kTile; }
  int count(int64_t block) const {
    const int64_t left = n - block * kTile;
    return static_cast<int>(left < kTile ? left : kTile);
  }
  float* row_block(int64_t block) const { return rows + block * kTile * stride; }
  float* panel(int64_t block) const { return panels + block * kTile * d; }
};

template <bool kDifferences, int kWidth>
FE_HD void products_of(const float* const (&x)[kRows], const float* panel, int64_t depth, bool add, float* out) {
  FloatV sum[kRows][kWidth] = {};
  for (int64_t k = 0; k < depth; ++k) {
    FloatV y[kWidth];
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) y[w] = load(panel + k * kTile + w * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const FloatV value = Lane<FloatV>::splat(x[r][k]);
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) {
        const FloatV left = kDifferences ? value - y[w] : value;
        sum[r][w] = Lane<FloatV>::fma(left, kDifferences ? left : y[w], sum[r][w]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) {
      float* to = out + r * kTile + w * kLanes;
      store(to, add ? load(to) + sum[r][w] : sum[r][w]);
    }
}

// out[i][j] (+)= x_i . y_j, or |x_i - y_j|^2, of the first `rows` rows (in fours) and `columns` columns (in units) of a
// tile. x: rows `stride` apart; panel: as in Points.
template <bool kDifferences>
void products(const float* x, int64_t stride, int rows, const float* panel, int columns, int64_t d, bool add, float* out) {
  for (int64_t begin = 0; begin < d; begin += kDepth) {
    const int64_t depth = d - begin < kDepth ? d - begin : kDepth;
    const float* y = panel + begin * kTile;
    for (int i = 0; i < rows; i += kRows) {
      const float* const from[kRows] = {x + i * stride + begin, x + (i + 1) * stride + begin, x + (i + 2) * stride + begin,
                                        x + (i + 3) * stride + begin};
      const bool onto = add || begin > 0;
      int j = 0;
      for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes)
        products_of<kDifferences, kVectors>(from, y + j, depth, onto, out + i * kTile + j);
      for (; j < columns; j += kUnit)
        products_of<kDifferences, kUnit / kLanes>(from, y + j, depth, onto, out + i * kTile + j);
    }
  }
}

// The weight of (row r, term j) is weights[r * row_step + j * term_step].
template <int kHeight, int kWidth>
FE_HD void weighted_of(const float* weights, int64_t row_step, int64_t term_step, int terms, const float* values,
                       int64_t stride, float* out) {
  FloatV sum[kHeight][kWidth] = {};
  for (int j = 0; j < terms; ++j) {
    FloatV value[kWidth];
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) value[w] = load(values + j * stride + w * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      const FloatV weight = Lane<FloatV>::splat(weights[r * row_step + j * term_step]);
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) sum[r][w] = Lane<FloatV>::fma(weight, value[w], sum[r][w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) {
      float* to = out + r * stride + w * kLanes;
      store(to, load(to) + sum[r][w]);
    }
}

// out[r] += sum_j weight(r, j) values[j] over `terms` terms, for `rows` rows (up to the next multiple of 8; the buffers
// have them). Values and out: rows `stride` apart, of `width` floats (in units). Transposed, the weight is that of
// (row j, column r) of the tile.
template <bool kTransposed>
void weighted_sums(const float* tile, int rows, int terms, const float* values, int64_t stride, int64_t width, float* out) {
  constexpr int64_t row_step = kTransposed ? 1 : kTile, term_step = kTransposed ? kTile : 1;
  const auto run = [&]<int kHeight, int kWidth>(int64_t column) {
    for (int r = 0; r < rows; r += kHeight)
      weighted_of<kHeight, kWidth>(tile + r * row_step, row_step, term_step, terms, values + column, stride,
                                   out + r * stride + column);
  };
  int64_t column = 0;
  for (; column + kVectors * kLanes <= width; column += kVectors * kLanes)
    run.template operator()<kRows, kVectors>(column);
#if defined(__AVX512F__)  // one to three vectors are left, of which one alone needs more rows to hide its latency
  const int64_t left = (width - column) / kLanes;
  if (left == 3) run.template operator()<kRows, 3>(column);
  if (left == 2) run.template operator()<kRows, 2>(column);
  if (left == 1) run.template operator()<2 * kRows, 1>(column);
#endif
}

template <int kHeight, int kWidth>
FE_HD void narrow_of(const float* weights, int terms, const float* values, int64_t stride, float* out) {
  FloatV sum[kHeight][kWidth] = {};
  for (int j = 0; j < terms; ++j) {
    FloatV weight[kWidth];
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) weight[w] = load(weights + j * kTile + w * kLanes);
#pragma GCC unroll 4
    for (int k = 0; k < kHeight; ++k) {
      const FloatV value = Lane<FloatV>::splat(values[j * stride + k]);
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) sum[k][w] = Lane<FloatV>::fma(weight[w], value, sum[k][w]);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kHeight; ++k)
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) {
      float* to = out + k * kTile + w * kLanes;
      store(to, load(to) + sum[k][w]);
    }
}

// `weighted_sums` for at most kUnit coordinates, into out[coordinate][row]: rows fill the vectors, which so few coordinates
// would leave empty (d = 2) or starve of loads (d = 16: 80 of 116 GFLOP/s a core). The weight of (row r, term j) is
// tile[j][r]: the transposed tile's, or that of row j and column r.
inline void narrow_sums(const float* tile, int rows, int terms, const float* values, int64_t stride, int64_t d, float* out) {
  const auto run = [&]<int kWidth>(int row) {
    int64_t k = 0;
    for (; k + 4 <= d; k += 4)
      narrow_of<4, kWidth>(tile + row, terms, values + k, stride, out + k * kTile + row);
    for (; k < d; ++k) narrow_of<1, kWidth>(tile + row, terms, values + k, stride, out + k * kTile + row);
  };
  int row = 0;
  for (; row + kVectors * kLanes <= rows; row += kVectors * kLanes) run.template operator()<kVectors>(row);
  for (; row < rows; row += kUnit) run.template operator()<kUnit / kLanes>(row);
}

// Rows i .. i + 3 and columns k .. k + kLanes - 1 of `from`, side by side: out[(k + lane) * kTile + i .. + 3], lane < lanes.
FE_HD void turn_four(const float* from, int64_t stride, int lanes, float* out) {
  FloatV fours[4];
  in_order(load(from), load(from + stride), load(from + 2 * stride), load(from + 3 * stride), fours);
  alignas(64) float values[4 * kLanes];
  for (int v = 0; v < 4; ++v) store(values + v * kLanes, fours[v]);
  for (int lane = 0; lane < lanes; ++lane)
    __builtin_memcpy(out + lane * kTile, values + 4 * counter_of_lane(lane), 4 * sizeof(float));
}

inline void transpose(const float* tile, int rows, int columns, float* out) {
  for (int i = 0; i < rows; i += 4)
    for (int j = 0; j < columns; j += kLanes) turn_four(tile + i * kTile + j, kTile, kLanes, out + j * kTile + i);
}

// Squared distances from what `products` left in a tile: row i, columns j .. j + kLanes - 1.
template <bool kDifferences>
FE_HD FloatV sq_dist(const float* product, float norm_a, const float* norms_b) {
  if (kDifferences) return load(product);
  const FloatV sum = Lane<FloatV>::splat(norm_a) + load(norms_b);
  const FloatV t = Lane<FloatV>::fma(Lane<FloatV>::splat(-2.0f), load(product), sum);
  return t < 0.0f ? FloatV{} : t;
}

// Whether the bandwidth is so far below the mean of n squared norms that an inner product's rounding, about 1e-7 of a norm,
// would be more than 1e-5 of t / h.
inline bool is_sharp(const float* norms, int64_t n, float bandwidth) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += norms[i];
  return sum > 64.0 * static_cast<double>(n) * bandwidth;
}

// Products, or squared distances, of the points of two blocks, into a tile; those of padding are meaningless.
template <bool kDifferences>
void block_products(const Points& a, int64_t block_a, const Points& b, int64_t block_b, float* tile) {
  products<kDifferences>(a.row_block(block_a), a.stride, a.count(block_a), b.panel(block_b),
                         static_cast<int>(round_up(b.count(block_b), kUnit)), a.d, false, tile);
}

// Sums of 16 lanes: of column j in lane j % 16. In memory, so that a row's can go on from tile to tile.
FE_HD void add_to_unit(float* unit, int j, FloatV value) {
  float* part = unit + j % kUnit;
  store(part, load(part) + value);
}

FE_HD float unit_total(float* unit) {
#pragma GCC unroll 4
  for (int half = kUnit / 2; half > 0; half /= 2)
#pragma GCC ivdep
    for (int i = 0; i < half; ++i) unit[i] += unit[i + half];
  return unit[0];
}

// Columns begin .. begin + count of [n, stride] values as a caller holds them.
struct Columns {
  const void* data;
  DType dtype;
  int64_t stride, begin, count;

  Columns part(int64_t at, int64_t size) const { return {data, dtype, stride, begin + at, size}; }
  void row(int64_t i, float* out) const { to_float(data, dtype, i * stride + begin, static_cast<int>(count), out); }
};

// Their means over n rows, rounded to float: what points are shifted by, so that inner products lose nothing.
void column_means(const Columns& from, int64_t n, float* means);

// Writes one block of `to`, of from.count coordinates: `from` less `means` (null: nothing). `pack_rows`: its rows alone.
void pack_rows(const Columns& from, const float* means, int64_t block, const Points& to);
void pack(const Columns& from, const float* means, int64_t block, const Points& to);

}  // namespace fe::inline FE_ISA
