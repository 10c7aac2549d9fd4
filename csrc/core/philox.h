// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the meaning of its counter.
#pragma once

#include "core/lane.h"

namespace fe {

// What the noise is for; part of the counter, so that two uses of one (seed, stream, step) never share words.
enum Purpose : uint32_t { kLangevinNoise = 0, kStochasticRounding = 1, kWeightSample = 2, kLatentSample = 3, kUser = 4 };

// Everything that fixes a sequence of words but the element's index.
struct NoiseKey {
  uint32_t seed_low, seed_high;
  uint32_t step, stream, purpose;
};

}  // namespace fe

namespace fe::inline FE_ISA {

FE_HD NoiseKey noise_key(int64_t seed, uint32_t step, uint32_t stream, uint32_t purpose) {
  const uint64_t s = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), step, stream, purpose};
}

template <class U>
struct Words {
  U x, y, z, w;
};

// `W` is uint32_t, or a vector with room for the product in each lane, of which only the low 32 bits are the word (what
// stands above them is never read): that spares a vector kernel the shuffles that would bring products back together.
template <class W>
FE_HD Words<W> philox4x32_10(W c0, W c1, W c2, W c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    Word<W>::widening_multiply(c0, 0xD2511F53u, high0, low0);
    Word<W>::widening_multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// The four words of counter block `low | high << 32` (= g / 4 for elements g .. g + 3; below 2^48). `low` may differ by
// lane, `high` may not: the caller's lanes never straddle a multiple of 2^32 (they start at a multiple of their count).
template <class W>
FE_HD Words<W> noise_words(W low, uint32_t high, const NoiseKey& key) {
  const W zero = low ^ low;
  return philox4x32_10<W>(low, zero + (high | key.purpose << 16), zero + key.step, zero + key.stream, key.seed_low,
                          key.seed_high);
}

}  // namespace fe::inline FE_ISA
