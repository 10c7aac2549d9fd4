// What a vector loop cannot take straight from memory: 16-bit and float64 tensors, strided
// tensors, and the ends of a span that do not fill a vector. Elements are gathered into a small buffer that stays in
// the L1 cache, the same vector loop runs on the buffer, and the results go back. No temporary grows with the tensor.
#pragma once

#include <algorithm>

#include "cpu/noise.h"
#include "cpu/optimizers/span.h"
#include "core/bf16.h"

namespace fe::inline FE_ISA {

inline constexpr int kBlock = 128;    // elements that vector loops count in: a multiple of kNoiseElements on every set
inline constexpr int kBufferElements = 512;    // elements of one buffer
inline constexpr int kAlignedIndex = 256;  // buffers begin at such an index: a whole number of draws of rounding halves

// Where the elements of one buffer lie in a strided operand, relative to its first element.
class Offsets {
 public:
  // Of elements begin .. begin + count - 1. Operands with the parameter's strides, nearly always all, share one walk.
  const int64_t* of(const int64_t* layout, Operand operand, int64_t begin, int count) {
    const int64_t ndim = layout[0];
    const int64_t *param = layout + 1 + ndim, *strides = param + operand * ndim;
    if (operand != kParam && __builtin_memcmp(param, strides, ndim * sizeof *strides) == 0) return param_;
    int64_t* out = operand == kParam ? param_ : other_;
    walk(layout + 1, strides, ndim, begin, count, out);
    return out;
  }

 private:
  static void walk(const int64_t* sizes, const int64_t* strides, int64_t ndim, int64_t element, int count, int64_t* out) {
    int64_t position[64], offset = 0;  // torch's tensors have at most 64 dimensions
    for (int64_t d = ndim - 1; d >= 0; --d) {
      position[d] = element % sizes[d];
      element /= sizes[d];
      offset += position[d] * strides[d];
    }
    for (int i = 0; i < count; ++i) {
      out[i] = offset;
      for (int64_t d = ndim - 1; d >= 0; --d) {
        offset += strides[d];
        if (++position[d] < sizes[d]) break;
        offset -= position[d] * strides[d];
        position[d] = 0;
      }
    }
  }

  int64_t param_[kBufferElements], other_[kBufferElements];
};

template <class S>
struct Buffers {
  alignas(64) S data[kOperands][kBufferElements];
  int shift, count;  // elements shift .. shift + count - 1 are real
  Offsets offsets;

  int slots() const { return (shift + count + kBlock - 1) / kBlock * kBlock; }  // that vector loops compute

  void load(const Span& span, Operand operand, int64_t begin);
  void save(const Span& span, Operand operand, int64_t begin, const uint32_t* words, const uint16_t* halves);
};

template <class S>
void Buffers<S>::load(const Span& span, Operand operand, int64_t begin) {
  S* to = data[operand] + shift;
  // The vector loop computes the other slots too. Left as they were, they slow it down tenfold where they hold
  // denormal numbers, as what lies on a stack often does.
  std::fill(data[operand], to, S(0));
  std::fill(to + count, data[operand] + slots(), S(0));
  auto read = [&](const auto* from, auto convert) {
    if (span.layout) {
      const int64_t* at = offsets.of(span.layout, operand, begin, count);
      for (int i = 0; i < count; ++i) to[i] = convert(from[at[i]]);
    } else {
      from += begin;
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) to[i] = convert(from[i]);
    }
  };
  const void* from = span.data[operand];
  switch (span.dtypes[operand]) {
    case kFloat32: return read(static_cast<const float*>(from), [](float x) { return static_cast<S>(x); });
    case kFloat64: return read(static_cast<const double*>(from), [](double x) { return static_cast<S>(x); });
    case kBFloat16: return read(static_cast<const uint16_t*>(from), [](uint16_t x) { return S(bf16_to_float(x)); });
    case kFloat16: return read(static_cast<const uint16_t*>(from), [](uint16_t x) { return S(fp16_to_float(x)); });
  }
}

