#include "cpu/optimizers/buffered_span.h"

namespace fe::FE_ISA {

template struct Buffers<float>;
template struct Buffers<double>;

}  // namespace fe::FE_ISA
