// The edges in the order of their first ends, and what arrives at each variable: built once, for all iterations and problems.
#pragma once

#include "cpu/graph/belief_propagation.h"
#include "cpu/large_buffer.h"
#include "cpu/simd.h"

namespace fe::inline FE_ISA {

// In this order an edge's first end and its messages are read in order, and its second end alone is somewhere else. Tiles are
// whole: edges that fill up the last one join the variable behind the last, which nobody looks at, to itself.
class Incidence {
 public:
  // How far ahead random accesses are asked for. So many more indices than there are can be read.
  static constexpr int64_t kAhead = 32;

  explicit Incidence(const BeliefCall& call)
      : edges(call.edges),
        padded((call.edges + kLanes - 1) / kLanes * kLanes),
        given(padded + kAhead),
        ends{LargeBuffer<int32_t>(padded + kAhead), LargeBuffer<int32_t>(padded + kAhead)},
        begins(call.variables + 2),
        slots(2 * call.edges + kAhead) {
    const int64_t variables = call.variables;
    for (int64_t i = 0; i < variables + 2; ++i) begins[i] = 0;
    for (int64_t e = 0; e < edges; ++e) ++begins[call.ends[2 * e] + 1];
    for (int64_t i = 0; i < variables; ++i) begins[i + 1] += begins[i];
    for (int64_t e = 0; e < edges; ++e) given[begins[call.ends[2 * e]]++] = static_cast<int32_t>(e);
    for (int64_t e = edges; e < padded + kAhead; ++e) {
      given[e] = static_cast<int32_t>(edges > 0 ? edges - 1 : 0);
      ends[0][e] = ends[1][e] = static_cast<int32_t>(variables);
    }
    for (int64_t i = 0; i < variables + 2; ++i) begins[i] = 0;
    for (int64_t e = 0; e < edges; ++e)
      for (int side = 0; side < 2; ++side) {
        const int64_t end = call.ends[2 * int64_t{given[e]} + side];
        ends[side][e] = static_cast<int32_t>(end);
        ++begins[end + 2];
      }
    for (int64_t i = 0; i < variables; ++i) begins[i + 2] += begins[i + 1];
    for (int64_t e = 0; e < edges; ++e)
      for (int side = 0; side < 2; ++side) slots[begins[ends[side][e] + 1]++] = static_cast<uint32_t>(side * padded + e);
    for (int64_t k = 2 * edges; k < 2 * edges + kAhead; ++k) slots[k] = 0;
  }

  int64_t degree(int64_t variable) const { return begins[variable + 1] - begins[variable]; }

  int64_t edges, padded;
  LargeBuffer<int32_t> given;      // which edge of the caller's each is
  LargeBuffer<int32_t> ends[2];
  LargeBuffer<int32_t> begins;     // slots begins[i] .. begins[i + 1] - 1 are those of variable i
  LargeBuffer<uint32_t> slots;     // rows of the messages [2, padded]: of the edges' first ends, then of their second
};

}  // namespace fe::inline FE_ISA
