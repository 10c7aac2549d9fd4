// bfloat16 and float16 as bit patterns: exact widening, rounding to nearest even, and stochastic rounding to bfloat16.
// Integer code with no branch, so that it vectorises and needs neither F16C nor a vendor's header.
#pragma once

#include "core/lane.h"

namespace fe::inline FE_ISA {

FE_HD float bf16_to_float(uint16_t h) { return Lane<float>::from_bits(static_cast<uint32_t>(h) << 16); }

// `added`, 16 bits, goes below the kept bits before truncation. An infinity has zeros in them, so nothing carries into it;
// a NaN could become an infinity, and is made quiet instead.
FE_HD uint16_t bf16_truncate(uint32_t bits, uint32_t added) {
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>((nan ? bits | 0x400000u : bits + added) >> 16);
}

// What rounds to nearest, ties to even, when it is added below the kept bits.
template <class U>
FE_HD U bf16_nearest(U bits) {
  return ((bits >> 16) & 1u) + 0x7fffu;
}

FE_HD uint16_t float_to_bf16(float x) {
  const uint32_t bits = Lane<float>::bits(x);
  return bf16_truncate(bits, bf16_nearest(bits));
}

// Unbiased: x lies between two neighbours, and the upper is taken with the probability of the distance to the lower.
FE_HD uint16_t float_to_bf16_stochastic(float x, uint32_t sixteen_bits) {
  return bf16_truncate(Lane<float>::bits(x), sixteen_bits);
}

FE_HD float fp16_to_float(uint16_t h) {
  const uint32_t shifted = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals right too.
  const uint32_t scaled = Lane<float>::bits(Lane<float>::from_bits(shifted) * 0x1p112f);
  const uint32_t magnitude = shifted >= 0x0f800000u ? (scaled | 0x7f800000u) : scaled;
  return Lane<float>::from_bits(magnitude | static_cast<uint32_t>(h & 0x8000u) << 16);
}

FE_HD uint16_t float_to_fp16(float x) {
  const uint32_t bits = Lane<float>::bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 leaves exactly the subnormal's bits, rounded to nearest even by the addition itself.
  const uint32_t small = Lane<float>::bits(Lane<float>::from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | (bits >> 16 & 0x8000u));
}

}  // namespace fe::inline FE_ISA
