// The host's part of one term of a free energy: its call, the memory it works in, its gradients and sums over rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/free_energy/free_energy.h"
#include "torch/large_tensors.h"
#include "core/bf16.h"
#include "torch/registration.h"
#include "torch/row_layout.h"

namespace fe {

// Results at least this large are written past the caches: the last of them could be read from them at best.
inline constexpr int64_t kStreamedElements = int64_t{2} << 20;

// Sums over rows in an order of its own: 256 interleaved partial sums, folded.
class RowTotal {
 public:
  void add(int64_t row, double value) { partial_[row % kPartials] += value; }
  double total() {
    for (int width = kPartials / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) partial_[i] += partial_[i + width];
    return partial_[0];
  }

 private:
  static constexpr int kPartials = 256;
  double partial_[kPartials] = {};
};

// The factor of each row's gradient: its weight, times what comes from above. A weight of 0 drops its row, whatever comes.
inline std::vector<float> row_scales(int64_t rows, const float* weight, const float* upstream, Reduction reduction) {
  const float common = reduction == Reduction::kMean ? static_cast<float>(1.0 / static_cast<double>(rows)) : 1.0f;
  std::vector<float> scales(rows);
  for (int64_t row = 0; row < rows; ++row)
    scales[row] = weight && weight[row] == 0.0f ? 0.0f : (weight ? weight[row] : 1.0f) * (upstream ? upstream[row] : common);
  return scales;
}

// One TermCall with the memory it works in, and the gradients it makes.
class Terms {
 public:
  Terms(int64_t term, int64_t rows, int64_t columns) : call_{} {
    call_.term = static_cast<int32_t>(term);
    call_.rows = rows;
    call_.columns = columns;
    call_.inputs[kTarget].dtype = kFloat32;
    sums_.resize(rows * call_.segments());
    call_.sums = sums_.data();
  }

  const TermCall& call() const { return call_; }

  void input(int which, const torch::stable::Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 2, "an operand must have two dimensions; got ", tensor.dim());
    const int64_t rows = tensor.size(0), columns = tensor.size(1);
    STD_TORCH_CHECK((rows == call_.rows || rows == 1) && (columns == call_.columns || columns == 1) &&
                        (columns <= 1 || tensor.stride(1) == 1 || rows == 0),
                    "an operand must have shape [", call_.rows, " or 1, ", call_.columns, " or 1] and inner stride 1");
    call_.inputs[which] = {tensor.const_data_ptr(), rows == call_.rows ? tensor.stride(0) : 0, columns == call_.columns,
                           dtype_of(tensor)};
  }

  // One of any shape whose elements lie in memory as those of [rows, columns].
  void contiguous_input(int which, const torch::stable::Tensor& tensor) {
    call_.inputs[which] = {tensor.const_data_ptr(), call_.columns, true, dtype_of(tensor)};
  }

  void values(const float* energies) { call_.inputs[0] = {energies, call_.columns, true, kFloat32}; }

  void mask(const torch::stable::Tensor& tensor) {
    call_.mask = static_cast<const uint8_t*>(tensor.const_data_ptr());
    call_.mask_stride = tensor.stride(0);
  }

  // [rows]; null: none.
  void weight(const float* weight) { call_.weight = weight; }

  // Plans the gradient of operand `which`, into `out` where it is given.
  void gradient(int which, const torch::stable::Tensor& operand, std::optional<torch::stable::Tensor> out) {
    const bool per_row = operand.size(0) == call_.rows, per_column = operand.size(1) == call_.columns;
    if (per_row && per_column) return full_gradient(which, operand, std::move(out));
    const torch::stable::Tensor made = empty_large(operand, operand.sizes());
    TermGrad& grad = call_.grads[which];
    grad.dtype = dtype_of(operand);
    if (per_column) {
      grad.kind = GradKind::kColumn;
      const int64_t blocks = (call_.rows + kRowBlock - 1) / kRowBlock;
      grad.data = (column_sums_[which] = std::vector<float>(blocks * call_.columns)).data();
    } else {
      grad.kind = GradKind::kSum;
      grad.data = (grad_sums_[which] = std::vector<double>(call_.rows * call_.segments())).data();
    }
    gradients_.push_back({which, made});
  }

