// The numbers by which the free energy's parts are named, in C++, CUDA and Python (fekernels/_catalogue/free_energy.py).
#pragma once

#include <cstdint>

namespace fe {

enum class Likelihood : int32_t {
#define FE_LIKELIHOOD(Name, file) k##Name,
#define FE_CLASS_LIKELIHOOD(Name) k##Name,
#include "formulas/likelihoods.def"
};

// What is summed beside a likelihood, and has no target; the codes are in one number with a Likelihood's.
enum Term : int32_t { kStandardNormalKl = 1 << 16, kNormalKl, kValue };

enum class Reduction : int32_t { kNone, kMean, kSum };

}  // namespace fe
