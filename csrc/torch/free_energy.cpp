// Host side of the free energy and the reparameterised sample: outputs, threads, and the sums over rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "torch/free_energy_call.h"
#include "torch/large_tensors.h"
#include "torch/plain_free_energy.h"
#include "torch/plain_reparameterize.h"
#include "formulas/likelihoods.h"
#include "torch/registration.h"
#include "torch/row_layout.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Tasks of several calls on torch's threads, in one go. Each thread takes the same share of every call: an element of a KL
// costs three of an energy's, and a thread that had all of them was waited for.
void run(const std::vector<const fe::TermCall*>& calls) {
  int64_t total = 0;
  std::vector<fe::TermKernel*> kernels;
  for (const fe::TermCall* call : calls) {
    total += call->rows * call->columns;
    kernels.push_back(fe::cpu_kernels().free_energy_kernel(call->term));
    STD_TORCH_CHECK(kernels.back(), "likelihood ", call->term, " has no elementwise kernel");
  }
  torch::stable::parallel_for(0, total, fe::kParallelElements, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < calls.size(); ++i) {
      const int64_t tasks = calls[i]->tasks();
      const auto share = [&](int64_t at) { return static_cast<int64_t>(static_cast<double>(at) / total * tasks); };
      kernels[i](*calls[i], share(begin), end == total ? tasks : share(end));
    }
  });
}

