#pragma once

#include "cpu/span.h"
#include "math/sgld.h"

namespace fe {

struct SgldSpan : Span {
  SgldCoefficients<float> single;
  SgldCoefficients<double> wide;  // for float64 parameters
};

using SgldKernel = void(const SgldSpan& span);

}  // namespace fe
