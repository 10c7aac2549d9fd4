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

// A Stein direction that several processes share.
struct SvgdShareKernels {
  SvgdLayoutOf* layout;
  SvgdAddColumns* add_columns;
  SvgdPrepare* prepare;
  SvgdMeet* meet;
  SvgdTotals* totals;
  SvgdComplete* complete;
  SvgdWideProducts* wide_products;
  SvgdWideShare* wide_share;
};

struct CpuKernels {
  const char* isa;
  FillPhilox* fill_philox;
#define FE_OPTIMIZER(Name, name) Name##Kernel* name;
#include "formulas/optimizers.def"
  VariationalKlKernel* variational_kl;
  TermKernelOf* free_energy;
  CategoricalKernel* categorical;
  ReparameterizeKernel* reparameterize;
  ReparameterizeKernel* reparameterize_backward;
  SvgdKernel *svgd_direction, *svgd_direction_backward;
  SvgdWorkspace *svgd_direction_workspace, *svgd_direction_backward_workspace;
  SvgdShareKernels svgd_share;
  DiscrepancyKernel* kernel_stein_discrepancy;
  DiscrepancyWorkspace* kernel_stein_discrepancy_workspace;
  RankKernel* sq_dist_rank;
  SqDistKernel* sq_dist;
  ScanKernel* sq_dist_scan;
  TilesKernel* sq_dist_tiles;
  ChainKernel* chain_statistics;
  BeliefKernel* belief_propagation;
};

// The kernels in use. Throws std::invalid_argument when FEKERNELS_ISA names a set that is unknown, was not compiled or
// cannot run here.
const CpuKernels& cpu_kernels();

// Switches to the named set, "auto" being the best; throws std::invalid_argument as above.
void select_isa(const char* name);

}  // namespace fe
