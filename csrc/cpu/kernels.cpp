// The kernels of one instruction set: this file is compiled for each. Its data alone is read before one is chosen.
#include "cpu/dispatch.h"

#define FE_TEXT(word) #word
#define FE_NAME(word) FE_TEXT(word)

namespace fe::FE_ISA {

FillPhilox fill_philox;
#define FE_OPTIMIZER(Name, name) Name##Kernel name##_span;
#include "formulas/optimizers.def"
VariationalKlKernel variational_kl;
TermKernelOf free_energy_kernel;
CategoricalKernel categorical_positions;
ReparameterizeKernel reparameterize, reparameterize_backward;
SvgdKernel svgd_direction, svgd_direction_backward;
SvgdWorkspace svgd_direction_workspace, svgd_direction_backward_workspace;
SvgdLayoutOf svgd_layout;
SvgdAddColumns svgd_add_columns;
SvgdPrepare svgd_prepare;
SvgdMeet svgd_meet;
SvgdTotals svgd_totals;
SvgdComplete svgd_complete;
SvgdWideProducts svgd_wide_products;
SvgdWideShare svgd_wide_share;
DiscrepancyKernel kernel_stein_discrepancy;
DiscrepancyWorkspace kernel_stein_discrepancy_workspace;
RankKernel sq_dist_rank;
SqDistKernel sq_dist;
ScanKernel sq_dist_scan;
TilesKernel sq_dist_tiles;
ChainKernel chain_statistics;
BeliefKernel belief_propagation;

extern const CpuKernels kernels;
constexpr CpuKernels kernels{
    FE_NAME(FE_ISA),
    fill_philox,
#define FE_OPTIMIZER(Name, name) name##_span,
#include "formulas/optimizers.def"
    variational_kl,
    free_energy_kernel,
    categorical_positions,
    reparameterize,
    reparameterize_backward,
    svgd_direction,
    svgd_direction_backward,
    svgd_direction_workspace,
    svgd_direction_backward_workspace,
    {svgd_layout, svgd_add_columns, svgd_prepare, svgd_meet, svgd_totals, svgd_complete,
     svgd_wide_products, svgd_wide_share},
    kernel_stein_discrepancy,
    kernel_stein_discrepancy_workspace,
    sq_dist_rank,
    sq_dist,
    sq_dist_scan,
    sq_dist_tiles,
    chain_statistics,
    belief_propagation,
};

}  // namespace fe::FE_ISA
