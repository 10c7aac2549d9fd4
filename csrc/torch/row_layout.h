// Layouts whose rows have no gaps: the dimensions behind the first may lie in any order, as those of channels_last images.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "torch/large_tensors.h"

namespace fe {

inline constexpr size_t kMaxDims = 64;  // that a tensor may have elsewhere in PyTorch

inline bool rows_without_gaps(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (sizes.size() > kMaxDims || tensor.numel() == 0) return false;
  std::array<size_t, kMaxDims> dims;
  size_t n = 0;
  for (size_t d = 1; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims[n++] = d;
  std::sort(dims.begin(), dims.begin() + n, [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t step = 1;
  for (size_t i = 0; i < n; ++i) {
    if (strides[dims[i]] != step) return false;
    step *= sizes[dims[i]];
  }
  return sizes[0] == 1 || strides[0] == step;
}

// Of two such tensors: whether elements of one index lie at one offset in their rows.
inline bool same_layout(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  const auto of_a = a.sizes(), of_b = b.sizes();
  if (of_a.size() != of_b.size() || !std::equal(of_a.begin(), of_a.end(), of_b.begin())) return false;
  const auto first = a.strides(), second = b.strides();
  for (size_t d = 1; d < of_a.size(); ++d)
    if (of_a[d] != 1 && first[d] != second[d]) return false;
  return true;
}

// Memory for a gradient, in the layout of its operand's rows.
inline torch::stable::Tensor empty_like_rows(const torch::stable::Tensor& operand) {
  const auto sizes = operand.sizes();
  if (operand.is_contiguous() || operand.numel() == 0 || sizes.size() > kMaxDims) return empty_large(operand, sizes);
  std::array<int64_t, kMaxDims> strides;
  std::copy(operand.strides().begin(), operand.strides().end(), strides.begin());
  for (size_t d = 1; d < sizes.size(); ++d)
    if (sizes[d] == 1) strides[d] = 1;
  strides[0] = operand.numel() / sizes[0];
  return empty_large(operand, sizes, strides.data());
}

}  // namespace fe
