#include "cpu/random.h"

#include "cpu/noise.h"

namespace fe::FE_ISA {

namespace {

template <Draw kDraw>
FE_HD void draw_in_order(uint64_t counter, const NoiseKey& key, float* out) {
  FloatV values[kNoiseVectors];
  if (kDraw == Draw::kNormal) {
    draw_normals(counter, key, values);
  } else {
    UnsignedV words[kNoiseVectors];
    draw_words(counter, key, words);
    for (int i = 0; i < kNoiseVectors; ++i) values[i] = kDraw == Draw::kBits ? (FloatV)words[i] : uniform<FloatV>(words[i]);
  }
  for (int i = 0; i < kNoiseVectors; ++i) store(out + i * kLanes, values[i]);
}

template <Draw kDraw>
void fill(float* out, int64_t count, uint64_t offset, const NoiseKey& key) {
  float whole[kNoiseElements];
  while (count > 0) {
    const int64_t skip = offset % kNoiseElements;
    const uint64_t counter = (offset - skip) / 4;
    int64_t n = kNoiseElements - skip;
    if (n == kNoiseElements && count >= n) {
      draw_in_order<kDraw>(counter, key, out);
    } else {
      if (n > count) n = count;
      draw_in_order<kDraw>(counter, key, whole);
      __builtin_memcpy(out, whole + skip, n * sizeof(float));
    }
    out += n;
    offset += n;
    count -= n;
  }
}

}  // namespace

void fill_philox(Draw draw, void* out, int64_t count, uint64_t offset, const NoiseKey& key) {
  float* values = static_cast<float*>(out);
  switch (draw) {
    case Draw::kBits: return fill<Draw::kBits>(values, count, offset, key);
    case Draw::kUniform: return fill<Draw::kUniform>(values, count, offset, key);
    case Draw::kNormal: return fill<Draw::kNormal>(values, count, offset, key);
  }
}

}  // namespace fe::FE_ISA