// Energies of a categorical likelihood, [rows, positions] float, and their gradient.
std::vector<float> categorical_energies(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
                                        const float* weight, const float* row_scale, void* grad) {
  const int64_t rows = logits.size(0), positions = logits.size(1), classes = logits.size(2);
  std::vector<float> energies(rows * positions);
  const fe::CategoricalCall call{positions,
                                 classes,
                                 logits.const_data_ptr(),
                                 grad,
                                 fe::dtype_of(logits),
                                 static_cast<const int64_t*>(target.const_data_ptr()),
                                 mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                                 weight,
                                 row_scale,
                                 energies.data()};
  fe::CategoricalKernel* kernel = fe::cpu_kernels().categorical_positions;
  const int64_t grain = std::max<int64_t>(1, fe::kParallelElements / std::max<int64_t>(1, classes));
  torch::stable::parallel_for(0, rows * positions, grain,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return energies;
}

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// [free_energy, energy, kl], from the sums that the tasks left; a null term counts 0.
std::vector<Tensor> values(const fe::Terms* energy, const fe::Terms* kl, int64_t rows, const float* weights,
                           fe::Reduction reduction, double beta) {
  const int64_t shape[1] = {rows};
  const bool reduced = reduction != fe::Reduction::kNone;
  const auto result = [&] { return fe::empty_cpu(aoti_torch_dtype_float32(), {shape, reduced ? size_t{0} : size_t{1}}); };
  std::vector<Tensor> results{result(), result(), result()};
  float* out[3];
  for (int i = 0; i < 3; ++i) out[i] = static_cast<float*>(results[i].data_ptr());
  fe::RowTotal energy_total, kl_total;
  for (int64_t row = 0; row < rows; ++row) {
    const double w = weights ? weights[row] : 1.0;
    const double e = energy ? w * energy->row_sum(row) : 0.0, k = kl ? w * kl->row_sum(row) : 0.0;
    if (reduced) {
      energy_total.add(row, e);
      kl_total.add(row, k);
    } else {
      out[0][row] = static_cast<float>(e + beta * k);
      out[1][row] = static_cast<float>(e);
      out[2][row] = static_cast<float>(k);
    }
  }
  if (reduced) {
    const double divisor = reduction == fe::Reduction::kMean ? static_cast<double>(rows) : 1.0;
    const double e = energy_total.total() / divisor, k = kl_total.total() / divisor;
    *out[0] = static_cast<float>(e + beta * k);
    *out[1] = static_cast<float>(e);
    *out[2] = static_cast<float>(k);
  }
  return results;
}

// As fekernels/reference/free_energy/free_energy.py says, on operands that fekernels/ops/free_energy/broadcasting.py has brought into two
// dimensions.
std::vector<Tensor> free_energy_cpu(std::vector<Tensor> params, std::optional<Tensor> target,
                                    std::optional<Tensor> mask, std::vector<Tensor> latent,
                                    std::optional<Tensor> weight, std::vector<Tensor> upstream, int64_t likelihood,
                                    int64_t reduction, double beta, int64_t needs, bool inplace,
                                    std::optional<Tensor> latent_mask) {
  fe::check_free_energy(params, target, latent, upstream, fe::parameters_of(likelihood), reduction, inplace);
  const auto how = static_cast<fe::Reduction>(reduction);
  const Tensor& full = params.empty() ? latent[0] : *target;
  const int64_t rows = full.size(0), n_params = static_cast<int64_t>(params.size());
  const float* weights = floats(weight);
  if (inplace && n_params) params[0].mutable_data_ptr();  // as below: not where a lazy clone of it lies
  const auto scales = [&](int which) {
    const float* from_above = upstream.empty() ? nullptr : static_cast<const float*>(upstream[which].const_data_ptr());
    return fe::row_scales(rows, weights, from_above, how);
  };

  STD_TORCH_CHECK(full.dim() == 2, "target, and the means without one, must have two dimensions; got ", full.dim());
  fe::check_free_energy_mask(mask, rows, full.size(1));
  if (weight) fe::check_free_energy_rows(*weight, rows);
  for (const Tensor& tensor : upstream) fe::check_free_energy_rows(tensor, rows);

  std::vector<Tensor> gradients;
  std::vector<const fe::TermCall*> calls;
  std::vector<float> energies;
  std::optional<fe::Terms> energy, kl;
  if (likelihood == fe::kCategorical && n_params) {
    STD_TORCH_CHECK(params[0].dim() == 3 && params[0].is_contiguous() && params[0].size(0) == rows &&
                        params[0].size(1) == target->size(1) && target->scalar_type() == ScalarType::Long &&
                        target->is_contiguous() && (!mask || mask->is_contiguous()),
                    "categorical takes contiguous logits [rows, positions, classes], int64 target and mask");
    const std::vector<float> scale = scales(0);
    std::optional<Tensor> grad;
    if (needs & 1) grad = inplace ? params[0] : fe::empty_large(params[0], params[0].sizes());
    energies =
        categorical_energies(params[0], *target, mask, weights, scale.data(), grad ? grad->data_ptr() : nullptr);
    if (grad) gradients.push_back(*grad);
    energy.emplace(fe::kValue, rows, full.size(1));
    energy->values(energies.data());
  } else if (n_params) {
    energy.emplace(likelihood, rows, full.size(1));
    for (int64_t i = 0; i < n_params; ++i) {
      energy->input(static_cast<int>(i), params[i]);
      if (needs >> i & 1)
        energy->gradient(static_cast<int>(i), params[i], inplace && i == 0 ? std::optional(params[0]) : std::nullopt);
    }
    energy->input(fe::kTarget, *target);
    if (mask) energy->mask(*mask);
    energy->weight(weights);
    if (needs & ((1 << n_params) - 1)) energy->scale_rows(scales(0));
  }
  if (energy) calls.push_back(&energy->call());
  if (!latent.empty()) {
    STD_TORCH_CHECK(latent[0].dim() == 2, "the means must have two dimensions; got ", latent[0].dim());
    fe::check_free_energy_mask(latent_mask, rows, latent[0].size(1));
    kl.emplace(latent.size() == 2 ? fe::kStandardNormalKl : fe::kNormalKl, rows, latent[0].size(1));
    for (int i = 0; i < static_cast<int>(latent.size()); ++i) {
      kl->input(i, latent[i]);
      if (needs >> (n_params + i) & 1) kl->gradient(i, latent[i], std::nullopt);
    }
    if (latent_mask) kl->mask(*latent_mask);
    kl->weight(weights);
    if (needs >> n_params) kl->scale_rows(scales(1));
    calls.push_back(&kl->call());
  }
  run(calls);

  std::vector<Tensor> results = values(energy ? &*energy : nullptr, kl ? &*kl : nullptr, rows, weights, how, beta);
  results.insert(results.end(), gradients.begin(), gradients.end());
  if (energy) energy->finish(results);
  if (kl) kl->finish(results);
  return results;
}

// Of a handle of PyTorch's stable ABI, one more.
AtenTensorHandle another(void* handle) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(static_cast<AtenTensorHandle>(handle), &made));
  return made;
}

