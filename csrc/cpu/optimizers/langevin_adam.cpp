#include "cpu/optimizers/bf16_pairs.h"
#include "cpu/optimizers/optimizers.h"
#include "cpu/optimizers/buffered_span.h"

namespace fe::FE_ISA {

namespace {

constexpr RareTerms kPlain = RareTerms::kPlain, kStill = RareTerms::kFrozen, kAll = RareTerms::kAll;

// Pointers to the elements of a contiguous stretch, which `index` numbers; index is a multiple of kBlock.
template <class T>
struct Operands {
  T* param;
  const T* grad;
  T *exp_avg, *exp_avg_sq, *largest;
  const T* anchor;

  void touch_operands_ahead(int64_t at) const {
    if (at % kPage<T> != 0) return;
    touch_ahead(param + at);
    touch_ahead(grad + at);
    touch_ahead(exp_avg + at);
    touch_ahead(exp_avg_sq + at);
  }
};

template <Noise kNoise, RareTerms kTerms>
void run_blocks(const Operands<float>& operands, int64_t blocks, uint64_t index, const LangevinAdamSpan& span) {
  constexpr bool kExtras = kTerms == kAll;
  const LangevinAdamCoefficients<float> c = span.single;
  const NoiseKey key = span.noise;
  // The words of the next iteration are drawn beside the arithmetic of this one: each fills the other's waiting time.
  Words<UnsignedV> words[kGroups];
  if (kNoise != Noise::kNone) words_by_lane(index / 4, key, words);
  for (int64_t at = 0; at < blocks * kBlock; at += kNoiseElements) {
    operands.touch_operands_ahead(at);
    FloatV normals[kNoiseVectors] = {};
    if (kNoise != Noise::kNone) {
      draw_normals(words, normals);
      words_by_lane((index + at + kNoiseElements) / 4, key, words);
    }
    // gcc stops by itself where a body is a little longer; the normals then go through memory, and nothing is interleaved:
    // 15% of a step with noise.
#pragma GCC unroll 8
    for (int i = 0; i < kNoiseVectors; ++i) {
      const int64_t e = at + i * kLanes;
      FloatV param = load(operands.param + e), exp_avg = load(operands.exp_avg + e), exp_avg_sq = load(operands.exp_avg_sq + e);
      FloatV largest{}, anchor{};
      if (kExtras && c.amsgrad) largest = load(operands.largest + e);
      if (kExtras && operands.anchor) anchor = load(operands.anchor + e);
      langevin_adam<kNoise, kTerms>(param, load(operands.grad + e), exp_avg, exp_avg_sq, largest, anchor, normals[i], c);
      store(operands.param + e, param);
      store(operands.exp_avg + e, exp_avg);
      if (kTerms == kPlain || (kExtras && !c.frozen)) store(operands.exp_avg_sq + e, exp_avg_sq);
      if (kExtras && c.amsgrad) store(operands.largest + e, largest);
    }
  }
}

// All four operands in bfloat16, without extras. The bits of RoundingNoise are drawn in registers.
template <Noise kNoise, bool kStochastic, RareTerms kTerms>
void run_bf16_blocks(const Operands<uint16_t>& operands, int64_t blocks, uint64_t index, const LangevinAdamSpan& span) {
  const LangevinAdamCoefficients<float> c = span.single;
  const NoiseKey key = span.noise, rounding = span.rounding, second = second_stream(rounding);
  constexpr bool kMoves = kTerms != kStill;  // exp_avg_sq does
  constexpr int kVectors = 8, kTurn = kVectors * kLanes;  // elements that have their halves in one vector of counters
  for (int64_t at = 0; at < blocks * kBlock; at += kTurn) {
    operands.touch_operands_ahead(at);
    FloatV normals[kVectors] = {};
    UnsignedV words[kVectors] = {}, halves[kVectors / 2] = {};
    const uint64_t first = index + at;
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i += kNoiseVectors) {
      if (kNoise != Noise::kNone) draw_normals<InPairs>((first + i * kLanes) / 4, key, normals + i);
      if (kStochastic) draw_words<InPairs>((first + i * kLanes) / 4, rounding, words + i);
    }
    if (kStochastic && kMoves) draw_words<InOrder, 1>(first / 8, second, halves);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i += 2) {
      const int64_t e = at + i * kLanes;
      Bf16Pairs param = Bf16Pairs::load(operands.param + e), grad = Bf16Pairs::load(operands.grad + e);
      Bf16Pairs exp_avg = Bf16Pairs::load(operands.exp_avg + e), exp_avg_sq = Bf16Pairs::load(operands.exp_avg_sq + e);
      FloatV largest{}, anchor{};
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k)
        langevin_adam<kNoise, kTerms>(param.part[k], grad.part[k], exp_avg.part[k], exp_avg_sq.part[k], largest, anchor,
                                     normals[i + k], c);
      if (kStochastic) {
        const UnsignedV even = words[i], odd = words[i + 1], both = halves[i / 2];
        param.store(operands.param + e, even & 0xffffu, odd & 0xffffu);
        exp_avg.store(operands.exp_avg + e, even >> 16, odd >> 16);
        if (kMoves) exp_avg_sq.store(operands.exp_avg_sq + e, both & 0xffffu, both >> 16);
      } else {
        param.store_nearest(operands.param + e);
        exp_avg.store_nearest(operands.exp_avg + e);
        if (kMoves) exp_avg_sq.store_nearest(operands.exp_avg_sq + e);
      }
    }
  }
}

