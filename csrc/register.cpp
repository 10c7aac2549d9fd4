// With register_*.cpp and large_tensors.cpp the only files that know torch: checks, threading, and registration of the
// kernels under torch.ops.fekernels_native through the LibTorch stable ABI. The public operators of torch.ops.fekernels
// are defined in Python (fekernels/ops) and call these.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "large_tensors.h"
#include "register.h"

#if defined(FE_HAVE_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(FE_HAVE_CUDA)
namespace fe {

// The library is linked without libtorch_cuda, so that it also loads where torch has no CUDA.
void* current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get_stream, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "no current CUDA stream on device ", device);
  return stream;
}

void check_cuda(int error, const char* what) { STD_TORCH_CHECK(error == 0, what, ": CUDA error ", error); }

}  // namespace fe
#endif

namespace {

// The largest t a float32 `step` can count to: adding 1 to 2^24 changes nothing, and the noise would repeat.
constexpr double kFloat32Steps = 16777216.0, kFloat64Steps = 4294967295.0;

double read_scalar(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 1, "a tensor lr, temperature, grad_scale or found_inf must have one element");
  if (tensor.scalar_type() == ScalarType::Double) return *static_cast<const double*>(tensor.const_data_ptr());
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "a tensor lr, temperature, grad_scale or found_inf must be float32 or float64");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

double read_scalar(const std::optional<Tensor>& tensor, double otherwise) {
  return tensor ? read_scalar(*tensor) : otherwise;
}

void check_table(const Tensor& table) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(1) == fe::kTableColumns &&
                      table.is_contiguous(),
                  "table must be a contiguous int64 tensor of shape [rows, ", fe::kTableColumns, "]");
}

// What the kernels are about to follow must be what fekernels/_table.py writes. `operands`: a bit for each tensor that
// the step goes through.
void check_row(const fe::TableRow& row, const int64_t* layouts, int64_t words, uint32_t operands) {
  const auto code = [&](int byte) { return row.dtypes >> 8 * byte & 0xff; };
  bool whole = row.numel >= 0 && row.step != 0 && row.stream >= 0 && row.stream <= 0xffffffff && row.offset >= 0 &&
               row.run >= 1 && row.pitch >= row.run && code(4) <= fe::kFloat64;
  for (int byte = 0; byte < 4; ++byte) whole = whole && code(byte) <= fe::kFloat16;
  for (int operand = 0; operand < fe::kOperands; ++operand)
    whole = whole && (row.numel == 0 || !(operands >> operand & 1u) || row.pointers[operand] != 0);
  if (whole && row.layout != 0) {
    const int64_t at = row.layout - 1;
    whole = at >= 0 && at < words && layouts[at] >= 0 && layouts[at] <= 64 &&
            layouts[at] * (1 + fe::kOperands) < words - at;
    int64_t elements = 1;
    for (int64_t d = 0; whole && d < layouts[at]; ++d) elements *= layouts[at + 1 + d];
    whole = whole && elements == row.numel;
  }
  STD_TORCH_CHECK(whole, "table must hold rows as fekernels._table.PointerTable makes them, with layouts that are theirs");
}

void check_layouts(const Tensor& layouts, const Tensor& table) {
  STD_TORCH_CHECK(layouts.scalar_type() == ScalarType::Long && layouts.dim() == 1 && layouts.is_contiguous() &&
                      layouts.get_device_index() == table.get_device_index(),
                  "layouts must be a contiguous int64 tensor of one dimension, where the table is");
}

uint32_t next_step(const fe::TableRow& row) {
  const bool wide = (row.dtypes >> 32 & 0xff) == fe::kFloat64;
  const double t = wide ? *reinterpret_cast<const double*>(row.step) : *reinterpret_cast<const float*>(row.step);
  STD_TORCH_CHECK(t >= 0.0 && t < (wide ? kFloat64Steps : kFloat32Steps), "step must be below 2^", wide ? 32 : 24,
                  ", where its ", wide ? "noise counter" : "float32 counter", " ends; got ", t);
  return static_cast<uint32_t>(t) + 1;
}

