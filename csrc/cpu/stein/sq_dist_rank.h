// Order statistics of the squared distances of all pairs of points, exact, without keeping the distances.
#pragma once

#include "cpu/threads.h"
#include "core/pointer_table.h"

namespace fe {

// One problem: [n, d] particles, contiguous, computed in float32.
struct RankCall {
  int64_t n, d;
  const void* particles;
  DType dtype;
  int64_t count;         // of ranks
  const int64_t* ranks;  // 0-based, among the n (n - 1) / 2 distances in ascending order, NaN last
  const float* hint;     // [count] or null: values that the results may be near; it can only save time
  float* out;            // [count]; NaN for a rank that does not exist
  ParallelFor parallel_for;
};

using RankKernel = void(const RankCall& call);

// A share of a search by several processes: tiles of pairs, of one set or between two.
inline constexpr int64_t kScanBins = 2048;

struct ScanCall {
  int64_t n, other_n, d;
  const void *particles, *others;  // [n, d] and [other_n, d]; without others, pairs i < j of the particles
  DType dtype;
  const float* means;    // [d]: of all particles that take part in the search
  uint32_t low, high;    // the bracket, bits of float32, at most those of infinity
  int64_t begin, end;    // of the tiles that `sq_dist_tiles` counts
  int64_t room;          // for keys; where more lie in the bracket, what is in `keys` is of no use
  int64_t* counts;       // [1 + kScanBins]: below the bracket; in bins of (high - low) >> shift, the least shift at which those do
  uint32_t* keys;        // in the bracket, in some order
  ParallelFor parallel_for;
};

using ScanKernel = void(const ScanCall& call);
using TilesKernel = int64_t(int64_t n, int64_t others);  // how many tiles; others < 0: of pairs i < j

// All of them, [n, n], to the bit those that a RankCall orders: for tests.
using SqDistKernel = void(int64_t n, int64_t d, const void* particles, DType dtype, float* out);

}  // namespace fe