template <class T>
using BlockLoop = void (*)(const Operands<T>&, int64_t, uint64_t, const LangevinAdamSpan&);

BlockLoop<float> block_loop(const LangevinAdamCoefficients<float>& c) {
  // Instances cost compile time: a frozen step with noise beside the momentum has none of its own.
  static constexpr BlockLoop<float> loops[4][3] = {
      {run_blocks<Noise::kMomentum, kPlain>, run_blocks<Noise::kMomentum, kStill>, run_blocks<Noise::kMomentum, kAll>},
      {run_blocks<Noise::kPreconditioned, kPlain>, run_blocks<Noise::kPreconditioned, kAll>,
       run_blocks<Noise::kPreconditioned, kAll>},
      {run_blocks<Noise::kIsotropic, kPlain>, run_blocks<Noise::kIsotropic, kAll>, run_blocks<Noise::kIsotropic, kAll>},
      {run_blocks<Noise::kNone, kPlain>, run_blocks<Noise::kNone, kStill>, run_blocks<Noise::kNone, kAll>},
  };
  return loops[static_cast<int>(c.noise)][static_cast<int>(c.rare_terms())];
}

// Null where the elements go through a buffer, as frozen ones do that are rounded to nearest.
BlockLoop<uint16_t> bf16_block_loop(const LangevinAdamSpan& span) {
  static constexpr BlockLoop<uint16_t> loops[2][3] = {
      {run_bf16_blocks<Noise::kMomentum, false, kPlain>, run_bf16_blocks<Noise::kMomentum, true, kPlain>,
       run_bf16_blocks<Noise::kMomentum, true, kStill>},
      {run_bf16_blocks<Noise::kNone, false, kPlain>, run_bf16_blocks<Noise::kNone, true, kPlain>,
       run_bf16_blocks<Noise::kNone, true, kStill>},
  };
  const LangevinAdamCoefficients<float>& c = span.single;
  const RareTerms terms = c.rare_terms();
  if (terms == kAll || (terms == kStill && !span.stochastic)) return nullptr;
  if (c.noise != Noise::kMomentum && c.noise != Noise::kNone) return nullptr;
  return loops[c.noise == Noise::kNone][span.stochastic + (terms == kStill)];
}

uint32_t loaded_operands(const LangevinAdamSpan& span) {
  return 1u << kParam | 1u << kGrad | 1u << kExpAvg | 1u << span.single.second_moment |
         (span.single.amsgrad ? 1u << kMaxExpAvgSq : 0u) | (span.data[kAnchor] ? 1u << kAnchor : 0u);
}

uint32_t saved_operands(const LangevinAdamSpan& span) {
  return 1u << kParam | 1u << kExpAvg | (span.single.frozen ? 0u : 1u << kExpAvgSq) |
         (span.single.amsgrad ? 1u << kMaxExpAvgSq : 0u);
}