// What most calls are, in a third of the time that lists of tensors and their checks in Python take: one parameter, no
// broadcasting, mask, weight or learned prior, and all of it float32 without gaps, of any shape [rows, ...] and any order of
// the dimensions behind the first that an operand shares with its peer: a row is summed as it lies.
// Makes nothing where that is not so. `inplace`: the prediction's gradient is written over it.
void free_energy_plain(const fe::PlainFreeEnergy& call) {
  const auto operand = [](void* handle) { return Tensor(static_cast<AtenTensorHandle>(handle)); };
  const Tensor prediction = operand(call.prediction), target = operand(call.target), mean = operand(call.mean),
               logvar = operand(call.logvar);
  const auto plain = [](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Float && tensor.dim() > 0 && fe::rows_without_gaps(tensor) &&
           (tensor.const_data_ptr() || tensor.numel() == 0);
  };
  // From the first byte to the last: an operand that the kernel still reads where the gradient has been written.
  const auto overlap = [](const Tensor& a, const Tensor& b) {
    const auto *first = static_cast<const float*>(a.const_data_ptr()), *other = static_cast<const float*>(b.const_data_ptr());
    return first < other + b.numel() && other < first + a.numel();
  };
  // Before its address is taken: memory that it shares with a lazy clone becomes its own, elsewhere.
  if (call.inplace) prediction.mutable_data_ptr();
  if (!plain(prediction) || !plain(target) || !plain(mean) || !plain(logvar)) return;
  const int64_t rows = prediction.size(0), likelihood = call.likelihood;
  const auto how = static_cast<fe::Reduction>(call.reduction);
  const bool expected = likelihood != fe::kCategorical && fe::parameters_of(likelihood) == 1 && rows > 0 && mean.size(0) == rows &&
                        fe::same_layout(prediction, target) && fe::same_layout(mean, logvar);
  if (!expected) return;
  if (call.inplace && (overlap(prediction, target) || overlap(prediction, mean) || overlap(prediction, logvar))) return;

  fe::Terms energy(likelihood, rows, prediction.numel() / rows), kl(fe::kStandardNormalKl, rows, mean.numel() / rows);
  energy.contiguous_input(0, prediction);
  energy.contiguous_input(fe::kTarget, target);
  kl.contiguous_input(0, mean);
  kl.contiguous_input(1, logvar);
  if (call.needs & 1) {
    energy.full_gradient(0, prediction, call.inplace ? std::optional(prediction) : std::nullopt);
    energy.scale_rows(fe::row_scales(rows, nullptr, nullptr, how));
  }
  if (call.needs & 2) kl.full_gradient(0, mean);
  if (call.needs & 4) kl.full_gradient(1, logvar);
  if (call.needs & 6) kl.scale_rows(fe::row_scales(rows, nullptr, nullptr, how));
  run({&energy.call(), &kl.call()});
  std::vector<Tensor> results = values(&energy, &kl, rows, nullptr, how, call.beta);
  energy.finish(results);
  kl.finish(results);
  for (const Tensor& result : results) call.take(call.context, result.get());
}

// The same through the dispatcher.
std::vector<Tensor> free_energy_plain_cpu(Tensor prediction, Tensor target, Tensor mean, Tensor logvar,
                                          int64_t likelihood, int64_t reduction, double beta, int64_t needs, bool inplace) {
  std::vector<Tensor> results;
  const auto append = [](void* to, void* handle) { static_cast<std::vector<Tensor>*>(to)->emplace_back(another(handle)); };
  free_energy_plain({another(prediction.get()), another(target.get()), another(mean.get()), another(logvar.get()), likelihood,
                     reduction, beta, needs, inplace, &results, append});
  return results;
}

int64_t free_energy_plain_address() {
  fe::PlainFreeEnergyKernel* kernel = &free_energy_plain;
  return reinterpret_cast<int64_t>(kernel);
}

fe::ReparameterizeCall reparameterize_call(const Tensor& like, const Tensor& logvar, int64_t seed, int64_t stream,
                                           int64_t step, int64_t offset) {
  fe::ReparameterizeCall call{};
  call.elements = logvar.numel();
  call.index = static_cast<uint64_t>(offset) * logvar.size(1);
  call.key = fe::noise_key(seed, static_cast<uint32_t>(step), static_cast<uint32_t>(stream), fe::kLatentSample);
  call.logvar = logvar.const_data_ptr();
  call.dtype = fe::dtype_of(like);
  call.logvar_dtype = fe::dtype_of(logvar);
  return call;
}

