// All pairs of blocks in rounds, such that no block is twice in one round: pairs of a round may run at once and add into
// the results of both their blocks, and each block's pairs come in one order, whatever the number of threads.
#pragma once

#include <atomic>
#include <memory>

#include "cpu/threads.h"
#include "core/lane.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fe::inline FE_ISA {

// Blocks that make up a group, the unit of a round. Large groups are read from the caches less often (at n = 10,000,
// d = 256, one thread: 1127 ms in groups of 1, 927 of 2, 762 of 8; at d = 64 all alike); many groups keep many threads busy.
inline int64_t group_size(int64_t blocks, int64_t d) {
  const int64_t size = d >= 128 ? blocks / 20 : blocks / 64;
  return size < 1 ? 1 : size > 8 ? 8 : size;
}

// All pairs of the blocks of two groups, [low, low_end) and [high, high_end), or of one with itself. Two blocks of one group
// stay in the cache while those of the other pass; each meets its partners in ascending order.
template <class Pair>
void pairs_of_groups(int64_t low, int64_t low_end, int64_t high, int64_t high_end, Pair pair) {
  if (low == high) {
    for (int64_t i = low; i < low_end; ++i)
      for (int64_t j = i; j < low_end; ++j) pair(i, j);
    return;
  }
  for (int64_t first = low; first < low_end; first += 2)
    for (int64_t j = high; j < high_end; ++j)
      for (int64_t i = first; i < first + 2 && i < low_end; ++i) pair(i, j);
}

inline void wait_a_little() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Runs pair(i, j) over all i <= j < blocks. `grain` is how many pairs repay a second thread.
//
// The circle method: in round r, groups p and q are paired where p + q = 2 r modulo (groups - 1), and the last group with the
// one left over. Before the first, each group is paired with itself. No barrier parts the rounds: threads take the pairings
// in order, and one starts when both groups have come out of the round before. The earliest unfinished pairing never
// waits, so that all end, with however few threads.
template <class Pair>
void for_all_pairs(ParallelFor parallel_for, int64_t blocks, int64_t size, int64_t grain, Pair pair) {
  if (blocks == 1) return pair(int64_t{0}, int64_t{0});
  const int64_t groups = (blocks + size - 1) / size;
  const int64_t even = groups + groups % 2, cycle = even - 1;  // with an odd number, one group rests in every round
  const int64_t pairings = groups + cycle * (even / 2);
  const auto end_of = [&](int64_t group) { return (group + 1) * size < blocks ? (group + 1) * size : blocks; };
  const auto rounds_done = std::make_unique<std::atomic<int64_t>[]>(even);
  std::atomic<int64_t> next{0};
  in_parallel(parallel_for, pairings, grain / (size * size) + 1, [&](int64_t, int64_t) {
    for (int64_t pairing; (pairing = next.fetch_add(1, std::memory_order_relaxed)) < pairings;) {
      if (pairing < groups) {
        pairs_of_groups(pairing * size, end_of(pairing), pairing * size, end_of(pairing), pair);
        rounds_done[pairing].store(1, std::memory_order_release);
        continue;
      }
      const int64_t round = (pairing - groups) / (even / 2), q = (pairing - groups) % (even / 2);
      const int64_t one = q == 0 ? cycle : (round + q) % cycle, other = q == 0 ? round : (round - q + cycle) % cycle;
      const int64_t low = one < other ? one : other, high = one < other ? other : one;
      const bool rests = high >= groups;
      for (const int64_t group : {low, high})
        while (!(rests && group == high) && rounds_done[group].load(std::memory_order_acquire) <= round) wait_a_little();
      if (!rests) pairs_of_groups(low * size, end_of(low), high * size, end_of(high), pair);
      rounds_done[low].store(round + 2, std::memory_order_release);
      rounds_done[high].store(round + 2, std::memory_order_release);
    }
  });
}

}  // namespace fe::inline FE_ISA
