// The widest vector of the instruction set being compiled, as a lane type for csrc/formulas. Compiler vector extensions do
// nearly all of it; intrinsics stand only where gcc finds no good code for the portable form.
#pragma once

#include "core/lane.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fe::inline FE_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float FloatV __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UnsignedV __attribute__((vector_size(4 * kLanes)));
typedef int32_t SignedV __attribute__((vector_size(4 * kLanes)));

template <>
struct Lane<FloatV> {
  using Scalar = float;
  using Unsigned = UnsignedV;
  using Signed = SignedV;

  static FE_HD FloatV splat(float x) { return FloatV{} + x; }
  static FE_HD bool all(SignedV condition) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) == 0xffff;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)condition) == 0xff;
#else
    bool every = true;
    for (int i = 0; i < kLanes; ++i) every &= condition[i] != 0;
    return every;
#endif
  }
  // x where it has any bit of `mask`, else 0.
  static FE_HD FloatV where_any_bit(FloatV x, uint32_t mask) {
#if defined(__AVX512F__)
    return (FloatV)_mm512_maskz_mov_ps(_mm512_test_epi32_mask((__m512i)x, _mm512_set1_epi32(mask)), (__m512)x);
#else
    return ((UnsignedV)x & mask) == 0 ? FloatV{} : x;
#endif
  }
  static FE_HD FloatV divide(FloatV a, FloatV b) { return a / b; }
  static FE_HD FloatV from_unsigned(UnsignedV a) { return __builtin_convertvector(a, FloatV); }
  static FE_HD FloatV from_signed(SignedV a) { return __builtin_convertvector(a, FloatV); }
  static FE_HD UnsignedV bits(FloatV a) { return (UnsignedV)a; }
  static FE_HD FloatV from_bits(UnsignedV a) { return (FloatV)a; }

#if defined(__AVX512F__)
  static FE_HD FloatV fma(FloatV a, FloatV b, FloatV c) { return (FloatV)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static FE_HD FloatV sqrt(FloatV a) { return (FloatV)_mm512_sqrt_ps((__m512)a); }
#elif defined(__AVX2__)
  static FE_HD FloatV fma(FloatV a, FloatV b, FloatV c) { return (FloatV)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static FE_HD FloatV sqrt(FloatV a) { return (FloatV)_mm256_sqrt_ps((__m256)a); }
#else
  static FE_HD FloatV sqrt(FloatV a) {
    FloatV r;
    for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(a[i]);
    return r;
  }
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static FE_HD FloatV fma(FloatV a, FloatV b, FloatV c) {
    FloatV r;
    for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
  }
#else
  // No fma instruction, and libm's is a call per lane (30 times slower). The product is exact in double; the sum is made
  // round-to-odd from its TwoSum error, after which the rounding to float is the only one that counts. Forty
  // instructions: not inlined, as hundreds of copies would take the compiler longer than all else.
  static __attribute__((noinline)) FloatV fma(FloatV a, FloatV b, FloatV c) {
    typedef double DoubleV __attribute__((vector_size(8 * kLanes)));
    typedef int64_t LongV __attribute__((vector_size(8 * kLanes)));
    typedef uint64_t UnsignedLongV __attribute__((vector_size(8 * kLanes)));
    const DoubleV product = __builtin_convertvector(a, DoubleV) * __builtin_convertvector(b, DoubleV);
    const DoubleV addend = __builtin_convertvector(c, DoubleV);
    const DoubleV sum = product + addend, part = sum - product;
    const DoubleV error = (product - (sum - part)) + (addend - part);
    const LongV bits = (LongV)sum;
    const LongV away = ((LongV)error ^ bits) < 0;
    const LongV toward_zero = (LongV)((UnsignedLongV)bits + (UnsignedLongV)away);  // wraps for -0, which is exact
    const LongV inexact = (error < 0.0) | (error > 0.0);  // false for NaN: infinities and NaNs pass
    return __builtin_convertvector((DoubleV)(inexact ? (toward_zero | 1) : bits), FloatV);
  }
#endif
#endif
};

// Half as many lanes, each with room for the product of two words.
typedef uint64_t Word64V __attribute__((vector_size(4 * kLanes)));

template <>
struct Word<Word64V> {
  static FE_HD void widening_multiply(Word64V a, uint32_t b, Word64V& high, Word64V& low) {
#if defined(__AVX512F__)  // gcc makes the slow 64-bit vpmullq of the portable form
    low = (Word64V)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    low = (Word64V)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    low = (a & 0xffffffffu) * b;
#endif
    high = low >> 32;
  }
};

// kGroups vectors of Philox words: lanes 2i and 2i + 1 of group k in lane i of parts 2k and 2k + 1. A chain of ten rounds
// is all waiting (8 cycles per round on Zen 4, 3 of them busy). Chains written side by side fill each other's gaps, which
// out-of-order execution does not do for chains one after the other; four is what 32 registers hold, and two what 16 do.
#if defined(__AVX512F__)
inline constexpr int kGroups = 2;
#else
inline constexpr int kGroups = 1;
#endif

template <int kVectors>
struct Word64Chains {
  static constexpr int kParts = 2 * kVectors;
  Word64V part[kParts];

  template <class Operation>
  static FE_HD Word64Chains each(Operation operation) {
    Word64Chains result;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) result.part[i] = operation(i);
    return result;
  }
  friend FE_HD Word64Chains operator^(const Word64Chains& a, const Word64Chains& b) {
    return each([&](int i) { return a.part[i] ^ b.part[i]; });
  }
  friend FE_HD Word64Chains operator^(const Word64Chains& a, uint32_t b) {
    return each([&](int i) { return a.part[i] ^ b; });
  }
  friend FE_HD Word64Chains operator+(const Word64Chains& a, uint32_t b) {
    return each([&](int i) { return a.part[i] + b; });
  }
};

