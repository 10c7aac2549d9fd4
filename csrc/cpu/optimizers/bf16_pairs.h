// bfloat16 numbers straight from memory, two to a 32-bit lane: widening takes one operation per number and no shuffle, and
// the arithmetic does not care in which order the elements lie in its vectors.
#pragma once

#include "cpu/simd.h"
#include "core/bf16.h"

namespace fe::inline FE_ISA {

// 2 * kLanes consecutive numbers: the even ones, then the odd ones.
struct Bf16Pairs {
  FloatV part[2];

  static FE_HD Bf16Pairs load(const uint16_t* p) {
    UnsignedV v;
    __builtin_memcpy(&v, p, sizeof v);
    return {{(FloatV)(v << 16), (FloatV)(v & 0xffff0000u)}};
  }

  // `even` and `odd`, 16 bits each, go below the kept bits before truncation. Unlike bf16_truncate this does not look for
  // NaNs: those that come of arithmetic on bfloat16 numbers are quiet and have zeros in these bits, so that nothing carries.
  FE_HD void store(uint16_t* p, UnsignedV even, UnsignedV odd) const {
    const UnsignedV v = ((UnsignedV)part[0] + even) >> 16 | (((UnsignedV)part[1] + odd) & 0xffff0000u);
    __builtin_memcpy(p, &v, sizeof v);
  }

  FE_HD void store_nearest(uint16_t* p) const {
    store(p, bf16_nearest((UnsignedV)part[0]), bf16_nearest((UnsignedV)part[1]));
  }
};

}  // namespace fe::inline FE_ISA
