// Fills memory with Philox words, uniforms or normals.
#pragma once

#include "core/philox.h"

namespace fe {

enum class Draw { kBits, kUniform, kNormal };

// out[i], 32 bits each, becomes element offset + i of the draw that `key` names.
using FillPhilox = void(Draw draw, void* out, int64_t count, uint64_t offset, const NoiseKey& key);

}  // namespace fe