  // The same for an operand that has every element.
  void full_gradient(int which, const torch::stable::Tensor& operand, std::optional<torch::stable::Tensor> out = std::nullopt) {
    const torch::stable::Tensor made = out ? *out : empty_like_rows(operand);
    TermGrad& grad = call_.grads[which];
    grad.dtype = dtype_of(operand);
    grad.kind = GradKind::kFull;
    grad.data = made.data_ptr();
    grad.row_stride = call_.columns;
    grad.streamed = !out && grad.dtype == kFloat32 && made.numel() >= kStreamedElements && call_.columns % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(grad.data) % 64 == 0;
    gradients_.push_back({which, made});
  }

  void scale_rows(std::vector<float> scales) {
    scales_ = std::move(scales);
    call_.row_scale = scales_.data();
  }

  // What the tasks left: sums over rows.
  void finish(std::vector<torch::stable::Tensor>& results) {
    for (auto& [which, made] : gradients_) {
      const TermGrad& grad = call_.grads[which];
      if (grad.kind == GradKind::kColumn) fold_rows(which, made);
      if (grad.kind == GradKind::kSum) fold_columns(which, made);
      results.push_back(made);
    }
  }

  double row_sum(const double* sums, int64_t row) const {
    const int64_t segments = call_.segments();
    double sum = 0.0;
    for (int64_t s = 0; s < segments; ++s) sum = s == 0 ? sums[row * segments] : sum + sums[row * segments + s];
    return sum;
  }
  double row_sum(int64_t row) const { return row_sum(sums_.data(), row); }

 private:
  // Where sums go. Asking the tensor for its address and dtype at each of them took longer than the sums.
  struct Out {
    void* data;
    DType dtype;

    explicit Out(const torch::stable::Tensor& tensor) : data(tensor.data_ptr()), dtype(dtype_of(tensor)) {}

    void store(int64_t at, double value) const {
      switch (dtype) {
        case kBFloat16: static_cast<uint16_t*>(data)[at] = float_to_bf16(static_cast<float>(value)); break;
        case kFloat16: static_cast<uint16_t*>(data)[at] = float_to_fp16(static_cast<float>(value)); break;
        default: static_cast<float*>(data)[at] = static_cast<float>(value);
      }
    }
  };

  void fold_rows(int which, const torch::stable::Tensor& tensor) const {
    const Out out(tensor);
    const std::vector<float>& sums = column_sums_[which];
    const int64_t columns = call_.columns, blocks = columns ? static_cast<int64_t>(sums.size()) / columns : 0;
    torch::stable::parallel_for(0, columns, std::max<int64_t>(1, kParallelElements / std::max<int64_t>(1, blocks)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t c = begin; c < end; ++c) {
                                    double sum = 0.0;
                                    for (int64_t b = 0; b < blocks; ++b) sum += sums[b * columns + c];
                                    out.store(c, sum);
                                  }
                                });
  }

  void fold_columns(int which, const torch::stable::Tensor& tensor) const {
    const Out out(tensor);
    const bool per_row = tensor.size(0) == call_.rows;
    RowTotal total;
    for (int64_t row = 0; row < call_.rows; ++row) {
      const double value = row_sum(grad_sums_[which].data(), row) * static_cast<double>(scales_[row]);
      if (per_row) out.store(row, value);
      total.add(row, value);
    }
    if (!per_row) out.store(0, total.total());
  }

  TermCall call_;
  std::vector<double> sums_, grad_sums_[kMaxParams];
  std::vector<float> scales_, column_sums_[kMaxParams];
  std::vector<std::pair<int, torch::stable::Tensor>> gradients_;
};

}  // namespace fe