void run_buffered_float(const LangevinAdamSpan& span, BlockLoop<float> loop, int64_t begin, int64_t count) {
  run_buffered<float>(span, begin, count, loaded_operands(span), saved_operands(span),
                    [&](Buffers<float>& s, uint64_t index, int blocks) {
                      const float* anchor = span.data[kAnchor] ? s.data[kAnchor] : nullptr;
                      loop({s.data[kParam], s.data[kGrad], s.data[kExpAvg], s.data[span.single.second_moment],
                            s.data[kMaxExpAvgSq], anchor},
                           blocks, index, span);
                    });
}

// float64 parameters take the float32 normal, widened. Rare enough that the compiler's own vectorisation serves.
template <Noise kNoise>
void run_buffered_double(const LangevinAdamSpan& span) {
  const LangevinAdamCoefficients<double> c = span.for_double;
  run_buffered<double>(span, span.begin, span.count, loaded_operands(span), saved_operands(span),
                     [&](Buffers<double>& s, uint64_t index, int blocks) {
                       alignas(64) float normals[kBufferElements] = {};
                       for (int e = 0; kNoise != Noise::kNone && e < blocks * kBlock; e += kNoiseElements) {
                         FloatV v[kNoiseVectors];
                         draw_normals((index + e) / 4, span.noise, v);
                         __builtin_memcpy(normals + e, v, sizeof v);
                       }
                       const double* anchor = s.data[kAnchor];
                       for (int e = s.shift; e < s.shift + s.count; ++e)
                         langevin_adam<kNoise, kAll>(s.data[kParam][e], s.data[kGrad][e], s.data[kExpAvg][e],
                                                     s.data[c.second_moment][e], s.data[kMaxExpAvgSq][e],
                                                     span.data[kAnchor] ? anchor[e] : 0.0,
                                                     static_cast<double>(normals[e]), c);
                     });
}

bool straight_from_memory(const LangevinAdamSpan& span, DType dtype) {
  if (span.layout) return false;
  const uint32_t used = loaded_operands(span);
  for (int operand = 0; operand < kOperands; ++operand)
    if ((used >> operand & 1u) && span.dtypes[operand] != dtype) return false;
  return true;
}

// Whole blocks by `loop`, the ends that do not fill one through a buffer.
template <class T>
void run_straight(const LangevinAdamSpan& span, BlockLoop<T> loop, BlockLoop<float> buffered) {
  const int64_t until_block = (kBlock - span.index % kBlock) % kBlock;
  const int64_t head = until_block < span.count ? until_block : span.count;
  const int64_t blocks = (span.count - head) / kBlock, first = span.begin + head;
  auto at = [&](Operand operand) {
    T* base = static_cast<T*>(span.data[operand]);
    return base ? base + first : nullptr;
  };
  run_buffered_float(span, buffered, span.begin, head);
  loop({at(kParam), at(kGrad), at(kExpAvg), at(span.single.second_moment), at(kMaxExpAvgSq), at(kAnchor)}, blocks,
       span.index + head, span);
  run_buffered_float(span, buffered, first + blocks * kBlock, span.count - head - blocks * kBlock);
}

}  // namespace

void langevin_adam_span(const LangevinAdamSpan& span) {
  if (span.dtypes[kParam] == kFloat64) {
    switch (span.for_double.noise) {
      case Noise::kMomentum: return run_buffered_double<Noise::kMomentum>(span);
      case Noise::kPreconditioned: return run_buffered_double<Noise::kPreconditioned>(span);
      case Noise::kIsotropic: return run_buffered_double<Noise::kIsotropic>(span);
      case Noise::kNone: return run_buffered_double<Noise::kNone>(span);
    }
  }
  const BlockLoop<float> loop = block_loop(span.single);
  if (straight_from_memory(span, kFloat32)) return run_straight(span, loop, loop);
  const BlockLoop<uint16_t> bf16_loop = bf16_block_loop(span);
  if (bf16_loop && straight_from_memory(span, kBFloat16)) return run_straight(span, bf16_loop, loop);
  run_buffered_float(span, loop, span.begin, span.count);
}

}  // namespace fe::FE_ISA
