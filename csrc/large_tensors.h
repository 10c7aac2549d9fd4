// Memory of large results on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fe {

// An uninitialised contiguous tensor of the dtype of `like`, on the CPU.
//
// A large allocation is fresh memory, and to fault it in by 4 KB pages costs five times the kernel that fills it; by huge
// pages, which the kernel must still clear, as much again. A gradient dies before the next one is made, so its memory is
// kept for that one: at most 32 buffers, of which 256 MB stay resident and the system may take the rest (MADV_FREE).
torch::stable::Tensor empty_large(const torch::stable::Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes);

}  // namespace fe
