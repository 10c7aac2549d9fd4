// A span of consecutive elements of one row of the pointer table: what a CPU thread steps.
#pragma once

#include "core/philox.h"
#include "core/pointer_table.h"

namespace fe {

struct Span {
  void* data[kOperands];   // of the row's first element; null where there is no such tensor
  DType dtypes[kOperands];
  const int64_t* layout;   // null: contiguous; else ndim, sizes, and the strides of each operand
  int64_t begin, count;    // local elements, in logical order
  uint64_t index;          // of element `begin` in the whole parameter; consecutive over the span
  NoiseKey noise, rounding;
  bool stochastic;         // round bfloat16 tensors stochastically
};

inline constexpr int kSpanElements = 16384;  // most elements of a span; 448 KB of float32 Adam, half of an L2 cache

}  // namespace fe
