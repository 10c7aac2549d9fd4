// The categorical energy of logits, one class index per position, and its gradient.
#pragma once

#include <cstdint>

#include "core/pointer_table.h"

namespace fe {

struct CategoricalCall {
  int64_t positions, classes;  // positions of one row
  const void* logits;          // [rows, positions, classes]
  void* grad;                  // likewise, or null
  DType dtype;                 // of both
  const int64_t* target;       // [rows, positions]
  const uint8_t* mask;         // [rows, positions], or null
  const float* weight;         // [rows], or null: positions of a row whose weight is 0 count as masked
  const float* row_scale;      // of the gradient
  float* energies;             // [rows, positions]
};

// Positions begin .. end - 1 of all rows. A class that does not exist makes the energy and the gradient NaN.
using CategoricalKernel = void(const CategoricalCall& call, int64_t begin, int64_t end);

}  // namespace fe
