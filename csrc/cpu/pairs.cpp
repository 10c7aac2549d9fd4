#include "cpu/pairs.h"

namespace fe::inline FE_ISA {

void column_means(const Columns& from, int64_t n, float* means) {
  float values[kTile];
  for (int64_t at = 0; at < from.count; at += kTile) {
    const int64_t count = from.count - at < kTile ? from.count - at : kTile;
    const Columns some = from.part(at, count);
    double sums[kTile] = {};
    for (int64_t row = 0; row < n; ++row) {
      some.row(row, values);
      for (int64_t k = 0; k < count; ++k) sums[k] += values[k];
    }
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
      turn_four(rows + i * to.stride + k, to.stride, lanes, panel + k * kTile + i);
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
