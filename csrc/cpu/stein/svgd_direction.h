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

// The same problem in shares, by processes that hold some of the particles each: to the bit what one call gives.

// Which algorithm n particles take, and the sizes that its shares are made of.
struct SvgdLayout {
  enum Algorithm { kSmall, kWide, kTiles };

  int64_t algorithm;
  int64_t block = 0, group = 0;      // tiles: particles of a block, blocks of a group; groups meet in the rounds of block_rounds.h
  int64_t fixed = 0, sums = 0;       // floats of a block's two records, svgd_tiles.h
  int64_t centred = 0;               // whether particles are shifted by their means, so that `sharp` has yet to be found out
  int64_t segment = 0, products = 0; // wide: columns of a segment; floats of its products
};
using SvgdLayoutOf = SvgdLayout(const SvgdCall& call, bool sharp);

// Blocks in records. `call` has n of all particles, and the rows that `prepare` reads.
struct SvgdShare {
  SvgdCall call;
  bool sharp;  // differences in place of inner products, as `is_sharp` decides from all norms
  float *fixed, *sums;
  int64_t fixed_stride, sums_stride;  // floats from the record of a block to the next one's
};

// Adds `count` rows of the call's particles to sums [d], one after the other.
using SvgdAddColumns = void(const SvgdCall& rows, int64_t count, double* sums);
// blocks: (record, number of the block, its first row in the operand) each. norms: of the rows, where they are centred.
using SvgdPrepare = void(const SvgdShare& share, const int64_t* blocks, int64_t count, const float* means, float* norms);
// pairings: (group, group, record of the one, of the other) each, low group first, records in groups; no group in two.
using SvgdMeet = void(const SvgdShare& share, const int64_t* pairings, int64_t count);
// The sums of rows over all others; blocks as above, of the result's rows.
using SvgdTotals = void(const SvgdShare& share, const int64_t* blocks, int64_t count, float* totals);
// Directions of `count` rows from their totals and scores.
using SvgdComplete = void(const SvgdCall& rows, int64_t count, const float* totals);

// Of some segments of d columns: the call has all n particles and call.d columns. `differences`: squared distances.
using SvgdWideProducts = void(const SvgdCall& columns, int64_t d, bool differences, float* segments);
// The directions of those columns from the products, or squared distances, over all segments.
using SvgdWideShare = void(const SvgdCall& columns, int64_t d, bool sharp, const float* products);

}  // namespace fe
