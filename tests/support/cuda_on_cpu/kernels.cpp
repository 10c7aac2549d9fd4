// With this file the .cu files make one library, which Python calls through csrc/cuda/kernels.h.
#include "cuda_on_cpu.h"

#include "cuda/kernels.h"

static_assert(sizeof(fe::cuda::StepCall) == 112 && sizeof(fe::cuda::LangevinAdamCall) == 184 &&
                  sizeof(fe::cuda::SgldCall) == 152,
              "tests/support/cuda_on_cpu/__init__.py mirrors these");
static_assert(sizeof(fe::cuda::FreeEnergyCall) == 192 + 2 * fe::kMaxParams * sizeof(fe::cuda::FreeEnergyOperand) &&
                  sizeof(fe::cuda::ReparameterizeCall) == 104 &&
                  sizeof(fe::cuda::ScaleCall) == 208,
              "tests/support/cuda_on_cpu/free_energy.py mirrors these");

// Whether threads and blocks run in descending order.
extern "C" void cuda_on_cpu_backwards(bool backwards) { cuda_on_cpu::state.backwards = backwards; }