void advance_step(const fe::TableRow& row) {
  if ((row.dtypes >> 32 & 0xff) == fe::kFloat64) {
    *reinterpret_cast<double*>(row.step) += 1.0;
  } else {
    *reinterpret_cast<float*>(row.step) += 1.0f;
  }
}

// Nothing but next_step's refusal, for a step of several tables: none may move where another cannot.
void check_steps_cpu(const Tensor& table) {
  check_table(table);
  const auto* rows = static_cast<const fe::TableRow*>(table.const_data_ptr());
  for (int64_t r = 0; r < table.size(0); ++r) next_step(rows[r]);
}

// What a span needs of its row; the coefficients are the caller's to add.
void describe_row(const fe::TableRow& row, const int64_t* layouts, int64_t seed, uint32_t t, int64_t flags,
                  fe::Span& span) {
  static constexpr int kDtypeByte[fe::kOperands] = {0, 1, 2, 2, 2, 3};
  for (int operand = 0; operand < fe::kOperands; ++operand) {
    span.data[operand] = reinterpret_cast<void*>(row.pointers[operand]);
    span.dtypes[operand] = static_cast<fe::DType>(row.dtypes >> 8 * kDtypeByte[operand] & 0xff);
  }
  span.layout = row.layout ? layouts + row.layout - 1 : nullptr;
  const uint32_t stream = static_cast<uint32_t>(row.stream);
  span.noise = fe::noise_key(seed, t, stream, fe::kLangevinNoise);
  span.rounding = fe::noise_key(seed, t, stream, fe::kStochasticRounding);
  span.stochastic = flags & fe::kStochastic;
}

// Consecutive elements of one row, small enough to be one thread's turn.
struct Piece {
  int64_t row, begin, count;
  uint64_t index;
  int64_t elements_before;  // in all pieces before this one
};

// Cuts all rows into pieces that end where the global index is a multiple of the span size, so that only a parameter's
// or a shard's own ends, not its cuts, miss whole vectors.
int64_t cut_rows(const fe::TableRow* rows, int64_t n_rows, std::vector<Piece>& pieces) {
  int64_t total = 0;
  pieces.clear();
  for (int64_t r = 0; r < n_rows; ++r) {
    const fe::TableRow& row = rows[r];
    for (int64_t begin = 0; begin < row.numel;) {
      const int64_t in_run = begin % row.run;
      const uint64_t index = row.offset + begin / row.run * row.pitch + in_run;
      const int64_t until_cut = fe::kSpanElements - static_cast<int64_t>(index % fe::kSpanElements);
      const int64_t count = std::min({until_cut, row.run - in_run, row.numel - begin});
      pieces.push_back({r, begin, count, index, total});
      total += count;
      begin += count;
    }
  }
  return total;
}

// Runs kernel(span) over all pieces on torch's threads. The cuts, and so the bits, do not depend on how many there are.
template <class RowSpan>
void run_pieces(const std::vector<Piece>& pieces, int64_t elements, const std::vector<RowSpan>& rows,
                void (*kernel)(const RowSpan&)) {
  torch::stable::parallel_for(0, elements, fe::kParallelElements, [&](int64_t begin, int64_t end) {
    const auto starts_before = [](const Piece& piece, int64_t element) { return piece.elements_before < element; };
    auto piece = std::lower_bound(pieces.begin(), pieces.end(), begin, starts_before);
    for (; piece != pieces.end() && piece->elements_before < end; ++piece) {
      RowSpan span = rows[piece->row];
      span.begin = piece->begin;
      span.count = piece->count;
      span.index = piece->index;
      kernel(span);
    }
  });
}

