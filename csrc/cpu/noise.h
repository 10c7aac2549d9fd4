// Philox noise in element order, kGroups * kLanes counter blocks at a time.
#pragma once

#include "cpu/simd.h"
#include "core/normal.h"

namespace fe::inline FE_ISA {

inline constexpr int kNoiseVectors = 4 * kGroups;
inline constexpr int kNoiseElements = kNoiseVectors * kLanes;

// How four vectors of words or normals, those of elements 4c .. 4c + 3 in lane c, become vectors of elements.
struct InOrder {
  static constexpr int counter(int lane) { return counter_of_lane(lane); }
  static FE_HD void arrange(FloatV w0, FloatV w1, FloatV w2, FloatV w3, FloatV out[4]) { in_order(w0, w1, w2, w3, out); }
};

struct InPairs {
  static constexpr int counter(int lane) { return counter_of_paired_lane(lane); }
  static FE_HD void arrange(FloatV w0, FloatV w1, FloatV w2, FloatV w3, FloatV out[4]) { in_pairs(w0, w1, w2, w3, out); }
};

// The words of counters counter .. counter + kVectors * kLanes - 1, in the lanes that Order says, kLanes counters per vector;
// counter is a multiple of their number.
template <class Order = InOrder, int kVectors = kGroups>
FE_HD void words_by_lane(uint64_t counter, const NoiseKey& key, Words<UnsignedV> out[kVectors]) {
  using Chains = Word64Chains<kVectors>;
  Chains lanes;
  for (int part = 0; part < Chains::kParts; ++part)
    for (int i = 0; i < kLanes / 2; ++i)
      lanes.part[part][i] = part / 2 * kLanes + Order::counter(2 * i + part % 2);
  const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
  const Words<Chains> w = noise_words<Chains>(lanes + low, high, key);
#pragma GCC unroll 2
  for (int k = 0; k < kVectors; ++k)
    out[k] = {zip(w.x.part[2 * k], w.x.part[2 * k + 1]), zip(w.y.part[2 * k], w.y.part[2 * k + 1]),
              zip(w.z.part[2 * k], w.z.part[2 * k + 1]), zip(w.w.part[2 * k], w.w.part[2 * k + 1])};
}

// The normals that words_by_lane's words make, as vectors of elements.
template <class Order = InOrder>
FE_HD void draw_normals(const Words<UnsignedV> words[kGroups], FloatV out[kNoiseVectors]) {
#pragma GCC unroll 2
  for (int k = 0; k < kGroups; ++k) {
    const Normals<FloatV> n = normals_of<FloatV>(words[k]);
    Order::arrange(n.x, n.y, n.z, n.w, out + 4 * k);
  }
}

// The normals of elements 4 * counter .. 4 * counter + kNoiseElements - 1.
template <class Order = InOrder>
FE_HD void draw_normals(uint64_t counter, const NoiseKey& key, FloatV out[kNoiseVectors]) {
  Words<UnsignedV> words[kGroups];
  words_by_lane<Order>(counter, key, words);
  draw_normals<Order>(words, out);
}

// The words of as many vectors of elements, or of those of fewer vectors of counters.
template <class Order = InOrder, int kVectors = kGroups>
FE_HD void draw_words(uint64_t counter, const NoiseKey& key, UnsignedV out[4 * kVectors]) {
  Words<UnsignedV> words[kVectors];
  words_by_lane<Order, kVectors>(counter, key, words);
#pragma GCC unroll 2
  for (int k = 0; k < kVectors; ++k) {
    const Words<UnsignedV>& w = words[k];
    FloatV arranged[4];
    Order::arrange((FloatV)w.x, (FloatV)w.y, (FloatV)w.z, (FloatV)w.w, arranged);
    for (int i = 0; i < 4; ++i) out[4 * k + i] = (UnsignedV)arranged[i];
  }
}

}  // namespace fe::inline FE_ISA
