// Philox noise in element order, kGroups * kLanes counter blocks at a time.
#pragma once

#include "cpu/lanes.h"
#include "math/normal.h"

namespace fe::inline FE_ISA {

inline constexpr int kNoiseVectors = 4 * kGroups;
inline constexpr int kNoiseElements = kNoiseVectors * kLanes;

// The words of counters counter .. counter + kGroups * kLanes - 1, in the lanes that counter_of_lane says, kLanes counters
// a group; counter is a multiple of their number.
FE_HD void words_by_lane(uint64_t counter, const NoiseKey& key, Words<UnsignedV> out[kGroups]) {
  WideChains lanes;
  for (int part = 0; part < WideChains::kParts; ++part)
    for (int i = 0; i < kLanes / 2; ++i)
      lanes.part[part][i] = part / 2 * kLanes + counter_of_lane(2 * i + part % 2);
  const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
  const Words<WideChains> w = noise_words<WideChains>(lanes + low, high, key);
#pragma GCC unroll 2
  for (int k = 0; k < kGroups; ++k)
    out[k] = {zip(w.x.part[2 * k], w.x.part[2 * k + 1]), zip(w.y.part[2 * k], w.y.part[2 * k + 1]),
              zip(w.z.part[2 * k], w.z.part[2 * k + 1]), zip(w.w.part[2 * k], w.w.part[2 * k + 1])};
}

// The normals that words_by_lane's words make, in element order.
FE_HD void normals_in_order(const Words<UnsignedV> words[kGroups], FloatV out[kNoiseVectors]) {
#pragma GCC unroll 2
  for (int k = 0; k < kGroups; ++k) {
    const Normals<FloatV> n = normals_of<FloatV>(words[k]);
    in_order(n.x, n.y, n.z, n.w, out + 4 * k);
  }
}

// The normals of elements 4 * counter .. 4 * counter + kNoiseElements - 1.
FE_HD void normals_in_order(uint64_t counter, const NoiseKey& key, FloatV out[kNoiseVectors]) {
  Words<UnsignedV> words[kGroups];
  words_by_lane(counter, key, words);
  normals_in_order(words, out);
}

FE_HD void words_in_order(uint64_t counter, const NoiseKey& key, UnsignedV out[kNoiseVectors]) {
  Words<UnsignedV> words[kGroups];
  words_by_lane(counter, key, words);
#pragma GCC unroll 2
  for (int k = 0; k < kGroups; ++k) {
    const Words<UnsignedV>& w = words[k];
    FloatV ordered[4];
    in_order((FloatV)w.x, (FloatV)w.y, (FloatV)w.z, (FloatV)w.w, ordered);
    for (int i = 0; i < 4; ++i) out[4 * k + i] = (UnsignedV)ordered[i];
  }
}

}  // namespace fe::inline FE_ISA