// Both optimizers' steps: `prepare(span, row, t)` adds the row's coefficients and says whether its elements draw noise.
// Nothing changes if a row is refused.
template <class RowSpan, class Prepare>
void step_rows(const Tensor& table, const Tensor& layouts, uint32_t operands, int64_t seed, int64_t flags,
               void (*kernel)(const RowSpan&), Prepare prepare) {
  check_layouts(layouts, table);
  const auto* rows = static_cast<const fe::TableRow*>(table.const_data_ptr());
  const int64_t n_rows = table.size(0);
  // Kept between steps: for many small parameters the allocations would cost as much as the work.
  thread_local std::vector<Piece> pieces;
  thread_local std::vector<RowSpan> spans;
  spans.resize(n_rows);
  for (int64_t r = 0; r < n_rows; ++r) {
    check_row(rows[r], static_cast<const int64_t*>(layouts.const_data_ptr()), layouts.numel(), operands);
    const uint32_t t = next_step(rows[r]);
    describe_row(rows[r], static_cast<const int64_t*>(layouts.const_data_ptr()), seed, t, flags, spans[r]);
    const bool noisy = prepare(spans[r], rows[r], t);
    // What does not ask for an element's logical index may go through memory as it lies.
    if (rows[r].dense && !noisy && !spans[r].stochastic) spans[r].layout = nullptr;
  }
  const int64_t elements = cut_rows(rows, n_rows, pieces);
  run_pieces(pieces, elements, spans, kernel);
  for (int64_t r = 0; r < n_rows; ++r) advance_step(rows[r]);
}

void langevin_adam_table_cpu(const Tensor& table, const Tensor& layouts, const Tensor& chunks, Tensor scratch,
                             double lr, std::optional<Tensor> lr_tensor, double temperature,
                             std::optional<Tensor> temperature_tensor, double beta1, double beta2, double eps,
                             double weight_decay, double prior_precision, int64_t noise, int64_t flags, int64_t seed,
                             std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t dtypes) {
  check_table(table);
  if (found_inf && read_scalar(*found_inf) != 0.0) return;
  const fe::LangevinAdamGroup group{read_scalar(lr_tensor, lr),
                                    read_scalar(temperature_tensor, temperature),
                                    beta1,
                                    beta2,
                                    eps,
                                    weight_decay,
                                    prior_precision,
                                    read_scalar(grad_scale, 1.0),
                                    static_cast<fe::Noise>(noise),
                                    flags};
  STD_TORCH_CHECK(group.lr >= 0.0 && group.temperature >= 0.0, "lr and temperature must not be negative; got ", group.lr,
                  " and ", group.temperature);
  // Most rows are at the same step and in the same unit: their coefficients are computed once.
  const fe::LangevinAdamSpan* last = nullptr;
  uint32_t last_t = 0;
  double last_unit = 0.0;
  const uint32_t operands = 1u << fe::kParam | 1u << fe::kGrad | 1u << fe::kExpAvg | 1u << fe::kExpAvgSq |
                            (flags & fe::kAmsgrad ? 1u << fe::kMaxExpAvgSq : 0u);
  step_rows<fe::LangevinAdamSpan>(table, layouts, operands, seed, flags, fe::cpu_kernels().langevin_adam,
                                  [&](fe::LangevinAdamSpan& span, const fe::TableRow& row, uint32_t t) {
                                    const double unit = row.noise_unit ? *reinterpret_cast<double*>(row.noise_unit) : 0.0;
                                    if (last && last_t == t && last_unit == unit) {
                                      span.single = last->single;
                                      span.wide = last->wide;
                                    } else {
                                      span.single = fe::langevin_adam_coefficients<float>(group, t, unit);
                                      span.wide = fe::langevin_adam_coefficients<double>(group, t, unit);
                                    }
                                    last = &span;
                                    last_t = t;
                                    last_unit = unit;
                                    return span.single.noise != fe::Noise::kNone;
                                  });
  if (!(group.lr > 0.0)) return;
  const double unit = fe::momentum_noise_unit(group.lr, group.temperature, group.beta1, group.noise);
  const auto* rows = static_cast<const fe::TableRow*>(table.const_data_ptr());
  for (int64_t r = 0; r < table.size(0); ++r)
    if (rows[r].noise_unit) *reinterpret_cast<double*>(rows[r].noise_unit) = unit;
}

