// The one order in which values of a row add up. It is part of the result, and the CUDA kernel keeps it too: sixteen
// lanes of eight columns in float, their fold, 32 such blocks folded in double. So every instruction set, thread count
// and batch gives the same bits, at an error of at most 12 roundings to float.
#pragma once

#include "cpu/lanes.h"

namespace fe::inline FE_ISA {

inline constexpr int kFold = 16;               // lanes of the sum, on every instruction set
inline constexpr int kParts = kFold / kLanes;  // vectors that hold them
inline constexpr int kColumns = 8 * kFold;     // of a block
inline constexpr int kBlocks = 32;             // of a segment

// lanes[i] += lanes[i + width] for width 8, 4, 2, 1.
FE_HD float fold(const FloatV lanes[kParts]) {
  alignas(64) float a[kFold];
  __builtin_memcpy(a, lanes, sizeof a);
#pragma GCC unroll 4
  for (int width = kFold / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}

// The total of a segment from those of its blocks; a missing block counts 0.
inline double fold(double totals[kBlocks]) {
#pragma GCC unroll 5
  for (int width = kBlocks / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) totals[i] += totals[i + width];
  return totals[0];
}

}  // namespace fe::inline FE_ISA
