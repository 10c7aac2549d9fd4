#include "cpu/optimizers/optimizers.h"
#include "cpu/optimizers/buffered_span.h"

namespace fe::FE_ISA {

namespace {

template <bool kNoisy, bool kExtras>
void run_blocks(float* params, const float* grads, const float* anchors, int64_t blocks, uint64_t index,
                const SgldSpan& span) {
  const SgldCoefficients<float> c = span.single;
  const NoiseKey key = span.noise;
  for (int64_t at = 0; at < blocks * kBlock; at += kNoiseElements) {
    if (at % kPage<float> == 0) {
      touch_ahead(params + at);
      touch_ahead(grads + at);
    }
    FloatV normals[kNoiseVectors] = {};
    if (kNoisy) draw_normals((index + at) / 4, key, normals);
    for (int i = 0; i < kNoiseVectors; ++i) {
      const int64_t e = at + i * kLanes;
      FloatV param = load(params + e), anchor{};
      if (kExtras && anchors) anchor = load(anchors + e);
      sgld<kNoisy, kExtras>(param, load(grads + e), anchor, normals[i], c);
      store(params + e, param);
    }
  }
}

using BlockLoop = void (*)(float*, const float*, const float*, int64_t, uint64_t, const SgldSpan&);

BlockLoop block_loop(const SgldCoefficients<float>& c) {
  static constexpr BlockLoop loops[2][2] = {{run_blocks<false, false>, run_blocks<false, true>},
                                            {run_blocks<true, false>, run_blocks<true, true>}};
  return loops[c.noisy][c.extras()];
}

uint32_t loaded_operands(const SgldSpan& span) {
  return 1u << kParam | 1u << kGrad | (span.data[kAnchor] ? 1u << kAnchor : 0u);
}

void run_buffered_float(const SgldSpan& span, BlockLoop loop, int64_t begin, int64_t count) {
  run_buffered<float>(span, begin, count, loaded_operands(span), 1u << kParam,
                    [&](Buffers<float>& s, uint64_t index, int blocks) {
                      loop(s.data[kParam], s.data[kGrad], span.data[kAnchor] ? s.data[kAnchor] : nullptr, blocks, index,
                           span);
                    });
}

template <bool kNoisy>
void run_buffered_double(const SgldSpan& span) {
  const SgldCoefficients<double> c = span.for_double;
  run_buffered<double>(span, span.begin, span.count, loaded_operands(span), 1u << kParam,
                     [&](Buffers<double>& s, uint64_t index, int blocks) {
                       alignas(64) float normals[kBufferElements] = {};
                       for (int e = 0; kNoisy && e < blocks * kBlock; e += kNoiseElements) {
                         FloatV v[kNoiseVectors];
                         draw_normals((index + e) / 4, span.noise, v);
                         __builtin_memcpy(normals + e, v, sizeof v);
                       }
                       for (int e = s.shift; e < s.shift + s.count; ++e)
                         sgld<kNoisy, true>(s.data[kParam][e], s.data[kGrad][e],
                                            span.data[kAnchor] ? s.data[kAnchor][e] : 0.0,
                                            static_cast<double>(normals[e]), c);
                     });
}

}  // namespace

void sgld_span(const SgldSpan& span) {
  if (span.dtypes[kParam] == kFloat64) return span.for_double.noisy ? run_buffered_double<true>(span) : run_buffered_double<false>(span);
  const BlockLoop loop = block_loop(span.single);
  const bool float32 = span.dtypes[kParam] == kFloat32 && span.dtypes[kGrad] == kFloat32 &&
                       (!span.data[kAnchor] || span.dtypes[kAnchor] == kFloat32);
  if (span.layout || !float32) return run_buffered_float(span, loop, span.begin, span.count);

  const int64_t until_block = (kBlock - span.index % kBlock) % kBlock;
  const int64_t head = until_block < span.count ? until_block : span.count;
  const int64_t blocks = (span.count - head) / kBlock, first = span.begin + head;
  run_buffered_float(span, loop, span.begin, head);
  loop(static_cast<float*>(span.data[kParam]) + first, static_cast<const float*>(span.data[kGrad]) + first,
       span.data[kAnchor] ? static_cast<const float*>(span.data[kAnchor]) + first : nullptr, blocks, span.index + head, span);
  run_buffered_float(span, loop, first + blocks * kBlock, span.count - head - blocks * kBlock);
}

}  // namespace fe::FE_ISA
