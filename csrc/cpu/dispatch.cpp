#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fe {

// csrc/cpu/kernels.cpp, compiled once for each. Weak: a library need not hold all of them, and one that it lacks is null.
#define FE_MAY_HAVE(isa)                               \
  namespace isa {                                      \
  extern const CpuKernels kernels __attribute__((weak)); \
  }
FE_MAY_HAVE(avx512)
FE_MAY_HAVE(avx2)
FE_MAY_HAVE(baseline)

namespace {

struct InstructionSet {
  const char* name;
  const CpuKernels* kernels;
  bool (*supported)();
};

// The best first.
const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     }},
    {"avx2", &avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};

// "all" says what is compiled, and chooses as "auto" does.
const CpuKernels& find(const char* name) {
  const std::string wanted = name == nullptr || *name == 0 ? "auto" : name;
  const bool best = wanted == "auto" || wanted == "all";
  std::string known;
  for (const InstructionSet& set : kSets) {
    const bool supported = set.supported();
    if ((best || wanted == set.name) && supported && set.kernels) return *set.kernels;
    known += std::string(", ") + set.name;
    if (!supported) known += " (not on this processor)";
    else if (!set.kernels) known += " (not in this library: FEKERNELS_ISA=all compiles every one)";
  }
  throw std::invalid_argument("FEKERNELS_ISA must be one of auto, all" + known + "; got '" + wanted + "'");
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
