// The numbers by which the free energy's parts are named, in C++, CUDA and Python (fekernels/_catalogue/free_energy.py).
#pragma once

#include <cstdint>

namespace fe {

// What is summed beside a likelihood, and has no target; the codes are in one number with a likelihood's, which is its index
// in `Likelihoods` of formulas/likelihoods.h.
enum Term : int32_t { kStandardNormalKl = 1 << 16, kNormalKl, kValue };

enum class Reduction : int32_t { kNone, kMean, kSum };

inline constexpr int64_t kReductions = static_cast<int64_t>(Reduction::kSum) + 1;  // of the last

// Operands of a term beside its target: a likelihood's parameters, or the four of the KL to a learned prior.
inline constexpr int kMaxParams = 4;

}  // namespace fe