template <int kVectors>
struct Word<Word64Chains<kVectors>> {
  using Chains = Word64Chains<kVectors>;
  static FE_HD void widening_multiply(const Chains& a, uint32_t b, Chains& high, Chains& low) {
    Chains products[2];
#pragma GCC unroll 4
    for (int i = 0; i < Chains::kParts; ++i)
      Word<Word64V>::widening_multiply(a.part[i], b, products[0].part[i], products[1].part[i]);
    high = products[0];
    low = products[1];
  }
};

FE_HD UnsignedV zip(Word64V even, Word64V odd) {
#if defined(__AVX512F__)
  return (UnsignedV)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, (_MM_PERM_ENUM)0xA0);
#elif defined(__AVX2__)
  return (UnsignedV)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
#else
  return (UnsignedV)((even & 0xffffffffu) | odd << 32);
#endif
}

FE_HD FloatV load(const float* p) {
  FloatV v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FE_HD void store(float* p, FloatV v) { __builtin_memcpy(p, &v, sizeof v); }

inline constexpr int kPageBytes = 4096;
template <class T>
inline constexpr int kPage = kPageBytes / sizeof(T);  // elements

// Called once per page of a walk through memory. A processor's own prefetching ends at each page, and the first access behind
// it waits for the page tables, unless an earlier one has had them looked up: a walk bound by memory is 6 to 17% shorter.
// Measured 1 to 256 pages ahead: best from 32 to 128 on large data; from 4 on nothing is lost on data that is in a cache.
template <class T>
FE_HD void touch_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 32 * kPageBytes));
}

