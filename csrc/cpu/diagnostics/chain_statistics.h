// Rank-normalised split R-hat and effective sample sizes (Vehtari et al. 2021), from one sort of a weight's draws.
#pragma once

#include <cstdint>

namespace fe {

inline constexpr int64_t kWeightBlock = 64;  // weights gathered together: every draw of a wide tensor is another page

enum ChainStatistic : int64_t { kRhat = 1, kBulk = 2, kTail = 4 };

struct ChainCall {
  int64_t chains, draws, weights;
  const void* data;      // [chains, draws, weights], float or double, contiguous
  bool is_double;
  const double* scores;  // normal quantiles of half ranks, [2 m - 1] of the m draws in all halves
  double least_tau;      // 1 / log10(m): chains that alternate would have any number
  int64_t wanted;        // ChainStatistics
  double* out;           // [3, weights]: R-hat, bulk, tail; what is not wanted is left alone

  int64_t total() const { return chains * draws; }
  int64_t half() const { return draws / 2; }
  // Of scratch memory for a block: values, keys and places of one weight and their copies, scores, and the block itself.
  int64_t scratch_doubles() const { return (kWeightBlock + 8) * (total() + 8); }
};

// Blocks begin .. end - 1 of kWeightBlock weights.
using ChainKernel = void(const ChainCall& call, int64_t begin, int64_t end, double* scratch);

}  // namespace fe
