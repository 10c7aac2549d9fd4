// Sums of the KL of the weights' Gaussian to the prior, from one read of means and spreads.
#pragma once

#include <cstdint>

#include "formulas/variational_kl.h"

namespace fe {

inline constexpr int64_t kKlSegment = 4096;  // elements whose sums are one pair of doubles, however many threads there are

// Contiguous tensors of `count` elements.
struct VariationalKlCall {
  const float *mean, *spread;
  int64_t count;
  VariationalKlCoefficients coefficients;
  double* sums;  // [segments, 2]: of twice the KL, and of log r

  int64_t segments() const { return (count + kKlSegment - 1) / kKlSegment; }
};

using VariationalKlKernel = void(const VariationalKlCall& call, int64_t begin, int64_t end);

}  // namespace fe
