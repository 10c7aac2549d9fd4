// The one order in which values of a row add up. It is part of the result, and the CUDA kernel keeps it too: sixteen
// lanes of eight columns in float, their fold, 32 such blocks folded in double. So every instruction set, thread count
// and batch gives the same bits, at an error of at most 12 roundings to float.
#pragma once

#include "cpu/simd.h"

namespace fe::inline FE_ISA {

inline constexpr int kFold = 16;               // lanes of the sum, on every instruction set
inline constexpr int kParts = kFold / kLanes;  // vectors that hold them
inline constexpr int kColumns = 8 * kFold;     // of a block
inline constexpr int kBlocks = 32;             // of a segment

typedef float QuarterV __attribute__((vector_size(16)));

// lanes[i] += lanes[i + width] for width 8, 4, 2, 1. In registers: through memory it took as long as the sums themselves.
FE_HD float fold(const FloatV lanes[kParts]) {
  QuarterV v;
#if defined(__AVX512F__)
  const __m512d whole = (__m512d)lanes[0];
  const __m256 half = _mm256_add_ps((__m256)_mm512_castpd512_pd256(whole), (__m256)_mm512_extractf64x4_pd(whole, 1));
  v = (QuarterV)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 half = (__m256)(lanes[0] + lanes[1]);
  v = (QuarterV)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
  v = (QuarterV)((lanes[0] + lanes[2]) + (lanes[1] + lanes[3]));
#endif
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// The total of a segment from those of its blocks: totals[i] += totals[i + width] for width 16, 8, 4, 2, 1, where a
// missing one counts 0. Its array has room for kBlocks.
inline double fold(double* totals, int count) {
  int width = 1;
  while (width < count) width *= 2;
  for (int i = count; i < width; ++i) totals[i] = 0.0;
  for (width /= 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) totals[i] += totals[i + width];
  return count ? totals[0] + 0.0 : 0.0;  // +0.0 for -0.0, as adding what is missing would give
}

}  // namespace fe::inline FE_ISA