// Past the caches, which need not fetch what is overwritten whole; p is aligned to 64 bytes or lies in a span that is. A
// thread that has streamed calls `end_stream` before others read.
FE_HD void stream(float* p, FloatV v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

FE_HD void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Which counter lane i draws for: chosen so that `in_order` stays within quarters of a vector, where shuffles are cheap.
FE_HD constexpr int counter_of_lane(int lane) { return lane % 4 * (kLanes / 4) + lane / 4; }

// Lane i of words 0, 1, 2, 3 belongs to elements 4c, 4c + 1, 4c + 2, 4c + 3, c = counter_of_lane(i); out[0..3] are all
// 4 * kLanes elements in order. A 4 x 4 transpose in each quarter.
FE_HD void in_order(FloatV w0, FloatV w1, FloatV w2, FloatV w3, FloatV out[4]) {
#if defined(__AVX512F__)
  const __m512 low01 = _mm512_unpacklo_ps((__m512)w0, (__m512)w1), high01 = _mm512_unpackhi_ps((__m512)w0, (__m512)w1);
  const __m512 low23 = _mm512_unpacklo_ps((__m512)w2, (__m512)w3), high23 = _mm512_unpackhi_ps((__m512)w2, (__m512)w3);
  out[0] = (FloatV)_mm512_unpacklo_pd((__m512d)low01, (__m512d)low23);
  out[1] = (FloatV)_mm512_unpackhi_pd((__m512d)low01, (__m512d)low23);
  out[2] = (FloatV)_mm512_unpacklo_pd((__m512d)high01, (__m512d)high23);
  out[3] = (FloatV)_mm512_unpackhi_pd((__m512d)high01, (__m512d)high23);
#elif defined(__AVX2__)
  const __m256 low01 = _mm256_unpacklo_ps((__m256)w0, (__m256)w1), high01 = _mm256_unpackhi_ps((__m256)w0, (__m256)w1);
  const __m256 low23 = _mm256_unpacklo_ps((__m256)w2, (__m256)w3), high23 = _mm256_unpackhi_ps((__m256)w2, (__m256)w3);
  out[0] = (FloatV)_mm256_unpacklo_pd((__m256d)low01, (__m256d)low23);
  out[1] = (FloatV)_mm256_unpackhi_pd((__m256d)low01, (__m256d)low23);
  out[2] = (FloatV)_mm256_unpacklo_pd((__m256d)high01, (__m256d)high23);
  out[3] = (FloatV)_mm256_unpackhi_pd((__m256d)high01, (__m256d)high23);
#else
  for (int i = 0; i < 4; ++i) out[i] = FloatV{w0[i], w1[i], w2[i], w3[i]};
#endif
}

// The same for elements in pairs: out[0] and out[2] are the even ones of the first and of the second 2 * kLanes elements,
// out[1] and out[3] the odd ones. Two 16-bit numbers that share a word are such a pair.
FE_HD constexpr int counter_of_paired_lane(int lane) { return lane % 4 / 2 * (kLanes / 2) + lane / 4 * 2 + lane % 2; }

FE_HD void in_pairs(FloatV w0, FloatV w1, FloatV w2, FloatV w3, FloatV out[4]) {
#if defined(__AVX512F__)
  out[0] = (FloatV)_mm512_unpacklo_ps((__m512)w0, (__m512)w2);
  out[1] = (FloatV)_mm512_unpacklo_ps((__m512)w1, (__m512)w3);
  out[2] = (FloatV)_mm512_unpackhi_ps((__m512)w0, (__m512)w2);
  out[3] = (FloatV)_mm512_unpackhi_ps((__m512)w1, (__m512)w3);
#elif defined(__AVX2__)
  out[0] = (FloatV)_mm256_unpacklo_ps((__m256)w0, (__m256)w2);
  out[1] = (FloatV)_mm256_unpacklo_ps((__m256)w1, (__m256)w3);
  out[2] = (FloatV)_mm256_unpackhi_ps((__m256)w0, (__m256)w2);
  out[3] = (FloatV)_mm256_unpackhi_ps((__m256)w1, (__m256)w3);
#else
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = FloatV{w0[2 * i], w2[2 * i], w0[2 * i + 1], w2[2 * i + 1]};
    out[2 * i + 1] = FloatV{w1[2 * i], w3[2 * i], w1[2 * i + 1], w3[2 * i + 1]};
  }
#endif
}

}  // namespace fe::inline FE_ISA
