// Loads and stores of elements: single ones, and vectors of four or eight in one access of 8 or 16 bytes.
#pragma once

#include "cuda/launch.h"
#include "core/bf16.h"
#include "core/pointer_table.h"

namespace fe::cuda {

// Floats of 16 bits are computed on as float32.
template <DType kType>
struct MathOf {
  using Type = float;
};
template <>
struct MathOf<kFloat64> {
  using Type = double;
};
template <DType kType>
using Math = typename MathOf<kType>::Type;

template <DType kType>
inline constexpr int kBytes = kType == kFloat64 ? 8 : kType == kFloat32 ? 4 : 2;

// How a result is rounded to its 16 bits: to nearest even, or (bfloat16 only) by the random number.
struct Rounding {
  bool stochastic;
  uint32_t sixteen_bits;
};

template <DType kType>
FE_DEVICE float widen(uint16_t h) {
  if constexpr (kType == kBFloat16) return bf16_to_float(h);
  return fp16_to_float(h);
}

template <DType kType>
FE_DEVICE uint16_t narrow(float x, Rounding rounding) {
  if constexpr (kType == kFloat16) return float_to_fp16(x);
  return rounding.stochastic ? float_to_bf16_stochastic(x, rounding.sixteen_bits) : float_to_bf16(x);
}

template <DType kType>
FE_DEVICE Math<kType> load_element(int64_t pointer, int64_t index) {
  if constexpr (kBytes<kType> == 2) {
    return widen<kType>(reinterpret_cast<const uint16_t*>(pointer)[index]);
  } else {
    return reinterpret_cast<const Math<kType>*>(pointer)[index];
  }
}

template <DType kType>
FE_DEVICE void store_element(int64_t pointer, int64_t index, Math<kType> value, Rounding rounding) {
  if constexpr (kBytes<kType> == 2) {
    reinterpret_cast<uint16_t*>(pointer)[index] = narrow<kType>(value, rounding);
  } else {
    reinterpret_cast<Math<kType>*>(pointer)[index] = value;
  }
}

// Of a dtype that is known only at run time; the same in the whole block.
template <class S>
FE_DEVICE S load_any(int dtype, int64_t pointer, int64_t index) {
  switch (dtype) {
    case kFloat64:
      return static_cast<S>(load_element<kFloat64>(pointer, index));
    case kBFloat16:
      return static_cast<S>(load_element<kBFloat16>(pointer, index));
    case kFloat16:
      return static_cast<S>(load_element<kFloat16>(pointer, index));
    default:
      return static_cast<S>(load_element<kFloat32>(pointer, index));
  }
}

// kSize consecutive elements as raw words, so that they are loaded early and converted late. With constant indices,
// which unrolled loops give, everything stays in registers.
template <DType kType, int kSize>
struct Vector {
  static constexpr int kWords = kSize * kBytes<kType> / 4;
  uint32_t words[kWords];

  // Past L1: nothing here is read twice.
  FE_DEVICE void load(int64_t pointer, int64_t index) {
    const int64_t from = pointer + index * kBytes<kType>;
    if constexpr (kWords == 2) {
      const uint2 pair = __ldcg(reinterpret_cast<const uint2*>(from));
      words[0] = pair.x;
      words[1] = pair.y;
    } else {
#pragma unroll
      for (int k = 0; k < kWords; k += 4) {
        const uint4 four = __ldcg(reinterpret_cast<const uint4*>(from) + k / 4);
        words[k] = four.x;
        words[k + 1] = four.y;
        words[k + 2] = four.z;
        words[k + 3] = four.w;
      }
    }
  }

  FE_DEVICE void store(int64_t pointer, int64_t index) const {
    const int64_t to = pointer + index * kBytes<kType>;
    if constexpr (kWords == 2) {
      __stcg(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
    } else {
#pragma unroll
      for (int k = 0; k < kWords; k += 4) {
        __stcg(reinterpret_cast<uint4*>(to) + k / 4, make_uint4(words[k], words[k + 1], words[k + 2], words[k + 3]));
      }
    }
  }

  FE_DEVICE Math<kType> get(int i) const {
    if constexpr (kType == kFloat64) {
      return __hiloint2double(static_cast<int>(words[2 * i + 1]), static_cast<int>(words[2 * i]));
    } else if constexpr (kType == kFloat32) {
      return Lane<float>::from_bits(words[i]);
    } else {
      return widen<kType>(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
    }
  }

  FE_DEVICE void set(int i, Math<kType> value, Rounding rounding) {
    if constexpr (kType == kFloat64) {
      words[2 * i] = static_cast<uint32_t>(__double2loint(value));
      words[2 * i + 1] = static_cast<uint32_t>(__double2hiint(value));
    } else if constexpr (kType == kFloat32) {
      words[i] = Lane<float>::bits(value);
    } else {
      const uint32_t bits = narrow<kType>(value, rounding);
      words[i / 2] = i % 2 == 0 ? (words[i / 2] & 0xffff0000u) | bits : (words[i / 2] & 0xffffu) | bits << 16;
    }
  }
};

}  // namespace fe::cuda
