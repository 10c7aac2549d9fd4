// Philox noise in element order, kGroups * kLanes counter blocks at a time.
#pragma once

#include "cpu/lanes.h"
#include "math/normal.h"

namespace fe::inline FE_ISA {

inline constexpr int kNoiseVectors = 4 * kGroups;
inline constexpr int kNoiseElements = kNoiseVectors * kLanes;

// The words of counters counter .. counter + kVectors * kLanes - 1, in the lanes that kCounter says, kLanes counters a
// vector; counter is a multiple of their number.
template <int kVectors = kGroups, int (*kCounter)(int) = counter_of_lane>
FE_HD void words_by_lane(uint64_t counter, const NoiseKey& key, Words<UnsignedV> out[kVectors]) {
  using Chains = WideChains<kVectors>;
  Chains lanes;
  for (int part = 0; part < Chains::kParts; ++part)
    for (int i = 0; i < kLanes / 2; ++i) lanes.part[part][i] = part / 2 * kLanes + kCounter(2 * i + part % 2);
  const uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
  const Words<Chains> w = noise_words<Chains>(lanes + low, high, key);
#pragma GCC unroll 2
  for (int k = 0; k < kVectors; ++k)
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

// The words of 4 * kVectors * kLanes elements, in their order.
template <int kVectors = kGroups>
FE_HD void words_in_order(uint64_t counter, const NoiseKey& key, UnsignedV out[4 * kVectors]) {
  Words<UnsignedV> words[kVectors];
  words_by_lane<kVectors>(counter, key, words);
#pragma GCC unroll 2
  for (int k = 0; k < kVectors; ++k) {
    const Words<UnsignedV>& w = words[k];
    FloatV ordered[4];
    in_order((FloatV)w.x, (FloatV)w.y, (FloatV)w.z, (FloatV)w.w, ordered);
    for (int i = 0; i < 4; ++i) out[4 * k + i] = (UnsignedV)ordered[i];
  }
}

// Of elements in pairs (see in_pairs).
FE_HD void words_in_pairs(uint64_t counter, const NoiseKey& key, UnsignedV out[kNoiseVectors]) {
  Words<UnsignedV> words[kGroups];
  words_by_lane<kGroups, counter_of_paired_lane>(counter, key, words);
#pragma GCC unroll 2
  for (int k = 0; k < kGroups; ++k) {
    const Words<UnsignedV>& w = words[k];
    FloatV paired[4];
    in_pairs((FloatV)w.x, (FloatV)w.y, (FloatV)w.z, (FloatV)w.w, paired);
    for (int i = 0; i < 4; ++i) out[4 * k + i] = (UnsignedV)paired[i];
  }
}

FE_HD void normals_in_pairs(uint64_t counter, const NoiseKey& key, FloatV out[kNoiseVectors]) {
  Words<UnsignedV> words[kGroups];
  words_by_lane<kGroups, counter_of_paired_lane>(counter, key, words);
#pragma GCC unroll 2
  for (int k = 0; k < kGroups; ++k) {
    const Normals<FloatV> n = normals_of<FloatV>(words[k]);
    in_pairs(n.x, n.y, n.z, n.w, out + 4 * k);
  }
}

}  // namespace fe::inline FE_ISA