void run(const fe::ReparameterizeCall& call, fe::ReparameterizeKernel* kernel) {
  const int64_t grain = std::max<int64_t>(1, fe::kParallelElements / std::max<int64_t>(1, call.samples));
  torch::stable::parallel_for(0, call.elements, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

Tensor reparameterize_cpu(Tensor mean, Tensor logvar, int64_t seed, int64_t stream, int64_t step, int64_t offset,
                          int64_t samples) {
  fe::check_reparameterize(mean, logvar, false, samples, stream, step, offset);
  const int64_t shape[3] = {samples, mean.size(0), mean.size(1)};
  Tensor z = fe::empty_large(mean, {shape, size_t{3}});
  fe::ReparameterizeCall call = reparameterize_call(mean, logvar, seed, stream, step, offset);
  call.samples = samples;
  call.mean = mean.const_data_ptr();
  call.z = z.data_ptr();
  run(call, fe::cpu_kernels().reparameterize);
  return z;
}

std::vector<Tensor> reparameterize_backward_cpu(Tensor grad, Tensor logvar, int64_t seed, int64_t stream, int64_t step,
                                                int64_t offset) {
  fe::check_reparameterize(grad, logvar, true, grad.dim() ? grad.size(0) : 0, stream, step, offset);
  const int64_t shape[2] = {logvar.size(0), logvar.size(1)};
  Tensor grad_mean = fe::empty_large(grad, {shape, size_t{2}}), grad_logvar = fe::empty_large(logvar, logvar.sizes());
  fe::ReparameterizeCall call = reparameterize_call(grad, logvar, seed, stream, step, offset);
  call.samples = grad.size(0);
  call.grad = grad.const_data_ptr();
  call.grad_mean = grad_mean.data_ptr();
  call.grad_logvar = grad_logvar.data_ptr();
  run(call, fe::cpu_kernels().reparameterize_backward);
  return {grad_mean, grad_logvar};
}

void reparameterize_plain(const fe::PlainReparameterize& call) {
  const Tensor operand(static_cast<AtenTensorHandle>(call.operand)), logvar(static_cast<AtenTensorHandle>(call.logvar));
  if (call.backward) {
    for (const Tensor& gradient : reparameterize_backward_cpu(operand, logvar, call.seed, call.stream, call.step, call.offset))
      call.take(call.context, gradient.get());
  } else {
    const Tensor z = reparameterize_cpu(operand, logvar, call.seed, call.stream, call.step, call.offset, call.samples);
    call.take(call.context, z.get());
  }
}

int64_t reparameterize_plain_address() {
  fe::PlainReparameterizeKernel* kernel = &reparameterize_plain;
  return reinterpret_cast<int64_t>(kernel);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fekernels_native, m) {
  m.def(
      "free_energy(Tensor[] params, Tensor? target, Tensor? mask, Tensor[] latent, Tensor? weight, Tensor[] upstream, "
      "int likelihood, int reduction, float beta, int needs, bool inplace, Tensor? latent_mask=None) -> Tensor[]");
  m.def(
      "free_energy.plain(Tensor prediction, Tensor target, Tensor mean, Tensor logvar, int likelihood, int reduction, "
      "float beta, int needs, bool inplace) -> Tensor[]");
  m.def("free_energy.plain_address() -> int");
  m.def("reparameterize.plain_address() -> int");
  m.def(
      "reparameterize(Tensor mean, Tensor logvar, int seed, int stream, int step, int offset, int samples) -> Tensor");
  m.def(
      "reparameterize_backward(Tensor grad, Tensor logvar, int seed, int stream, int step, int offset) -> Tensor[]");
  m.def("poison_empty(bool on) -> ()");  // for tests
  m.def("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()");  // a GPU's; a CPU reads the factor itself
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) {
  m.impl("free_energy", TORCH_BOX(&free_energy_cpu));
  m.impl("free_energy.plain", TORCH_BOX(&free_energy_plain_cpu));
  m.impl("reparameterize", TORCH_BOX(&reparameterize_cpu));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CompositeExplicitAutograd, m) {
  m.impl("poison_empty", TORCH_BOX(&fe::poison_empty));
  m.impl("free_energy.plain_address", TORCH_BOX(&free_energy_plain_address));
  m.impl("reparameterize.plain_address", TORCH_BOX(&reparameterize_plain_address));
}

// PyTorch's own handling of an operator without a gradient does nothing for these, which are called where autograd does
// not record, but takes 2 us.
STABLE_TORCH_LIBRARY_IMPL(fekernels_native, AutogradCPU, m) {
  m.impl("free_energy", TORCH_BOX(&free_energy_cpu));
  m.impl("free_energy.plain", TORCH_BOX(&free_energy_plain_cpu));
}
