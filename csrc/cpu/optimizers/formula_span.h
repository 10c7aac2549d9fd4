// The kernel of a span for an operation that is one formula over its operands, as DrawFormula of
// formulas/variational_draw.h, without loops of its own such as langevin_adam.cpp has.
#pragma once

#include "cpu/optimizers/buffered_span.h"
#include "cpu/optimizers/optimizers.h"

namespace fe::inline FE_ISA {

template <class Formula, class RowSpan, class C>
FE_HD void formula_blocks(float* const* data, int64_t blocks, uint64_t index, const RowSpan& span, const C& c) {
  const NoiseKey key = span.noise;
  constexpr uint32_t kUsed = Formula::kLoaded | Formula::kSaved;
  // As in langevin_adam.cpp: the words of the next iteration are drawn beside the arithmetic of this one.
  Words<UnsignedV> words[kGroups];
  if (Formula::kNoise) words_by_lane(index / 4, key, words);
  for (int64_t at = 0; at < blocks * kBlock; at += kNoiseElements) {
    if (at % kPage<float> == 0)
      for (int operand = 0; operand < kOperands; ++operand)
        if (kUsed >> operand & 1u) touch_ahead(data[operand] + at);
    FloatV normals[kNoiseVectors] = {};
    if (Formula::kNoise) {
      draw_normals(words, normals);
      words_by_lane((index + at + kNoiseElements) / 4, key, words);
    }
#pragma GCC unroll 8  // as there
    for (int i = 0; i < kNoiseVectors; ++i) {
      const int64_t e = at + i * kLanes;
      FloatV x[kOperands] = {};
#pragma GCC unroll 6
      for (int operand = 0; operand < kOperands; ++operand)
        if (Formula::kLoaded >> operand & 1u) x[operand] = load(data[operand] + e);
      Formula::update(x, normals[i], c);
#pragma GCC unroll 6
      for (int operand = 0; operand < kOperands; ++operand)
        if (Formula::kSaved >> operand & 1u) store(data[operand] + e, x[operand]);
    }
  }
}

// A branch in the loop keeps the arithmetic of one vector from being interleaved with the next one's: a fifth of a draw.
template <class Formula, class RowSpan>
void formula_blocks(float* const* data, int64_t blocks, uint64_t index, const RowSpan& span) {
  const auto c = span.single;
  if constexpr (requires { c.plain(); })
    if (c.plain()) return formula_blocks<Formula>(data, blocks, index, span, c.as_plain());
  formula_blocks<Formula>(data, blocks, index, span, c);
}

template <class Formula, class RowSpan>
void formula_buffered(const RowSpan& span, int64_t begin, int64_t count) {
  run_buffered<float>(span, begin, count, Formula::kLoaded, Formula::kSaved,
                      [&](Buffers<float>& s, uint64_t index, int blocks) {
                        float* data[kOperands];
                        for (int operand = 0; operand < kOperands; ++operand) data[operand] = s.data[operand];
                        formula_blocks<Formula>(data, blocks, index, span);
                      });
}

inline void fill_normals(float* normals, int elements, uint64_t index, const NoiseKey& key) {
  for (int e = 0; e < elements; e += kNoiseElements) {
    FloatV v[kNoiseVectors];
    draw_normals((index + e) / 4, key, v);
    __builtin_memcpy(normals + e, v, sizeof v);
  }
}

// float64 parameters take the float32 normal, widened.
template <class Formula, class RowSpan>
void formula_double(const RowSpan& span) {
  const auto c = span.for_double;
  run_buffered<double>(span, span.begin, span.count, Formula::kLoaded, Formula::kSaved,
                       [&](Buffers<double>& s, uint64_t index, int blocks) {
                         alignas(64) float normals[kBufferElements] = {};
                         if (Formula::kNoise) fill_normals(normals, blocks * kBlock, index, span.noise);
                         for (int e = s.shift; e < s.shift + s.count; ++e) {
                           double x[kOperands] = {};
                           for (int operand = 0; operand < kOperands; ++operand)
                             if (Formula::kLoaded >> operand & 1u) x[operand] = s.data[operand][e];
                           Formula::update(x, static_cast<double>(normals[e]), c);
                           for (int operand = 0; operand < kOperands; ++operand)
                             if (Formula::kSaved >> operand & 1u) s.data[operand][e] = x[operand];
                         }
                       });
}

// Whole blocks of contiguous float32 operands from memory, everything else through a buffer.
template <class Formula, class RowSpan>
void formula_span(const RowSpan& span) {
  if (span.dtypes[kParam] == kFloat64) return formula_double<Formula>(span);
  bool straight = !span.layout;
  for (int operand = 0; operand < kOperands; ++operand)
    if ((Formula::kLoaded | Formula::kSaved) >> operand & 1u) straight = straight && span.dtypes[operand] == kFloat32;
  if (!straight) return formula_buffered<Formula>(span, span.begin, span.count);
  const int64_t until_block = (kBlock - span.index % kBlock) % kBlock;
  const int64_t head = until_block < span.count ? until_block : span.count;
  const int64_t blocks = (span.count - head) / kBlock, first = span.begin + head;
  float* data[kOperands];
  for (int operand = 0; operand < kOperands; ++operand) data[operand] = static_cast<float*>(span.data[operand]) + first;
  formula_buffered<Formula>(span, span.begin, head);
  formula_blocks<Formula>(data, blocks, span.index + head, span);
  formula_buffered<Formula>(span, first + blocks * kBlock, span.count - head - blocks * kBlock);
}

}  // namespace fe::inline FE_ISA