void sgld_table_cpu(const Tensor& table, const Tensor& layouts, const Tensor& chunks, Tensor scratch, double lr,
                    std::optional<Tensor> lr_tensor, double temperature, std::optional<Tensor> temperature_tensor,
                    double weight_decay, double prior_precision, int64_t flags, int64_t seed,
                    std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t dtypes) {
  check_table(table);
  if (found_inf && read_scalar(*found_inf) != 0.0) return;
  const fe::SgldGroup group{read_scalar(lr_tensor, lr), read_scalar(temperature_tensor, temperature), weight_decay,
                            prior_precision, read_scalar(grad_scale, 1.0), flags};
  STD_TORCH_CHECK(group.lr >= 0.0 && group.temperature >= 0.0, "lr and temperature must not be negative; got ", group.lr,
                  " and ", group.temperature);
  const auto single = fe::sgld_coefficients<float>(group);
  const auto wide = fe::sgld_coefficients<double>(group);
  step_rows<fe::SgldSpan>(table, layouts, 1u << fe::kParam | 1u << fe::kGrad, seed, flags, fe::cpu_kernels().sgld,
                          [&](fe::SgldSpan& span, const fe::TableRow&, uint32_t) {
    span.single = single;
    span.wide = wide;
    return single.noisy;
  });
}

template <fe::Draw kDraw>
void check_draw(const Tensor& out, int64_t stream, int64_t step, int64_t offset, int64_t purpose) {
  constexpr bool kWords = kDraw == fe::Draw::kBits;
  STD_TORCH_CHECK(out.scalar_type() == (kWords ? ScalarType::Int : ScalarType::Float) && out.is_contiguous(),
                  "out must be contiguous and ", kWords ? "int32" : "float32");
  fe::check_key(stream, step, offset, purpose, out.numel());
}

template <fe::Draw kDraw>
void philox_cpu(Tensor out, int64_t seed, int64_t stream, int64_t step, int64_t offset, int64_t purpose) {
  check_draw<kDraw>(out, stream, step, offset, purpose);
  const fe::NoiseKey key = fe::noise_key(seed, static_cast<uint32_t>(step), static_cast<uint32_t>(stream),
                                         static_cast<uint32_t>(purpose));
  char* to = static_cast<char*>(out.mutable_data_ptr());
  fe::FillPhilox* fill = fe::cpu_kernels().fill_philox;
  torch::stable::parallel_for(0, out.numel(), fe::kParallelElements, [&](int64_t begin, int64_t end) {
    fill(kDraw, to + begin * 4, end - begin, static_cast<uint64_t>(offset + begin), key);
  });
}

std::string isa() { return fe::cpu_kernels().isa; }

std::string set_isa(std::string name) {
  fe::select_isa(name.c_str());
  return isa();
}

std::string build_info() {
  std::string info = std::string("compiler ") + __VERSION__;
#if defined(FE_HAVE_CUDA)
  info += ", cuda";
#endif
  return info;
}

#if defined(FE_HAVE_CUDA)

