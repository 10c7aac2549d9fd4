#include "cpu/stein/tiles.h"

namespace fe::inline FE_ISA {

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

template void products<false>(const float*, int64_t, int, const float*, int, int64_t, bool, float*);
template void products<true>(const float*, int64_t, int, const float*, int, int64_t, bool, float*);

template <int kWidth>
FE_HD void difference_products_of(const float* x, const float* y, int64_t stride, const float* x_panel, const float* y_panel,
                                  int64_t d, float* out) {
  FloatV sum[kRows][kWidth] = {};
  for (int64_t k = 0; k < d; ++k) {
    FloatV other_x[kWidth], other_y[kWidth];
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) {
      other_x[w] = load(x_panel + k * kTile + w * kLanes);
      other_y[w] = load(y_panel + k * kTile + w * kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const FloatV own_x = Lane<FloatV>::splat(x[r * stride + k]), own_y = Lane<FloatV>::splat(y[r * stride + k]);
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) sum[r][w] = Lane<FloatV>::fma(own_x - other_x[w], own_y - other_y[w], sum[r][w]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) store(out + r * kTile + w * kLanes, sum[r][w]);
}

void block_difference_products(const Points& x, const Points& y, int64_t block_a, int64_t block_b, float* out) {
  const int columns = static_cast<int>(round_up(x.count(block_b), kUnit));
  for (int i = 0; i < x.count(block_a); i += kRows)
    for (int j = 0; j < columns; j += kUnit)
      difference_products_of<kUnit / kLanes>(x.row_block(block_a) + i * x.stride, y.row_block(block_a) + i * y.stride, x.stride,
                                             x.panel(block_b) + j, y.panel(block_b) + j, x.d, out + i * kTile + j);
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

template <int kHeight, int kWidth>
FE_HD void differences_of(const float* weights, int64_t row_step, int64_t term_step, int terms, const float* own,
                          const float* values, int64_t stride, float* out) {
  FloatV from[kHeight][kWidth], sum[kHeight][kWidth] = {};
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) from[r][w] = load(own + r * stride + w * kLanes);
  for (int j = 0; j < terms; ++j) {
    FloatV value[kWidth];
#pragma GCC unroll 4
    for (int w = 0; w < kWidth; ++w) value[w] = load(values + j * stride + w * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      const FloatV weight = Lane<FloatV>::splat(weights[r * row_step + j * term_step]);
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) sum[r][w] = Lane<FloatV>::fma(weight, from[r][w] - value[w], sum[r][w]);
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

template <bool kTransposed>
void difference_sums(const float* tile, int rows, int terms, const float* own, const float* values, int64_t stride,
                     int64_t width, float* out) {
  constexpr int64_t row_step = kTransposed ? 1 : kTile, term_step = kTransposed ? kTile : 1;
  const auto run = [&]<int kHeight, int kWidth>(int64_t column) {
    for (int r = 0; r < rows; r += kHeight)
      differences_of<kHeight, kWidth>(tile + r * row_step, row_step, term_step, terms, own + r * stride + column,
                                      values + column, stride, out + r * stride + column);
  };
  int64_t column = 0;
#if defined(__AVX512F__)  // as many sums and own coordinates as the registers hold
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) run.template operator()<kRows, 2>(column);
#endif
  for (; column < width; column += kUnit) run.template operator()<kRows, kUnit / kLanes>(column);
}

template void difference_sums<false>(const float*, int, int, const float*, const float*, int64_t, int64_t, float*);
template void difference_sums<true>(const float*, int, int, const float*, const float*, int64_t, int64_t, float*);

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

template void weighted_sums<false>(const float*, int, int, const float*, int64_t, int64_t, float*);
template void weighted_sums<true>(const float*, int, int, const float*, int64_t, int64_t, float*);

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

void narrow_sums(const float* tile, int rows, int terms, const float* values, int64_t stride, int64_t d, float* out) {
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
FE_HD void transpose_four(const float* from, int64_t stride, int lanes, float* out) {
  FloatV fours[4];
  in_order(load(from), load(from + stride), load(from + 2 * stride), load(from + 3 * stride), fours);
  alignas(64) float values[4 * kLanes];
  for (int v = 0; v < 4; ++v) store(values + v * kLanes, fours[v]);
  for (int lane = 0; lane < lanes; ++lane)
    __builtin_memcpy(out + lane * kTile, values + 4 * counter_of_lane(lane), 4 * sizeof(float));
}

void transpose(const float* tile, int rows, int columns, float* out) {
  for (int i = 0; i < rows; i += 4)
    for (int j = 0; j < columns; j += kLanes) transpose_four(tile + i * kTile + j, kTile, kLanes, out + j * kTile + i);
}

void add_columns(const Columns& from, int64_t n, double* sums) {
  float values[kTile];
  for (int64_t at = 0; at < from.count; at += kTile) {
    const int64_t count = from.count - at < kTile ? from.count - at : kTile;
    const Columns some = from.part(at, count);
    double own[kTile];
    __builtin_memcpy(own, sums + at, count * sizeof(double));
    for (int64_t row = 0; row < n; ++row) {
      some.row(row, values);
      for (int64_t k = 0; k < count; ++k) own[k] += values[k];
    }
    __builtin_memcpy(sums + at, own, count * sizeof(double));
  }
}

void column_means(const Columns& from, int64_t n, float* means) {
  for (int64_t at = 0; at < from.count; at += kTile) {
    const int64_t count = from.count - at < kTile ? from.count - at : kTile;
    double sums[kTile] = {};
    add_columns(from.part(at, count), n, sums);
    for (int64_t k = 0; k < count; ++k) means[at + k] = static_cast<float>(sums[k] / static_cast<double>(n));
  }
}

void pack_rows(const Columns& from, const float* means, int64_t block, const Points& to) {
  const int count = to.count(block);
  float* rows = to.row_block(block);
  for (int i = 0; i < count; ++i) {
    float* row = rows + i * to.stride;
    from.row(block * kTile + i, row);
    if (means)
      for (int64_t k = 0; k < to.d; ++k) row[k] -= means[k];
    for (int64_t k = to.d; k < to.stride; ++k) row[k] = 0.0f;
  }
  __builtin_memset(rows + count * to.stride, 0, (round_up(count, kUnit) - count) * to.stride * sizeof(float));
}

void pack(const Columns& from, const float* means, int64_t block, const Points& to) {
  pack_rows(from, means, block, to);
  const float* rows = to.row_block(block);
  float *panel = to.panel(block), *norms = to.norms + block * kTile;
  const int columns = static_cast<int>(round_up(to.count(block), kUnit));
  // Four points side by side: a fourth of the stores that single values would take.
  for (int i = 0; i < columns; i += 4)
    for (int64_t k = 0; k < to.d; k += kLanes) {
      const int lanes = to.d - k < kLanes ? static_cast<int>(to.d - k) : kLanes;
      transpose_four(rows + i * to.stride + k, to.stride, lanes, panel + k * kTile + i);
    }
  for (int i = 0; i < columns; i += kLanes) {
    FloatV norm{};
    for (int64_t begin = 0; begin < to.d; begin += kDepth) {
      const int64_t end = to.d - begin < kDepth ? to.d : begin + kDepth;
      FloatV sum{};
      for (int64_t k = begin; k < end; ++k) {
        const FloatV x = load(panel + k * kTile + i);
        sum = Lane<FloatV>::fma(x, x, sum);
      }
      norm = begin > 0 ? norm + sum : sum;
    }
    store(norms + i, norm);
  }
}

}  // namespace fe::inline FE_ISA
