// The GPU's side of torch/free_energy.cpp: outputs, scratch memory, and the calls of csrc/cuda.
#if defined(FE_HAVE_CUDA)

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cuda/kernels.h"
#include "formulas/likelihoods.h"
#include "torch/registration.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

fe::cuda::FreeEnergyOperand operand(const Tensor& tensor, int64_t rows, int64_t columns, const Tensor* gradient) {
  STD_TORCH_CHECK(tensor.dim() == 2, "an operand must have two dimensions; got ", tensor.dim());
  STD_TORCH_CHECK((tensor.size(0) == rows || tensor.size(0) == 1) && (tensor.size(1) == columns || tensor.size(1) == 1) &&
                      (tensor.size(1) <= 1 || tensor.stride(1) == 1 || rows == 0),
                  "an operand must have shape [", rows, " or 1, ", columns, " or 1] and inner stride 1");
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0),
          gradient ? gradient->data_ptr() : nullptr, fe::dtype_of(tensor)};
}

std::vector<Tensor> free_energy_cuda(std::vector<Tensor> params, std::optional<Tensor> target,
                                     std::optional<Tensor> mask, std::vector<Tensor> latent,
                                     std::optional<Tensor> weight, std::vector<Tensor> upstream, int64_t likelihood,
                                     int64_t reduction, double beta, int64_t needs, bool inplace,
                                     std::optional<Tensor> latent_mask) {
  fe::check_free_energy(params, target, latent, upstream, fe::parameters_of(likelihood), reduction, inplace);
  const Tensor& full = params.empty() ? latent[0] : *target;
  STD_TORCH_CHECK(full.dim() == 2, "target, and the means without one, must have two dimensions; got ", full.dim());
  fe::check_free_energy_mask(mask, full.size(0), full.size(1));
  if (weight) fe::check_free_energy_rows(*weight, full.size(0));
  for (const Tensor& tensor : upstream) fe::check_free_energy_rows(tensor, full.size(0));
  const int32_t device = full.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const bool categorical = likelihood == fe::kCategorical && !params.empty();

  fe::cuda::FreeEnergyCall call{};
  call.rows = full.size(0);
  call.columns = params.empty() ? 0 : full.size(1);
  call.latents = latent.empty() ? 0 : latent[0].size(1);
  call.n_params = static_cast<int32_t>(params.size());
  call.n_latent = static_cast<int32_t>(latent.size());
  call.likelihood = static_cast<int32_t>(likelihood);
  call.reduction = static_cast<fe::Reduction>(reduction);
  call.beta = beta;

  const int64_t rows[1] = {call.rows};
  std::vector<Tensor> results;
  for (int i = 0; i < 3; ++i) {
    results.push_back(torch::stable::new_empty(full, {rows, call.reduction == fe::Reduction::kNone ? size_t{1} : size_t{0}},
                                               ScalarType::Float));
    call.out[i] = static_cast<float*>(results[i].mutable_data_ptr());
  }
  const auto gradient = [&](const Tensor& of, size_t which) -> const Tensor* {
    if (!(needs >> which & 1)) return nullptr;
    results.push_back(inplace && which == 0 ? of : torch::stable::new_empty(of, of.sizes()));
    return &results.back();
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor* made = gradient(params[i], i);
    if (categorical) {
      STD_TORCH_CHECK(params[i].dim() == 3 && params[i].is_contiguous() && params[i].size(0) == call.rows &&
                          params[i].size(1) == call.columns && target->scalar_type() == ScalarType::Long &&
                          target->is_contiguous() && (!mask || mask->is_contiguous()),
                      "categorical takes contiguous logits [rows, positions, classes], int64 target and mask");
      call.classes = params[i].size(2);
      call.params[i] = {params[i].const_data_ptr(), call.rows, call.columns, 0, made ? made->data_ptr() : nullptr,
                        fe::dtype_of(params[i])};
    } else {
      call.params[i] = operand(params[i], call.rows, call.columns, made);
    }
  }
  for (size_t i = 0; i < latent.size(); ++i) {
    call.latent[i] = operand(latent[i], call.rows, call.latents, gradient(latent[i], params.size() + i));
  }
  if (categorical) {
    call.target = {target->const_data_ptr(), call.rows, call.columns, call.columns, nullptr, fe::kFloat32};
  } else if (!params.empty()) {
    call.target = operand(*target, call.rows, call.columns, nullptr);
  }
  if (mask) {
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    call.mask_stride = mask->stride(0);
  }
  if (latent_mask) {
    fe::check_free_energy_mask(latent_mask, call.rows, call.latents);
    call.latent_mask = static_cast<const uint8_t*>(latent_mask->const_data_ptr());
    call.latent_mask_stride = latent_mask->stride(0);
  }
  call.weight = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr;
  for (size_t i = 0; i < upstream.size() && i < 2; ++i)
    call.upstream[i] = static_cast<const float*>(upstream[i].const_data_ptr());

  const int64_t bytes[1] = {fe::cuda::fe_cuda_free_energy_scratch(&call)};
  const Tensor scratch = torch::stable::new_empty(full, {bytes, size_t{1}}, ScalarType::Byte);
  call.scratch = scratch.mutable_data_ptr();
  fe::check_cuda(fe::cuda::fe_cuda_free_energy(&call, fe::current_stream(device)), "free_energy");
  return results;
}

