// Memory of large results on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fe {

// An uninitialised tensor on the CPU, a microsecond sooner than through the dispatcher (torch::stable::empty). `strides`: of
// one without gaps; null for a contiguous one.
torch::stable::Tensor empty_cpu(int32_t dtype, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                const int64_t* strides = nullptr);

// One of the dtype of `like`.
//
// A large allocation is fresh memory, and to fault it in by 4 KB pages costs five times the kernel that fills it; by huge
// pages, which the kernel must still clear, as much again. A gradient dies before the next one is made, so its memory is
// kept for that one: at most 32 buffers, of which 256 MB stay resident and the system may take the rest (MADV_FREE).
torch::stable::Tensor empty_large(const torch::stable::Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                  const int64_t* strides = nullptr);

// Puts memory that is not yet written onto huge pages, as far as it fills them: the optimizers' states, of which every step
// reads and writes all.
void advise_huge_pages(torch::stable::Tensor fresh);

// Whether these tensors begin as NaN, so that what a kernel leaves unwritten shows: for tests, as
// torch.utils.deterministic.fill_uninitialized_memory does not reach them.
void poison_empty(bool on);

}  // namespace fe
