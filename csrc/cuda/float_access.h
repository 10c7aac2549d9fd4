// Float32 values from and to tensors whose dtype, float32 or one of 16 bits, is known at run time and is the same in the
// whole block: one element, or four in one access.
#pragma once

#include "cuda/vector_access.h"

namespace fe::cuda {

FE_DEVICE float load_float(int32_t dtype, int64_t pointer, int64_t index) {
  if (dtype == kFloat32) return load_element<kFloat32>(pointer, index);
  if (dtype == kBFloat16) return load_element<kBFloat16>(pointer, index);
  return load_element<kFloat16>(pointer, index);
}

FE_DEVICE void store_float(int32_t dtype, int64_t pointer, int64_t index, float value) {
  if (dtype == kFloat32) {
    store_element<kFloat32>(pointer, index, value, {});
  } else if (dtype == kBFloat16) {
    store_element<kBFloat16>(pointer, index, value, {});
  } else {
    store_element<kFloat16>(pointer, index, value, {});
  }
}

template <DType kType>
FE_DEVICE void load_vector(int64_t pointer, int64_t index, float (&values)[4]) {
  Vector<kType, 4> vector;
  vector.load(pointer, index);
#pragma unroll
  for (int k = 0; k < 4; ++k) values[k] = vector.get(k);
}

template <DType kType>
FE_DEVICE void store_vector(int64_t pointer, int64_t index, const float (&values)[4]) {
  Vector<kType, 4> vector{};
#pragma unroll
  for (int k = 0; k < 4; ++k) vector.set(k, values[k], {});
  vector.store(pointer, index);
}

FE_DEVICE void load_four(int32_t dtype, int64_t pointer, int64_t index, float (&values)[4]) {
  if (dtype == kFloat32) {
    load_vector<kFloat32>(pointer, index, values);
  } else if (dtype == kBFloat16) {
    load_vector<kBFloat16>(pointer, index, values);
  } else {
    load_vector<kFloat16>(pointer, index, values);
  }
}

FE_DEVICE void store_four(int32_t dtype, int64_t pointer, int64_t index, const float (&values)[4]) {
  if (dtype == kFloat32) {
    store_vector<kFloat32>(pointer, index, values);
  } else if (dtype == kBFloat16) {
    store_vector<kBFloat16>(pointer, index, values);
  } else {
    store_vector<kFloat16>(pointer, index, values);
  }
}

// Whether `pointer` is where four elements may begin.
FE_HD bool takes_fours(int64_t pointer, int32_t dtype) { return pointer % (dtype == kFloat32 ? 16 : 8) == 0; }

}  // namespace fe::cuda
