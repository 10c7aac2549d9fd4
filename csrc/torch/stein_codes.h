// The check of a kernel's code, for all ops of Stein's method.
#pragma once

#include <cstdint>
#include <string>

#include "formulas/radial_kernels.h"
#include "torch/registration.h"

namespace fe {

// Of those with a finite discrepancy, or of all.
inline bool is_kernel(int64_t code, bool discrepancy) {
  bool found = false;
  RadialKernels<float>::visit(code, [&]<class Kernel>() { found = Kernel::kHasDiscrepancy || !discrepancy; });
  return found;
}

inline std::string kernel_names(bool discrepancy) {
  std::string known;
  for (int code = 0; code < RadialKernels<float>::kCount; ++code)
    RadialKernels<float>::visit(code, [&]<class Kernel>() {
      if (is_kernel(code, discrepancy))
        known += (known.empty() ? "" : ", ") + std::to_string(code) + " (" + Kernel::kName + ")";
    });
  return known;
}

inline void check_kernel(int64_t code, bool discrepancy = false) {
  STD_TORCH_CHECK(is_kernel(code, discrepancy), "kernel must be one of ", kernel_names(discrepancy), "; got ", code);
}

}  // namespace fe