template <class T>
T* address(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

int32_t scalar_dtype(const std::optional<Tensor>& tensor) {
  return tensor && tensor->scalar_type() == ScalarType::Double ? fe::kFloat64 : fe::kFloat32;
}

void check_device_scalar(const std::optional<Tensor>& tensor, const char* name, int32_t device, bool or_double) {
  if (!tensor) return;
  const bool known = tensor->scalar_type() == ScalarType::Float || (or_double && tensor->scalar_type() == ScalarType::Double);
  STD_TORCH_CHECK(known && tensor->numel() == 1 && tensor->get_device_index() == device, name, " must be one float32",
                  or_double ? " or float64" : "", ", where the table is");
}

fe::cuda::StepCall step_call(const Tensor& table, const Tensor& layouts, const Tensor& chunks, const Tensor& scratch,
                             double lr, const std::optional<Tensor>& lr_tensor, double temperature,
                             const std::optional<Tensor>& temperature_tensor, double weight_decay,
                             double prior_precision, int64_t dtypes, int64_t flags, int64_t seed,
                             const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  check_table(table);
  check_layouts(layouts, table);
  const int32_t device = table.get_device_index();
  STD_TORCH_CHECK(chunks.scalar_type() == ScalarType::Int && chunks.dim() == 2 && chunks.size(1) == 2 &&
                      chunks.is_contiguous() && chunks.get_device_index() == device,
                  "chunks must be a contiguous int32 tensor of shape [blocks, 2], where the table is");
  STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Int && scratch.numel() == 1 && scratch.get_device_index() == device,
                  "scratch must be one int32, where the table is");
  check_device_scalar(lr_tensor, "lr_tensor", device, true);
  check_device_scalar(temperature_tensor, "temperature_tensor", device, true);
  check_device_scalar(grad_scale, "grad_scale", device, false);
  check_device_scalar(found_inf, "found_inf", device, false);
  fe::cuda::StepCall call{};
  call.rows = static_cast<const fe::TableRow*>(table.const_data_ptr());
  call.layouts = static_cast<const int64_t*>(layouts.const_data_ptr());
  call.chunks = static_cast<const int32_t*>(chunks.const_data_ptr());
  call.scratch = static_cast<int32_t*>(scratch.mutable_data_ptr());
  call.lr_tensor = address<const void>(lr_tensor);
  call.temperature_tensor = address<const void>(temperature_tensor);
  call.grad_scale = address<const float>(grad_scale);
  call.found_inf = address<const float>(found_inf);
  call.n_rows = table.size(0);
  call.n_chunks = chunks.size(0);
  call.dtypes = dtypes;
  call.flags = flags;
  call.seed = seed;
  call.lr = lr;
  call.temperature = temperature;
  call.weight_decay = weight_decay;
  call.prior_precision = prior_precision;
  call.lr_dtype = scalar_dtype(lr_tensor);
  call.temperature_dtype = scalar_dtype(temperature_tensor);
  return call;
}

void langevin_adam_table_cuda(const Tensor& table, const Tensor& layouts, const Tensor& chunks, Tensor scratch,
                              double lr, std::optional<Tensor> lr_tensor, double temperature,
                              std::optional<Tensor> temperature_tensor, double beta1, double beta2, double eps,
                              double weight_decay, double prior_precision, int64_t noise, int64_t flags, int64_t seed,
                              std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t dtypes) {
  torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  fe::cuda::LangevinAdamCall call{step_call(table, layouts, chunks, scratch, lr, lr_tensor, temperature,
                                            temperature_tensor, weight_decay, prior_precision, dtypes, flags, seed,
                                            grad_scale, found_inf),
                                  beta1,
                                  beta2,
                                  eps,
                                  noise};
  fe::check_cuda(fe_cuda_langevin_adam(&call, fe::current_stream(table.get_device_index())), "langevin_adam_");
}

void sgld_table_cuda(const Tensor& table, const Tensor& layouts, const Tensor& chunks, Tensor scratch, double lr,
                     std::optional<Tensor> lr_tensor, double temperature, std::optional<Tensor> temperature_tensor,
                     double weight_decay, double prior_precision, int64_t flags, int64_t seed,
                     std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t dtypes) {
  torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  const fe::cuda::StepCall call = step_call(table, layouts, chunks, scratch, lr, lr_tensor, temperature,
                                            temperature_tensor, weight_decay, prior_precision, dtypes, flags, seed,
                                            grad_scale, found_inf);
  fe::check_cuda(fe_cuda_sgld(&call, fe::current_stream(table.get_device_index())), "sgld_");
}

