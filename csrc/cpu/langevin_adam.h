#pragma once

#include "cpu/span.h"
#include "math/langevin_adam.h"

namespace fe {

struct LangevinAdamSpan : Span {
  LangevinAdamCoefficients<float> single;
  LangevinAdamCoefficients<double> wide;  // for float64 parameters
};

using LangevinAdamKernel = void(const LangevinAdamSpan& span);

}  // namespace fe
