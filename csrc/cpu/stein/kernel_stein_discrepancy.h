// Sums of the Stein kernel k_p(i, j) over pairs of distinct points, weighted by columns of multipliers: docs/svgd.md.
#pragma once

#include "cpu/threads.h"
#include "formulas/radial_kernels.h"
#include "core/pointer_table.h"

namespace fe {

// One problem: [n, d] tensors, contiguous, computed in float32.
struct DiscrepancyCall {
  int64_t n, d, columns;
  const void *particles, *scores;
  DType particles_dtype, scores_dtype;
  const float* weights;  // [n, columns]
  int kernel;            // a code of RadialKernels
  RadialParams params;
  float bandwidth;
  double* sums;      // [columns]: of w_i w_j k_p(i, j) over i != j
  float* workspace;  // aligned to 64 bytes
  ParallelFor parallel_for;
};

using DiscrepancyKernel = void(const DiscrepancyCall& call);
using DiscrepancyWorkspace = int64_t(int64_t n, int64_t d, int64_t columns);  // floats of `workspace`

}  // namespace fe
