#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fe {

// csrc/cpu/kernels.cpp
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace baseline {
extern const CpuKernels kernels;
}

namespace {

struct InstructionSet {
  const CpuKernels* kernels;
  bool (*supported)();
};

// The best first.
const InstructionSet kSets[] = {
#if defined(FE_HAVE_AVX512)
    {&avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     }},
#endif
#if defined(FE_HAVE_AVX2)
    {&avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&baseline::kernels, [] { return true; }},
};

const CpuKernels& find(const char* name) {
  const bool automatic = name == nullptr || *name == 0 || std::strcmp(name, "auto") == 0;
  std::string known;
  for (const InstructionSet& set : kSets) {
    known += std::string(", ") + set.kernels->isa + (set.supported() ? "" : " (not on this processor)");
    if ((automatic || std::strcmp(name, set.kernels->isa) == 0) && set.supported()) return *set.kernels;
  }
  throw std::invalid_argument("FEKERNELS_ISA must be one of auto" + known + "; got '" + name + "'");
}

std::atomic<const CpuKernels*> active{nullptr};

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = active.load(std::memory_order_acquire);
  if (!kernels) {
    kernels = &find(std::getenv("FEKERNELS_ISA"));
    active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void no_such_kernel(int64_t code) {
  throw std::invalid_argument("kernel must be the code of one that this computes; got " + std::to_string(code));
}

void select_isa(const char* name) { active.store(&find(name), std::memory_order_release); }

}  // namespace fe
