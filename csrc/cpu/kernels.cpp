// The kernels of one instruction set: this file is compiled for each. Its data alone is read before one is chosen.
#include "cpu/dispatch.h"

#define FE_TEXT(word) #word
#define FE_NAME(word) FE_TEXT(word)

namespace fe::FE_ISA {

#define FE_OPTIMIZER(Name, name) Name##Kernel name##_span;
#include "formulas/optimizers.def"
#define FE_KERNEL(Type, name) Type name;
#include "cpu/kernels.def"

extern const CpuKernels kernels;
constexpr CpuKernels kernels{
    FE_NAME(FE_ISA),
#define FE_OPTIMIZER(Name, name) name##_span,
#include "formulas/optimizers.def"
#define FE_KERNEL(Type, name) name,
#include "cpu/kernels.def"
};

}  // namespace fe::FE_ISA
