// The pointer table: one row per parameter, the same sixteen words on a CPU and on a GPU. fekernels/_runtime/pointer_table.py writes it.
#pragma once

#include <cstdint>

namespace fe {

enum DType : uint8_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// The tensors of a row, in the order of their pointers, of the strides in `layouts` and of the bytes in `dtypes`.
enum Operand { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kAnchor, kOperands };

struct TableRow {
  int64_t pointers[kOperands];  // 0 where there is no such tensor
  int64_t step;                 // one float32 or float64: t before this step
  int64_t numel;
  int64_t stream;  // Philox stream of the parameter
  // Local element e, in logical order, is element offset + (e / length) * pitch + e % length of the whole parameter, of which
  // this tensor may be a shard. Unsharded: length = pitch = numel and offset = 0.
  int64_t offset, length, pitch;
  int64_t dtypes;  // bytes: parameter, gradient, states, anchor, step
  int64_t layout;  // 0: all contiguous; else 1 + where in `layouts` stand ndim, sizes, and the strides of each operand
  int64_t dense;   // 1: not contiguous, but all tensors lie in memory alike and without gaps (channels_last)
  // One float64, or 0: what exp_avg holds of earlier noise, see momentum_noise_unit in formulas/langevin_adam.h.
  int64_t noise_unit;
};
static_assert(sizeof(TableRow) == 16 * sizeof(int64_t));

inline constexpr int kTableColumns = 16;
inline constexpr int kChunk = 4096;  // elements of one GPU block

enum StepFlags : int64_t {
  kAmsgrad = 1,
  kMaximize = 2,
  kDecoupled = 4,
  kBiasCorrection = 8,
  kStochastic = 16,
  kFrozen = 32,
};

}  // namespace fe