// `words`, 32 bits per element, or `halves`, 16, hold the rounding noise of the whole buffer; both null: to nearest even.
template <class S>
void Buffers<S>::save(const Span& span, Operand operand, int64_t begin, const uint32_t* words,
                    const uint16_t* halves) {
  const S* from = data[operand] + shift;
  auto write = [&](auto* to, auto convert) {
    if (span.layout) {
      const int64_t* at = offsets.of(span.layout, operand, begin, count);
      for (int i = 0; i < count; ++i) to[at[i]] = convert(from[i], i);
    } else {
      to += begin;
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) to[i] = convert(from[i], i);
    }
  };
  void* to = span.data[operand];
  switch (span.dtypes[operand]) {
    case kFloat32: return write(static_cast<float*>(to), [](S x, int) { return static_cast<float>(x); });
    case kFloat64: return write(static_cast<double*>(to), [](S x, int) { return static_cast<double>(x); });
    case kFloat16: return write(static_cast<uint16_t*>(to), [](S x, int) { return float_to_fp16(float(x)); });
    case kBFloat16: {
      uint16_t* bf16 = static_cast<uint16_t*>(to);
      if (words) {
        words += shift;
        const int half = operand == kParam ? 0 : 16;
        return write(bf16, [=](S x, int i) { return float_to_bf16_stochastic(float(x), words[i] >> half & 0xffffu); });
      }
      if (halves) {
        halves += shift;
        return write(bf16, [=](S x, int i) { return float_to_bf16_stochastic(float(x), halves[i]); });
      }
      return write(bf16, [](S x, int) { return float_to_bf16(float(x)); });
    }
  }
}

// In buffered_span.cpp, once for all operations: conversions of four dtypes, straight and strided, take the compiler as
// long as an operation's own loops.
extern template struct Buffers<float>;
extern template struct Buffers<double>;

// Of the rounding noise of exp_avg_sq.
FE_HD NoiseKey second_stream(NoiseKey key) {
  key.stream ^= 0x80000000u;
  return key;
}

// Rounding noise of the elements of one buffer. The parameter takes the low half of its element's word, exp_avg the
// high half. exp_avg_sq takes the 16-bit halves, in order, of a second stream (that of the parameter with its top bit
// flipped): half h of it is word[h / 2] >> 16 * (h % 2), and element g takes half g.
struct RoundingNoise {
  alignas(64) uint32_t words[kBufferElements];
  alignas(64) uint32_t pairs[kBufferElements / 2];

  const uint16_t* halves() const { return reinterpret_cast<const uint16_t*>(pairs); }

  void draw(const NoiseKey& key, uint64_t index, int elements, bool second) {
    const NoiseKey second_key = second_stream(key);
    UnsignedV v[kNoiseVectors];
    for (int i = 0; i < elements; i += kNoiseElements) {
      draw_words((index + i) / 4, key, v);
      __builtin_memcpy(words + i, v, sizeof v);
    }
    for (int i = 0; second && i < elements; i += 2 * kNoiseElements) {
      draw_words((index + i) / 8, second_key, v);
      __builtin_memcpy(pairs + i / 2, v, sizeof v);
    }
  }
};
static_assert(kBufferElements % kAlignedIndex == 0 && kAlignedIndex % kBlock == 0 && kAlignedIndex % (2 * kNoiseElements) == 0);

// Runs body(buffers, index, blocks) over elements [begin, begin + count) of the span; `index` is that of their first
// slot, and blocks * kBlock slots are to be computed.
template <class S, class Body>
void run_buffered(const Span& span, int64_t begin, int64_t count, uint32_t loaded, uint32_t saved, Body body) {
  Buffers<S> buffers;
  RoundingNoise rounding;
  const bool round = span.stochastic;
  while (count > 0) {
    const uint64_t index = span.index + (begin - span.begin);
    buffers.shift = index % kAlignedIndex;
    buffers.count = kBufferElements - buffers.shift < count ? kBufferElements - buffers.shift : count;
    const int slots = buffers.slots();
    // The others' offsets are the parameter's where their strides are.
    if (span.layout && !(loaded >> kParam & 1u)) buffers.offsets.of(span.layout, kParam, begin, buffers.count);
    for (int operand = 0; operand < kOperands; ++operand)
      if (loaded >> operand & 1u) buffers.load(span, static_cast<Operand>(operand), begin);
    body(buffers, index - buffers.shift, slots / kBlock);
    if (round) rounding.draw(span.rounding, index - buffers.shift, slots, saved >> kExpAvgSq & 1u);
    for (int operand = 0; operand < kOperands; ++operand) {
      if (!(saved >> operand & 1u)) continue;
      const bool by_word = round && (operand == kParam || operand == kExpAvg);
      // Rounded by the same bits as exp_avg_sq, the maximum stays the maximum of what was stored.
      const bool by_half = round && (operand == kExpAvgSq || operand == kMaxExpAvgSq);
      buffers.save(span, static_cast<Operand>(operand), begin, by_word ? rounding.words : nullptr,
                 by_half ? rounding.halves() : nullptr);
    }
    begin += buffers.count;
    count -= buffers.count;
  }
}

}  // namespace fe::inline FE_ISA
