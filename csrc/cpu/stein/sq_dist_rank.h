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

// All of them, [n, n], to the bit those that a RankCall orders: for tests.
using SqDistKernel = void(int64_t n, int64_t d, const void* particles, DType dtype, float* out);

}  // namespace fe