fe::cuda::ReparameterizeCall reparameterize_call_cuda(const Tensor& like, const Tensor& logvar, int64_t seed,
                                                      int64_t stream, int64_t step, int64_t offset, int64_t samples) {
  fe::cuda::ReparameterizeCall call{};
  call.logvar = logvar.const_data_ptr();
  call.rows = logvar.size(0);
  call.latents = logvar.size(1);
  call.samples = samples;
  call.offset = offset;
  call.seed = seed;
  call.stream = static_cast<uint32_t>(stream);
  call.step = static_cast<uint32_t>(step);
  call.dtype = fe::dtype_of(like);
  call.logvar_dtype = fe::dtype_of(logvar);
  return call;
}

Tensor reparameterize_cuda(Tensor mean, Tensor logvar, int64_t seed, int64_t stream, int64_t step, int64_t offset,
                           int64_t samples) {
  fe::check_reparameterize(mean, logvar, false, samples, stream, step, offset);
  const int32_t device = mean.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t shape[3] = {samples, mean.size(0), mean.size(1)};
  Tensor z = torch::stable::new_empty(mean, {shape, size_t{3}});
  fe::cuda::ReparameterizeCall call = reparameterize_call_cuda(mean, logvar, seed, stream, step, offset, samples);
  call.mean = mean.const_data_ptr();
  call.z = z.mutable_data_ptr();
  fe::check_cuda(fe::cuda::fe_cuda_reparameterize(&call, fe::current_stream(device)), "reparameterize");
  return z;
}

std::vector<Tensor> reparameterize_backward_cuda(Tensor grad, Tensor logvar, int64_t seed, int64_t stream, int64_t step,
                                                 int64_t offset) {
  fe::check_reparameterize(grad, logvar, true, grad.dim() ? grad.size(0) : 0, stream, step, offset);
  const int32_t device = grad.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t shape[2] = {logvar.size(0), logvar.size(1)};
  Tensor grad_mean = torch::stable::new_empty(grad, {shape, size_t{2}});
  Tensor grad_logvar = torch::stable::new_empty(logvar, logvar.sizes());
  fe::cuda::ReparameterizeCall call =
      reparameterize_call_cuda(grad, logvar, seed, stream, step, offset, grad.size(0));
  call.grad = grad.const_data_ptr();
  call.grad_mean = grad_mean.mutable_data_ptr();
  call.grad_logvar = grad_logvar.mutable_data_ptr();
  fe::check_cuda(fe::cuda::fe_cuda_reparameterize_backward(&call, fe::current_stream(device)),
                 "reparameterize_backward");
  return {grad_mean, grad_logvar};
}

void scale_cuda(std::vector<Tensor> tensors, Tensor factor) {
  if (tensors.empty()) return;
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float && factor.numel() == 1, "factor must be one float32");
  const int32_t device = factor.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  fe::cuda::ScaleCall call{};
  call.factor = static_cast<const float*>(factor.const_data_ptr());
  const auto flush = [&] {
    fe::check_cuda(fe::cuda::fe_cuda_scale(&call, fe::current_stream(device)), "scale_");
    call.n_tensors = 0;
  };
  for (Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.is_cuda() && tensor.get_device_index() == device,
                    "tensors must be contiguous and on the device of factor");
    call.tensors[call.n_tensors++] = {tensor.mutable_data_ptr(), tensor.numel(), fe::dtype_of(tensor)};
    if (call.n_tensors == fe::cuda::kMaxScaled) flush();
  }
  if (call.n_tensors) flush();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CUDA, m) {
  m.impl("free_energy", TORCH_BOX(&free_energy_cuda));
  m.impl("reparameterize", TORCH_BOX(&reparameterize_cuda));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward_cuda));
  m.impl("scale_", TORCH_BOX(&scale_cuda));
}

#endif
