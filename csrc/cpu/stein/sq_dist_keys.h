// Squared distances as integers: compared, put into bins by their leading bits, and picked by rank.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace fe::inline FE_ISA {

inline constexpr uint32_t kInfinity = 0x7f800000u;  // keys above it are NaNs
inline constexpr uint32_t kPadding = 0xffffffffu;   // in place of what is no pair i < j
inline constexpr int kBins = 2048;
inline constexpr int64_t kSorted = 2048;  // so few keys are ordered at once, without bins

// The bits of a squared distance, which as integers are in the order of the numbers, since none is negative, NaNs last.
// A type of this namespace rather than uint32_t, so that each instruction set has its own copy of a std:: algorithm.
struct Key {
  uint32_t bits;
  bool operator<(Key other) const { return bits < other.bits; }
};

template <class T>
FE_HD T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
FE_HD T larger(T a, T b) {
  return b > a ? b : a;
}

// Keys by their leading bits, with the least and the largest of each bin: tied values end a search at once, and a lattice
// leaves few of them in a bin.
struct Bins {
  struct Bin {
    int64_t count;
    uint32_t least, largest;
  };

  Bins(uint32_t low, uint32_t high) : low(low), shift(0) {
    while ((high - low) >> shift >= kBins) ++shift;
    used = static_cast<int>((high - low) >> shift) + 1;
    for (int i = 0; i < used; ++i) bins[i] = {0, kPadding, 0};
  }

  int add(Key key) {
    const int at = (key.bits - low) >> shift;
    Bin& bin = bins[at];
    ++bin.count;
    bin.least = key.bits < bin.least ? key.bits : bin.least;
    bin.largest = key.bits > bin.largest ? key.bits : bin.largest;
    return at;
  }

  void merge(const Bins& other) {  // from several threads at once
    for (int i = 0; i < used; ++i) {
      const Bin& from = other.bins[i];
      if (from.count == 0) continue;
      Bin& to = bins[i];
      __atomic_fetch_add(&to.count, from.count, __ATOMIC_RELAXED);
      uint32_t seen = __atomic_load_n(&to.least, __ATOMIC_RELAXED);
      while (from.least < seen &&
             !__atomic_compare_exchange_n(&to.least, &seen, from.least, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
      seen = __atomic_load_n(&to.largest, __ATOMIC_RELAXED);
      while (from.largest > seen &&
             !__atomic_compare_exchange_n(&to.largest, &seen, from.largest, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
    }
  }

  int64_t total() const {
    int64_t sum = 0;
    for (int i = 0; i < used; ++i) sum += bins[i].count;
    return sum;
  }

  // The bin that holds `rank` of all keys, of which it becomes the rank in the bin.
  int find(int64_t& rank) const {
    int at = 0;
    while (rank >= bins[at].count) rank -= bins[at++].count;
    return at;
  }

  uint32_t low;
  int shift, used;
  Bin bins[kBins];
};

// Moves the keys from `low` to `high` to the front; returns how many.
inline int64_t to_front(Key* keys, int64_t count, uint32_t low, uint32_t high) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Key key = keys[i];
    if (key.bits - low > high - low) continue;
    keys[i] = keys[found];
    keys[found++] = key;
  }
  return found;
}

// Key number `rank` in ascending order; leaves the keys in some order.
inline uint32_t select(Key* keys, int64_t count, int64_t rank) {
  while (count > kSorted) {
    uint32_t least = kPadding, largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      least = keys[i].bits < least ? keys[i].bits : least;
      largest = keys[i].bits > largest ? keys[i].bits : largest;
    }
    Bins bins(least, largest);
    for (int64_t i = 0; i < count; ++i) bins.add(keys[i]);
    const Bins::Bin& bin = bins.bins[bins.find(rank)];
    if (bin.least == bin.largest) return bin.least;
    count = to_front(keys, count, bin.least, bin.largest);
  }
  std::nth_element(keys, keys + rank, keys + count);
  return keys[rank].bits;
}

// Appends those keys of a vector that lie from `low` to `low + span` to `out`, which has room for a whole one; adds lane by
// lane to `below` which are smaller. Returns how many it appended.
FE_HD int sift(FloatV values, uint32_t low, uint32_t span, SignedV& below, Key* out) {
  const UnsignedV key = Lane<FloatV>::bits(values), offset = key - low;
  below -= (SignedV)(key < low);
#if defined(__AVX512F__)  // compressed in a register: the form that stores is microcode on Zen 4, 20 times slower
  const __mmask16 inside = _mm512_cmple_epu32_mask((__m512i)offset, _mm512_set1_epi32(static_cast<int>(span)));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(inside, (__m512i)key));
  return __builtin_popcount(inside);
#elif defined(__AVX2__)
  int inside = _mm256_movemask_ps((__m256)(offset <= span)), found = 0;
  if (inside == 0) return 0;
  alignas(32) Key keys[kLanes];
  __builtin_memcpy(keys, &key, sizeof keys);
  for (; inside; inside &= inside - 1) out[found++] = keys[__builtin_ctz(inside)];
  return found;
#else
  int found = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    out[found] = {key[lane]};
    found += offset[lane] <= span;
  }
  return found;
#endif
}

}  // namespace fe::inline FE_ISA
