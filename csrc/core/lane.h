// A lane type is what one formula runs on: `float` or `double` on a GPU, a vector of them on a CPU. `Lane<F>` holds
// the few operations that C++ operators do not cover, so that every formula of csrc/formulas stands once for all devices.
//
// Bits are the same everywhere because only IEEE +, -, *, /, fma, sqrt and integer operations occur, each with one
// rounding: contraction is off in every build and each fma is written out.
//
// Philox needs no more than a 32 x 32 -> 64 bit product, so its word type is apart: `Word<W>`.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FE_HD __host__ __device__ __forceinline__
#else
#define FE_HD inline __attribute__((always_inline))
#endif

// Each instruction set compiles these headers into a namespace of its own; otherwise the linker could keep, say, the
// AVX-512 copy of a shared inline function and run it on a machine without AVX-512.
#ifndef FE_ISA
#define FE_ISA scalar
#endif

namespace fe::inline FE_ISA {

template <class W>
struct Word;

template <>
struct Word<uint32_t> {
  static FE_HD void widening_multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
    high = __umulhi(a, b);
    low = a * b;
#else
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
#endif
  }
};

template <class F>
struct Lane;

template <>
struct Lane<float> {
  using Scalar = float;
  using Unsigned = uint32_t;
  using Signed = int32_t;

  static FE_HD float splat(float x) { return x; }
  static FE_HD bool all(bool condition) { return condition; }
  static FE_HD float where_any_bit(float x, uint32_t mask) { return (bits(x) & mask) == 0 ? 0.0f : x; }
#if defined(__CUDA_ARCH__)
  static FE_HD float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static FE_HD float sqrt(float a) { return __fsqrt_rn(a); }
  static FE_HD float divide(float a, float b) { return __fdiv_rn(a, b); }
  static FE_HD float from_unsigned(uint32_t a) { return __uint2float_rn(a); }
  static FE_HD float from_signed(int32_t a) { return __int2float_rn(a); }
  static FE_HD uint32_t bits(float a) { return __float_as_uint(a); }
  static FE_HD float from_bits(uint32_t a) { return __uint_as_float(a); }
#else
  static FE_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static FE_HD float sqrt(float a) { return __builtin_sqrtf(a); }
  static FE_HD float divide(float a, float b) { return a / b; }
  static FE_HD float from_unsigned(uint32_t a) { return static_cast<float>(a); }
  static FE_HD float from_signed(int32_t a) { return static_cast<float>(a); }
  static FE_HD uint32_t bits(float a) { return __builtin_bit_cast(uint32_t, a); }
  static FE_HD float from_bits(uint32_t a) { return __builtin_bit_cast(float, a); }
#endif
};

template <>
struct Lane<double> {
  using Scalar = double;

  static FE_HD double splat(double x) { return x; }
#if defined(__CUDA_ARCH__)
  static FE_HD double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
  static FE_HD double sqrt(double a) { return __dsqrt_rn(a); }
  static FE_HD double divide(double a, double b) { return __ddiv_rn(a, b); }
#else
  static FE_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
  static FE_HD double sqrt(double a) { return __builtin_sqrt(a); }
  static FE_HD double divide(double a, double b) { return a / b; }
#endif
};

}  // namespace fe::inline FE_ISA
