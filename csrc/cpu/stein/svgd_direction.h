// phi_i = (1/n) sum_j [k(x_i, x_j) s_j + temperature * grad_{x_j} k(x_i, x_j)] and its gradients: docs/svgd.md.
#pragma once

#include "cpu/threads.h"
#include "formulas/radial_kernels.h"
#include "core/pointer_table.h"

namespace fe {

// One problem: [n, d] tensors, contiguous, computed in float32.
struct SvgdCall {
  int64_t n, d;
  const void *particles, *scores;
  DType particles_dtype, scores_dtype;
  int kernel;  // a code of RadialKernels
  RadialParams params;
  float bandwidth, temperature;
  void* direction;  // forward, as particles
  const void* grad;  // backward: of the direction
  DType grad_dtype;
  void *grad_particles, *grad_scores;  // backward, as particles and scores; null where not wanted
  float* grad_bandwidth;
  float* workspace;  // aligned to 64 bytes
  ParallelFor parallel_for;
};

using SvgdKernel = void(const SvgdCall& call);
using SvgdWorkspace = int64_t(int64_t n, int64_t d);  // floats of `workspace`

}  // namespace fe
