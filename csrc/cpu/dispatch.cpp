#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define FE_DECLARE(isa)            \
  namespace fe::isa {              \
  FillPhilox fill_philox;          \
  LangevinAdamKernel langevin_adam_span; \
  SgldKernel sgld_span;            \
  TermKernel free_energy_units;    \
  CategoricalKernel categorical_units; \
  ReparameterizeKernel reparameterize, reparameterize_backward; \
  SvgdKernel svgd_direction, svgd_direction_backward; \
  SvgdWorkspace svgd_direction_workspace, svgd_direction_backward_workspace; \
  DiscrepancyKernel kernel_stein_discrepancy; \
  DiscrepancyWorkspace kernel_stein_discrepancy_workspace; \
  RankKernel sq_dist_rank;         \
  SqDistKernel sq_dist;            \
  }
#define FE_KERNELS(isa, supported) \
  CpuKernels { \
    #isa, supported, fe::isa::fill_philox, fe::isa::langevin_adam_span, fe::isa::sgld_span, fe::isa::free_energy_units, \
        fe::isa::categorical_units, fe::isa::reparameterize, fe::isa::reparameterize_backward, \
        fe::isa::svgd_direction, fe::isa::svgd_direction_backward, fe::isa::svgd_direction_workspace, \
        fe::isa::svgd_direction_backward_workspace, fe::isa::kernel_stein_discrepancy, \
        fe::isa::kernel_stein_discrepancy_workspace, fe::isa::sq_dist_rank, fe::isa::sq_dist \
  }

FE_DECLARE(baseline)
#if defined(FE_HAVE_AVX2)
FE_DECLARE(avx2)
#endif
#if defined(FE_HAVE_AVX512)
FE_DECLARE(avx512)
#endif

namespace fe {

namespace {

// The best first.
const CpuKernels kSets[] = {
#if defined(FE_HAVE_AVX512)
    FE_KERNELS(avx512,
               [] {
                 return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("fma");
               }),
#endif
#if defined(FE_HAVE_AVX2)
    FE_KERNELS(avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
#endif
    FE_KERNELS(baseline, [] { return true; }),
};

const CpuKernels& find(const char* name) {
  const bool automatic = name == nullptr || *name == 0 || std::strcmp(name, "auto") == 0;
  std::string known;
  for (const CpuKernels& set : kSets) {
    known += std::string(", ") + set.isa + (set.supported() ? "" : " (not on this processor)");
    if ((automatic || std::strcmp(name, set.isa) == 0) && set.supported()) return set;
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
