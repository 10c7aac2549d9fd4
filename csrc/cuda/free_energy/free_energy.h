// What the free energy's kernels share. A pass takes an elementwise term over a [rows, columns] matrix: a group of four
// threads owns a block of 128 columns of one row, so that no group waits for another, and leaves one float, the block's
// total, behind. fold_rows then adds the totals up. The order of all sums is that of cpu/free_energy/row_sum.h.
#pragma once

#include "cuda/float_access.h"
#include "formulas/free_energy_codes.h"

namespace fe::cuda {

inline constexpr int kColumns = 128;  // of a block
inline constexpr int kBlocks = 32;    // of a segment
inline constexpr int kRowBlock = 64;  // rows whose column gradients add up in float
inline constexpr int kTarget = kMaxParams;
inline constexpr int kTermThreads = 128;
inline constexpr int kGroups = kTermThreads / 4;

struct TermInput {
  int64_t data;
  int64_t row_stride;  // in elements; 0: one row for all
  bool per_column;     // false: one value per row
  int32_t dtype;
};

// kSum: over columns, and perhaps then over rows.
enum class GradKind : int32_t { kNone, kFull, kColumn, kSum };

struct TermGrad {
  int64_t data;  // kFull: [rows, columns]; kColumn: float [row blocks, columns]; kSum: float [rows, blocks]
  GradKind kind;
  int32_t dtype;  // of kFull
  int32_t slot;   // of kColumn: its index in shared memory
};

struct TermPass {
  TermInput inputs[kMaxParams + 1];  // [kTarget] is the target
  TermGrad grads[kMaxParams];
  const uint8_t* mask;  // nonzero: observed; null: all are
  int64_t mask_stride;
  const float* weight;    // [rows], or null
  const float* upstream;  // [rows], or null: `scale`
  float* totals;          // [rows, blocks]
  int32_t* counter;       // made 0, for the kernel that follows
  int64_t rows, columns, blocks;
  float scale;
  bool vectors;      // four columns fit one access, in every tensor
  bool any_columns;  // a gradient is of kColumn
  bool plain;        // vectors, no mask, no broadcast but over rows, one dtype of the parameters, gradients of kFull
};

struct CategoricalPass {
  int64_t logits, grad;   // [positions, classes], one dtype; grad may be 0, or the logits themselves
  const int64_t* target;  // [positions]
  const uint8_t* mask;    // [positions], or null
  const float* weight;
  const float* upstream;
  float* energies;  // [positions]
  int64_t positions, positions_per_row, classes;
  int32_t dtype;
  float scale;
  bool vectors;  // four classes in one access
};

// The file that compiles a likelihood's kernels; memory_bound has the terms too that are no likelihoods.
enum class TermFile { memory_bound, compute_bound, count_likelihoods };

template <template <class> class Term>
constexpr TermFile file_of() {
  if (Term<float>::kMemoryBound) return TermFile::memory_bound;
  return Term<float>::kSparse ? TermFile::count_likelihoods : TermFile::compute_bound;
}

// Each is in a file of its own, of that name. All but one return cudaErrorInvalidValue for a code that is not theirs.
int launch_memory_bound(int32_t term, const TermPass& pass, void* stream);
int launch_compute_bound(int32_t term, const TermPass& pass, void* stream);
int launch_count_likelihoods(int32_t term, const TermPass& pass, void* stream);
int launch_categorical(const CategoricalPass& pass, void* stream);

// A row whose weight is 0 counts nothing, whatever it holds.
FE_DEVICE bool dropped(const float* weight, int64_t row) { return weight != nullptr && weight[row] == 0.0f; }

// What a row's gradients are multiplied with.
FE_DEVICE float row_scale(const float* weight, const float* upstream, float scale, int64_t row) {
  if (dropped(weight, row)) return 0.0f;
  return (weight ? weight[row] : 1.0f) * (upstream ? upstream[row] : scale);
}

// The lanes of the block's sum, four in each thread of the group: lane i += lane i + width for width 8, 4, 2, 1.
FE_DEVICE float fold_lanes(const float (&lanes)[4]) {
  float sum[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[k] = lanes[k] + __shfl_xor_sync(0xffffffffu, lanes[k], 2);
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 1);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

}  // namespace fe::cuda
