// Which instruction set runs: the best that this processor has, unless FEKERNELS_ISA or set_isa names another.
#pragma once

#include "cpu/diagnostics/chain_statistics.h"
#include "cpu/free_energy/categorical.h"
#include "cpu/free_energy/free_energy.h"
#include "cpu/graph/belief_propagation.h"
#include "cpu/stein/kernel_stein_discrepancy.h"
#include "cpu/optimizers/optimizers.h"
#include "cpu/optimizers/variational_kl.h"
#include "cpu/random.h"
#include "cpu/free_energy/reparameterize.h"
#include "cpu/stein/sq_dist_rank.h"
#include "cpu/stein/svgd_direction.h"

namespace fe {

struct CpuKernels {
  const char* isa;
#define FE_OPTIMIZER(Name, name) Name##Kernel* name;
#include "formulas/optimizers.def"
#define FE_KERNEL(Type, name) Type* name;
#include "cpu/kernels.def"
};

// The kernels in use. Throws std::invalid_argument when FEKERNELS_ISA names a set that is unknown, was not compiled or
// cannot run here.
const CpuKernels& cpu_kernels();

// Switches to the named set, "auto" being the best; throws std::invalid_argument as above.
void select_isa(const char* name);

}  // namespace fe