template <fe::Draw kDraw>
void philox_cuda(Tensor out, int64_t seed, int64_t stream, int64_t step, int64_t offset, int64_t purpose) {
  check_draw<kDraw>(out, stream, step, offset, purpose);
  torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  void* cuda_stream = fe::current_stream(out.get_device_index());
  void* to = out.mutable_data_ptr();
  const auto fill = [&](auto* function, auto* typed) {
    fe::check_cuda(function(typed, out.numel(), seed, static_cast<uint32_t>(stream), static_cast<uint32_t>(step), offset,
                        static_cast<uint32_t>(purpose), cuda_stream),
               "philox");
  };
  if (kDraw == fe::Draw::kBits) fill(fe::cuda::fe_cuda_philox_bits, static_cast<uint32_t*>(to));
  if (kDraw == fe::Draw::kUniform) fill(fe::cuda::fe_cuda_philox_uniform, static_cast<float*>(to));
  if (kDraw == fe::Draw::kNormal) fill(fe::cuda::fe_cuda_philox_normal, static_cast<float*>(to));
}

#endif

}  // namespace

#define FE_STEP_ARGUMENTS "Tensor table, Tensor layouts, Tensor chunks, Tensor(a!) scratch, "
#define FE_RANDOM_ARGUMENTS "(Tensor(a!) out, int seed, int stream, int step, int offset, int purpose) -> ()"

STABLE_TORCH_LIBRARY(fekernels_native, m) {
  m.def("philox_bits" FE_RANDOM_ARGUMENTS);
  m.def("philox_uniform" FE_RANDOM_ARGUMENTS);
  m.def("philox_normal" FE_RANDOM_ARGUMENTS);
  m.def(
      "langevin_adam_table_(" FE_STEP_ARGUMENTS
      "float lr, Tensor? lr_tensor, float temperature, Tensor? temperature_tensor, float beta1, "
      "float beta2, float eps, float weight_decay, float prior_precision, int noise, int flags, int seed, "
      "Tensor? grad_scale, Tensor? found_inf, int dtypes) -> ()");
  m.def("sgld_table_(" FE_STEP_ARGUMENTS
        "float lr, Tensor? lr_tensor, float temperature, Tensor? temperature_tensor, float weight_decay, "
        "float prior_precision, int flags, int seed, Tensor? grad_scale, Tensor? found_inf, int dtypes) -> ()");
  m.def("check_steps(Tensor table) -> ()");
  m.def("advise_huge_pages(Tensor(a!) fresh) -> ()");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> str");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) {
  m.impl("philox_bits", TORCH_BOX(&philox_cpu<fe::Draw::kBits>));
  m.impl("philox_uniform", TORCH_BOX(&philox_cpu<fe::Draw::kUniform>));
  m.impl("philox_normal", TORCH_BOX(&philox_cpu<fe::Draw::kNormal>));
  m.impl("langevin_adam_table_", TORCH_BOX(&langevin_adam_table_cpu));
  m.impl("sgld_table_", TORCH_BOX(&sgld_table_cpu));
  m.impl("check_steps", TORCH_BOX(&check_steps_cpu));
  m.impl("advise_huge_pages", TORCH_BOX(&fe::advise_huge_pages));
}

// No tensor argument, hence no device's key.
STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("build_info", TORCH_BOX(&build_info));
}

#if defined(FE_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CUDA, m) {
  m.impl("philox_bits", TORCH_BOX(&philox_cuda<fe::Draw::kBits>));
  m.impl("philox_uniform", TORCH_BOX(&philox_cuda<fe::Draw::kUniform>));
  m.impl("philox_normal", TORCH_BOX(&philox_cuda<fe::Draw::kNormal>));
  m.impl("langevin_adam_table_", TORCH_BOX(&langevin_adam_table_cuda));
  m.impl("sgld_table_", TORCH_BOX(&sgld_table_cuda));
}
#endif
