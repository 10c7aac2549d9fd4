// Elements of one of the four dtypes to float32 and back, a span at a time.
#pragma once

#include "core/bf16.h"
#include "core/pointer_table.h"

namespace fe::inline FE_ISA {

inline float to_float(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case kBFloat16: return bf16_to_float(static_cast<const uint16_t*>(data)[at]);
    case kFloat16: return fp16_to_float(static_cast<const uint16_t*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

inline void to_float(const void* data, DType dtype, int64_t at, int count, float* out) {
  if (dtype == kFloat32) {
    __builtin_memcpy(out, static_cast<const float*>(data) + at, count * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + at;
  if (dtype == kBFloat16) {
    for (int i = 0; i < count; ++i) out[i] = bf16_to_float(from[i]);
  } else {
    for (int i = 0; i < count; ++i) out[i] = fp16_to_float(from[i]);
  }
}

// Rounded to nearest, ties to even.
inline void from_float(const float* from, int count, void* data, DType dtype, int64_t at) {
  if (dtype == kFloat32) {
    __builtin_memcpy(static_cast<float*>(data) + at, from, count * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(data) + at;
  if (dtype == kBFloat16) {
    for (int i = 0; i < count; ++i) out[i] = float_to_bf16(from[i]);
  } else {
    for (int i = 0; i < count; ++i) out[i] = float_to_fp16(from[i]);
  }
}

}  // namespace fe::inline FE_ISA
