// Row sums of an elementwise energy and its gradients, from one read of the data.
#pragma once

#include <cstdint>

#include "formulas/free_energy_codes.h"
#include "core/pointer_table.h"

namespace fe {

inline constexpr int kTarget = kMaxParams;
inline constexpr int64_t kSegment = 4096;  // columns whose sum is one double, however many threads there are
inline constexpr int64_t kRowBlock = 64;   // rows whose column gradients add up in one buffer

// One operand of shape [rows or 1, columns or 1].
struct TermInput {
  const void* data;
  int64_t row_stride;  // in elements; 0: one row for all
  bool per_column;     // false: one value per row
  DType dtype;
};

enum class GradKind : uint8_t { kNone, kFull, kColumn, kSum };  // kSum: over columns, and perhaps then over rows

struct TermGrad {
  GradKind kind;
  DType dtype;         // of kFull
  void* data;          // kFull: [rows, columns]; kColumn: float [row blocks, columns]; kSum: double [rows, segments]
  int64_t row_stride;  // in elements, of kFull
  bool streamed;       // kFull, float32, rows aligned to 64 bytes, and too large to be in a cache when it is read
};

struct TermCall {
  int32_t term;  // a likelihood's code or a Term
  int64_t rows, columns;
  TermInput inputs[kMaxParams + 1];  // [kTarget] is the target
  TermGrad grads[kMaxParams];
  const uint8_t* mask;  // nonzero: observed; null: all are
  int64_t mask_stride;  // between rows
  const float* row_scale;  // of kFull and kColumn gradients; null without gradients
  const float* weight;     // a row whose weight is 0 is not looked at; null: none is
  double* sums;            // [rows, segments]

  bool dropped(int64_t row) const { return weight && weight[row] == 0.0f; }
  int64_t segments() const { return (columns + kSegment - 1) / kSegment; }
  // A task is what a thread does without a pause: a segment of one row, or of a block of rows where columns add up over rows.
  int64_t task_rows() const {
    for (const TermGrad& grad : grads)
      if (grad.kind == GradKind::kColumn) return kRowBlock;
    return 1;
  }
  int64_t tasks() const { return (rows + task_rows() - 1) / task_rows() * segments(); }
};

// Tasks begin .. end - 1, in row-major order of (block of rows, segment).
using TermKernel = void(const TermCall& call, int64_t begin, int64_t end);

// The kernel of a likelihood or a KL, null for one that has classes.
using TermKernelOf = TermKernel*(int32_t term);

}  // namespace fe
