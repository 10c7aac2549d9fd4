// Tiles of pairs of points: inner products, squared distances, and sums weighted by a tile. Every sum has one order, that
// of the index with one fma per term, whatever the width of a vector: the bits are those of every instruction set.
//
// A tile is 64 x 64 floats, 16 KB: it and the 64 columns that it is paired with stay in the L1 cache between the inner products,
// the kernel function and the weighted sums. Points lie twice: as rows, padded to whole vectors, from which single values
// are broadcast and weighted sums are made; and as panels of 64 points, coordinate by coordinate, for the inner products.
#pragma once

#include "cpu/convert.h"
#include "cpu/simd.h"
#include "formulas/radial_kernels.h"

namespace fe::inline FE_ISA {

inline constexpr int kTile = 64;
inline constexpr int kUnit = 16;    // columns of a tile and coordinates of a row come in units of this many
inline constexpr int kDepth = 256;  // terms of an inner product that are summed on their own before they are added
inline constexpr int kRows = 4;     // rows that a register tile holds
inline constexpr int64_t kGrainFlops = 1 << 19;  // fewest operations that repay a second thread: some ten microseconds

// Vectors of a register tile's row: four rows of them, their operands and a broadcast fill the registers.
#if defined(__AVX512F__)
inline constexpr int kVectors = 4;
#else
inline constexpr int kVectors = kUnit / kLanes;
#endif
static_assert(kVectors * kLanes % kUnit == 0);

FE_HD int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Distances of so few coordinates, and what pairs push each other by, are summed from differences of the points as they are
// given, which loses nothing where those lie close together and far from the others.
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
  Points(int64_t n, int64_t d, float* rows, float* panels, float* norms)
      : n(n), d(d), stride(round_up(d, kUnit)), rows(rows), panels(panels), norms(norms) {}

  int64_t blocks() const { return (n + kTile - 1) / kTile; }
  int count(int64_t block) const {
    const int64_t left = n - block * kTile;
    return static_cast<int>(left < kTile ? left : kTile);
  }
  float* row_block(int64_t block) const { return rows + block * kTile * stride; }
  float* panel(int64_t block) const { return panels + block * kTile * d; }
};

// out[i][j] (+)= x_i . y_j, or |x_i - y_j|^2, of the first `rows` rows (in fours) and `columns` columns (in units) of a
// tile. x: rows `stride` apart; panel: as in Points.
template <bool kDifferences>
void products(const float* x, int64_t stride, int rows, const float* panel, int columns, int64_t d, bool add, float* out);

// out[r] += sum_j weight(r, j) values[j] over `terms` terms, for `rows` rows (up to the next multiple of 8; the buffers
// have them). Values and out: rows `stride` apart, of `width` floats (in units). Transposed, the weight is that of
// (row j, column r) of the tile.
template <bool kTransposed>
void weighted_sums(const float* tile, int rows, int terms, const float* values, int64_t stride, int64_t width, float* out);

// The same of differences: out[r] += sum_j weight(r, j) (own[r] - values[j]), where weights times values cancel.
template <bool kTransposed>
void difference_sums(const float* tile, int rows, int terms, const float* own, const float* values, int64_t stride,
                     int64_t width, float* out);

// `weighted_sums` for at most kUnit coordinates, into out[coordinate][row]: rows fill the vectors, which so few coordinates would
// leave empty (d = 2) or starve of loads (d = 16: 80 of 116 GFLOP/s per core). The weight of (row r, term j) is tile[j][r]:
// the transposed tile's, or that of row j and column r.
void narrow_sums(const float* tile, int rows, int terms, const float* values, int64_t stride, int64_t d, float* out);

void transpose(const float* tile, int rows, int columns, float* out);

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
inline bool is_sharp(double sum_of_norms, int64_t n, float bandwidth) {
  return sum_of_norms > 64.0 * static_cast<double>(n) * bandwidth;
}

inline bool is_sharp(const float* norms, int64_t n, float bandwidth) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += norms[i];
  return is_sharp(sum, n, bandwidth);
}

// Products, or squared distances, of the points of two blocks, into a tile; those of padding are meaningless.
template <bool kDifferences>
void block_products(const Points& a, int64_t block_a, const Points& b, int64_t block_b, float* tile) {
  products<kDifferences>(a.row_block(block_a), a.stride, a.count(block_a), b.panel(block_b),
                         static_cast<int>(round_up(b.count(block_b), kUnit)), a.d, false, tile);
}

// out[i][j] = (x_i - x_j) . (y_i - y_j) of the points of two blocks, from differences.
void block_difference_products(const Points& x, const Points& y, int64_t block_a, int64_t block_b, float* out);

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

// Adds n rows to sums, one after the other; and their means, rounded to float: what points are shifted by, so that inner
// products lose nothing.
void add_columns(const Columns& from, int64_t n, double* sums);
void column_means(const Columns& from, int64_t n, float* means);

// Writes one block of `to`, of from.count coordinates: `from` less `means` (null: nothing). `pack_rows`: its rows alone.
void pack_rows(const Columns& from, const float* means, int64_t block, const Points& to);
void pack(const Columns& from, const float* means, int64_t block, const Points& to);

}  // namespace fe::inline FE_ISA
