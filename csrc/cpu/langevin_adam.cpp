#include "cpu/langevin_adam.h"

#include "cpu/stage.h"

namespace fe::FE_ISA {

namespace {

// Pointers to the elements of one contiguous float32 run, which `index` numbers; index is a multiple of kBlock.
struct Run {
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq, *largest;
  const float* anchor;
};

template <Noise kNoise, bool kExtras>
void run_blocks(const Run& run, int64_t blocks, uint64_t index, const LangevinAdamSpan& span) {
  const LangevinAdamCoefficients<float> c = span.single;
  const NoiseKey key = span.noise;
  // The words of the next turn are drawn beside the arithmetic of this one: each fills the other's waiting time.
  Words<UnsignedV> words[kGroups];
  if (kNoise != Noise::kNone) words_by_lane(index / 4, key, words);
  for (int64_t at = 0; at < blocks * kBlock; at += kNoiseElements) {
    FloatV normals[kNoiseVectors] = {};
    if (kNoise != Noise::kNone) {
      normals_in_order(words, normals);
      words_by_lane((index + at + kNoiseElements) / 4, key, words);
    }
    for (int i = 0; i < kNoiseVectors; ++i) {
      const int64_t e = at + i * kLanes;
      FloatV param = load(run.param + e), exp_avg = load(run.exp_avg + e), exp_avg_sq = load(run.exp_avg_sq + e);
      FloatV largest{}, anchor{};
      if (kExtras && c.amsgrad) largest = load(run.largest + e);
      if (kExtras && run.anchor) anchor = load(run.anchor + e);
      langevin_adam<kNoise, kExtras>(param, load(run.grad + e), exp_avg, exp_avg_sq, largest, anchor, normals[i], c);
      store(run.param + e, param);
      store(run.exp_avg + e, exp_avg);
      store(run.exp_avg_sq + e, exp_avg_sq);
      if (kExtras && c.amsgrad) store(run.largest + e, largest);
    }
  }
}

using BlockLoop = void (*)(const Run&, int64_t, uint64_t, const LangevinAdamSpan&);

BlockLoop block_loop(const LangevinAdamCoefficients<float>& c) {
  static constexpr BlockLoop loops[4][2] = {
      {run_blocks<Noise::kMomentum, false>, run_blocks<Noise::kMomentum, true>},
      {run_blocks<Noise::kPreconditioned, false>, run_blocks<Noise::kPreconditioned, true>},
      {run_blocks<Noise::kIsotropic, false>, run_blocks<Noise::kIsotropic, true>},
      {run_blocks<Noise::kNone, false>, run_blocks<Noise::kNone, true>},
  };
  return loops[static_cast<int>(c.noise)][c.extras()];
}

uint32_t loaded_operands(const LangevinAdamSpan& span) {
  return 1u << kParam | 1u << kGrad | 1u << kExpAvg | 1u << kExpAvgSq |
         (span.single.amsgrad ? 1u << kMaxExpAvgSq : 0u) | (span.data[kAnchor] ? 1u << kAnchor : 0u);
}

uint32_t saved_operands(const LangevinAdamSpan& span) {
  return 1u << kParam | 1u << kExpAvg | 1u << kExpAvgSq | (span.single.amsgrad ? 1u << kMaxExpAvgSq : 0u);
}

void run_staged_float(const LangevinAdamSpan& span, BlockLoop loop, int64_t begin, int64_t count) {
  run_staged<float>(span, begin, count, loaded_operands(span), saved_operands(span),
                    [&](Stage<float>& s, uint64_t index, int blocks) {
                      const float* anchor = span.data[kAnchor] ? s.data[kAnchor] : nullptr;
                      loop({s.data[kParam], s.data[kGrad], s.data[kExpAvg], s.data[kExpAvgSq], s.data[kMaxExpAvgSq], anchor},
                           blocks, index, span);
                    });
}

// float64 parameters take the float32 normal, widened. Rare enough that the compiler's own vectorisation serves.
template <Noise kNoise>
void run_staged_double(const LangevinAdamSpan& span) {
  const LangevinAdamCoefficients<double> c = span.wide;
  run_staged<double>(span, span.begin, span.count, loaded_operands(span), saved_operands(span),
                     [&](Stage<double>& s, uint64_t index, int blocks) {
                       alignas(64) float normals[kStage] = {};
                       for (int e = 0; kNoise != Noise::kNone && e < blocks * kBlock; e += kNoiseElements) {
                         FloatV v[kNoiseVectors];
                         normals_in_order((index + e) / 4, span.noise, v);
                         __builtin_memcpy(normals + e, v, sizeof v);
                       }
                       const double* anchor = s.data[kAnchor];
                       for (int e = s.shift; e < s.shift + s.count; ++e)
                         langevin_adam<kNoise, true>(s.data[kParam][e], s.data[kGrad][e], s.data[kExpAvg][e],
                                                     s.data[kExpAvgSq][e], s.data[kMaxExpAvgSq][e],
                                                     span.data[kAnchor] ? anchor[e] : 0.0,
                                                     static_cast<double>(normals[e]), c);
                     });
}

bool straight_from_memory(const LangevinAdamSpan& span) {
  if (span.layout) return false;
  const uint32_t used = loaded_operands(span);
  for (int operand = 0; operand < kOperands; ++operand)
    if ((used >> operand & 1u) && span.dtypes[operand] != kFloat32) return false;
  return true;
}

}  // namespace

void langevin_adam_span(const LangevinAdamSpan& span) {
  if (span.dtypes[kParam] == kFloat64) {
    switch (span.wide.noise) {
      case Noise::kMomentum: return run_staged_double<Noise::kMomentum>(span);
      case Noise::kPreconditioned: return run_staged_double<Noise::kPreconditioned>(span);
      case Noise::kIsotropic: return run_staged_double<Noise::kIsotropic>(span);
      case Noise::kNone: return run_staged_double<Noise::kNone>(span);
    }
  }
  const BlockLoop loop = block_loop(span.single);
  if (!straight_from_memory(span)) return run_staged_float(span, loop, span.begin, span.count);

  const int64_t until_block = (kBlock - span.index % kBlock) % kBlock;
  const int64_t head = until_block < span.count ? until_block : span.count;
  const int64_t blocks = (span.count - head) / kBlock, first = span.begin + head;
  auto at = [&](Operand operand) {
    float* base = static_cast<float*>(span.data[operand]);
    return base ? base + first : nullptr;
  };
  run_staged_float(span, loop, span.begin, head);
  loop({at(kParam), at(kGrad), at(kExpAvg), at(kExpAvgSq), at(kMaxExpAvgSq), at(kAnchor)}, blocks, span.index + head, span);
  run_staged_float(span, loop, first + blocks * kBlock, span.count - head - blocks * kBlock);
}

}  // namespace fe::FE_ISA
