// The optimizers' steps over a pointer table, for every operation of formulas/optimizers.def.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "torch/registration.h"

#if defined(FE_HAVE_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// What the kernels are about to follow must be what fekernels/_runtime/pointer_table.py writes. `operands`: a bit for each tensor that
// the step goes through.
void check_row(const fe::TableRow& row, const int64_t* layouts, int64_t words, uint32_t operands) {
  const auto code = [&](int byte) { return row.dtypes >> 8 * byte & 0xff; };
  bool whole = row.numel >= 0 && row.step != 0 && row.stream >= 0 && row.stream <= 0xffffffff && row.offset >= 0 &&
               row.length >= 1 && row.pitch >= row.length && code(4) <= fe::kFloat64;
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
  STD_TORCH_CHECK(whole, "table must hold rows as fekernels._runtime.pointer_table.PointerTable makes them, with layouts that are theirs");
}

void check_layouts(const Tensor& layouts, const Tensor& table) {
  STD_TORCH_CHECK(layouts.scalar_type() == ScalarType::Long && layouts.dim() == 1 && layouts.is_contiguous() &&
                      layouts.get_device_index() == table.get_device_index(),
                  "layouts must be a contiguous int64 tensor of one dimension, where the table is");
}

uint32_t next_step(const fe::TableRow& row) {
  const bool double_step = (row.dtypes >> 32 & 0xff) == fe::kFloat64;
  const double t = double_step ? *reinterpret_cast<const double*>(row.step) : *reinterpret_cast<const float*>(row.step);
  STD_TORCH_CHECK(t >= 0.0 && t < (double_step ? kFloat64Steps : kFloat32Steps), "step must be below 2^", double_step ? 32 : 24,
                  ", where its ", double_step ? "noise counter" : "float32 counter", " ends; got ", t);
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
                  uint32_t noise_step, fe::Purpose purpose, fe::Span& span) {
  static constexpr int kDtypeByte[fe::kOperands] = {0, 1, 2, 2, 2, 3};
  for (int operand = 0; operand < fe::kOperands; ++operand) {
    span.data[operand] = reinterpret_cast<void*>(row.pointers[operand]);
    span.dtypes[operand] = static_cast<fe::DType>(row.dtypes >> 8 * kDtypeByte[operand] & 0xff);
  }
  span.layout = row.layout ? layouts + row.layout - 1 : nullptr;
  const uint32_t stream = static_cast<uint32_t>(row.stream);
  span.noise = fe::noise_key(seed, noise_step, stream, purpose);
  span.rounding = fe::noise_key(seed, t, stream, fe::kStochasticRounding);
  span.stochastic = flags & fe::kStochastic;
}

// Consecutive elements of one row, small enough for one thread's task.
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
      const int64_t in_piece = begin % row.length;
      const uint64_t index = row.offset + begin / row.length * row.pitch + in_piece;
      const int64_t until_cut = fe::kSpanElements - static_cast<int64_t>(index % fe::kSpanElements);
      const int64_t count = std::min({until_cut, row.length - in_piece, row.numel - begin});
      pieces.push_back({r, begin, count, index, total});
      total += count;
      begin += count;
    }
  }
  return total;
}

// Runs run(piece) over all pieces on torch's threads. The cuts, and so the bits, do not depend on how many there are.
template <class Run>
void run_pieces(const std::vector<Piece>& pieces, int64_t elements, const Run& run) {
  torch::stable::parallel_for(0, elements, fe::kParallelElements, [&](int64_t begin, int64_t end) {
    const auto starts_before = [](const Piece& piece, int64_t element) { return piece.elements_before < element; };
    auto piece = std::lower_bound(pieces.begin(), pieces.end(), begin, starts_before);
    for (; piece != pieces.end() && piece->elements_before < end; ++piece) run(*piece);
  });
}

// The row of float64 as an operation's settings, which is all that they are.
template <class Settings>
Settings settings_of(const std::vector<double>& row) {
  static_assert(std::is_trivially_copyable_v<Settings> && sizeof(Settings) % sizeof(double) == 0);
  STD_TORCH_CHECK(row.size() * sizeof(double) == sizeof(Settings), "settings must hold ",
                  sizeof(Settings) / sizeof(double), " numbers; got ", row.size());
  Settings settings;
  std::memcpy(&settings, row.data(), sizeof settings);
  return settings;
}

// What the two devices need of an operation: its description in csrc/formulas, by inheritance, and its entries.
#if defined(FE_HAVE_CUDA)
#define FE_CUDA_ENTRY(Name, name)        \
  using Call = fe::cuda::Name##Call;     \
  static constexpr auto kCudaStep = &fe::cuda::fe_cuda_##name;
#else
#define FE_CUDA_ENTRY(Name, name)
#endif
#define FE_OPTIMIZER(Name, name)                                \
  struct Name : fe::Name {                                      \
    static constexpr const char* kName = #name "_";             \
    static constexpr auto kKernel = &fe::CpuKernels::name;      \
    using Settings = fe::Name##Settings;                        \
    using Span = fe::Name##Span;                                \
    FE_CUDA_ENTRY(Name, name)                                   \
  };
#include "formulas/optimizers.def"

// Nothing changes if a row is refused.
template <class Operation>
void step_cpu(const Tensor& table, const Tensor& layouts, const Tensor& chunks, Tensor scratch,
              std::vector<double> row_of_settings, std::optional<Tensor> lr_tensor,
              std::optional<Tensor> temperature_tensor, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
              int64_t seed, int64_t dtypes) {
  using Span = typename Operation::Span;
  check_table(table);
  if (found_inf && read_scalar(*found_inf) != 0.0) return;
  auto settings = settings_of<typename Operation::Settings>(row_of_settings);
  settings.lr = read_scalar(lr_tensor, settings.lr);
  settings.temperature = read_scalar(temperature_tensor, settings.temperature);
  const double scale = read_scalar(grad_scale, 1.0);
  STD_TORCH_CHECK(settings.lr >= 0.0 && settings.temperature >= 0.0, "lr and temperature must not be negative; got ",
                  settings.lr, " and ", settings.temperature);
  check_layouts(layouts, table);
  const auto* rows = static_cast<const fe::TableRow*>(table.const_data_ptr());
  const auto* words = static_cast<const int64_t*>(layouts.const_data_ptr());
  const int64_t n_rows = table.size(0), n_words = layouts.numel();
  const uint32_t operands = Operation::operands(settings);
  // Kept between steps: for many small parameters the allocations would cost as much as the work.
  thread_local std::vector<Piece> pieces;
  thread_local std::vector<Span> spans;
  spans.resize(n_rows);
  uint32_t last_t = 0;
  double last_unit = 0.0;
  for (int64_t r = 0; r < n_rows; ++r) {
    const fe::TableRow& row = rows[r];
    Span& span = spans[r];
    check_row(row, words, n_words, operands);
    const uint32_t t = next_step(row);
    const double unit = row.noise_unit ? *reinterpret_cast<const double*>(row.noise_unit) : 0.0;
    describe_row(row, words, seed, t, static_cast<int64_t>(settings.flags), Operation::noise_step(t, unit),
                 Operation::kNoise, span);
    // Most rows are at the same step and in the same unit: their coefficients are computed once.
    if (r > 0 && last_t == t && last_unit == unit) {
      span.single = spans[r - 1].single;
      span.for_double = spans[r - 1].for_double;
    } else {
      span.single = Operation::template coefficients<float>(settings, scale, t, unit);
      span.for_double = Operation::template coefficients<double>(settings, scale, t, unit);
    }
    last_t = t;
    last_unit = unit;
    // What does not ask for an element's logical index may go through memory as it lies.
    if (row.dense && !Operation::numbered(settings) && !span.stochastic) span.layout = nullptr;
  }
  const int64_t elements = cut_rows(rows, n_rows, pieces);
  const auto kernel = fe::cpu_kernels().*Operation::kKernel;
  // By a name of its own: every thread has other `spans`.
  run_pieces(pieces, elements, [kernel, &of_rows = std::as_const(spans)](const Piece& piece) {
    Span span = of_rows[piece.row];
    span.begin = piece.begin;
    span.count = piece.count;
    span.index = piece.index;
    kernel(span);
  });
  const double unit = Operation::noise_unit(settings);
  for (int64_t r = 0; r < n_rows; ++r) {
    if (Operation::kWritesUnit && settings.lr > 0.0 && rows[r].noise_unit) *reinterpret_cast<double*>(rows[r].noise_unit) = unit;
    if (Operation::kAdvances) advance_step(rows[r]);
  }
}

// The means of draws back into their parameters, which is a copy, on all threads. False, and nothing is written, where a row
// has gaps or its parameter another dtype than its mean.
bool restore_means_cpu(const Tensor& table) {
  check_table(table);
  const auto* rows = static_cast<const fe::TableRow*>(table.const_data_ptr());
  for (int64_t r = 0; r < table.size(0); ++r) {
    const int64_t param = rows[r].dtypes & 0xff, states = rows[r].dtypes >> 16 & 0xff;
    if (rows[r].layout != 0 || param != fe::kFloat32 || states != fe::kFloat32) return false;
    check_row(rows[r], nullptr, 0, 1u << fe::kParam | 1u << fe::kExpAvg);
  }
  thread_local std::vector<Piece> pieces;
  const int64_t elements = cut_rows(rows, table.size(0), pieces);
  run_pieces(pieces, elements, [&](const Piece& piece) {
    const auto* mean = reinterpret_cast<const float*>(rows[piece.row].pointers[fe::kExpAvg]) + piece.begin;
    std::memcpy(reinterpret_cast<float*>(rows[piece.row].pointers[fe::kParam]) + piece.begin, mean, piece.count * sizeof(float));
  });
  return true;
}

// Segments are added in a tree, as those of a free energy's row: pairs of neighbours, then of pairs.
double tree(const double* sums, int64_t count) {
  if (count == 1) return sums[0];
  int64_t half = 1;
  while (2 * half < count) half *= 2;
  return tree(sums, half) + tree(sums + half, count - half);
}

Tensor variational_kl_cpu(const Tensor& mean, const Tensor& spread, double ess, double weight_decay, double temperature,
                          bool deviations) {
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && spread.scalar_type() == ScalarType::Float &&
                      mean.is_contiguous() && spread.is_contiguous() && mean.numel() == spread.numel(),
                  "mean and spread must be contiguous float32 of one size");
  const double prior_precision = ess * weight_decay;
  fe::VariationalKlCall call{static_cast<const float*>(mean.const_data_ptr()), static_cast<const float*>(spread.const_data_ptr()),
                             mean.numel(),
                             {static_cast<float>(std::sqrt(prior_precision)), static_cast<float>(prior_precision),
                              static_cast<float>(weight_decay), static_cast<float>((temperature - 1.0) * weight_decay), deviations},
                             nullptr};
  const int64_t segments = call.segments();
  std::vector<double> sums(2 * segments);
  call.sums = sums.data();
  torch::stable::parallel_for(0, segments, fe::kParallelElements / fe::kKlSegment, [&](int64_t begin, int64_t end) {
    fe::cpu_kernels().variational_kl(call, begin, end);
  });
  std::vector<double> each(segments);
  const int64_t size[1] = {2};
  Tensor out = torch::stable::empty({size, size_t{1}}, ScalarType::Double);
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t which = 0; which < 2; ++which) {
    for (int64_t i = 0; i < segments; ++i) each[i] = sums[2 * i + which];
    to[which] = segments ? tree(each.data(), segments) : 0.0;
  }
  to[0] *= 0.5;
  return out;
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
                             const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& temperature_tensor,
                             const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                             int64_t flags, int64_t seed, int64_t dtypes) {
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
  call.lr_dtype = scalar_dtype(lr_tensor);
  call.temperature_dtype = scalar_dtype(temperature_tensor);
  return call;
}

template <class Operation>
void step_cuda(const Tensor& table, const Tensor& layouts, const Tensor& chunks, Tensor scratch,
               std::vector<double> row, std::optional<Tensor> lr_tensor, std::optional<Tensor> temperature_tensor,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t seed, int64_t dtypes) {
  torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  const auto settings = settings_of<typename Operation::Settings>(row);
  const typename Operation::Call call{
      step_call(table, layouts, chunks, scratch, lr_tensor, temperature_tensor, grad_scale, found_inf,
                static_cast<int64_t>(settings.flags), seed, dtypes),
      settings};
  fe::check_cuda(Operation::kCudaStep(&call, fe::current_stream(table.get_device_index())), Operation::kName);
}

#endif

}  // namespace

#define FE_STEP_ARGUMENTS \
  "(Tensor table, Tensor layouts, Tensor chunks, Tensor(a!) scratch, float[] settings, Tensor? lr_tensor, " \
  "Tensor? temperature_tensor, Tensor? grad_scale, Tensor? found_inf, int seed, int dtypes) -> ()"

STABLE_TORCH_LIBRARY_FRAGMENT(fekernels_native, m) {
#define FE_OPTIMIZER(Name, name) m.def(#name "_" FE_STEP_ARGUMENTS);
#include "formulas/optimizers.def"
  m.def("check_steps(Tensor table) -> ()");
  m.def("restore_means(Tensor table) -> bool");
  m.def(
      "variational_kl(Tensor mean, Tensor spread, float ess, float weight_decay, float temperature, bool deviations) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) {
#define FE_OPTIMIZER(Name, name) m.impl(#name "_", TORCH_BOX(&step_cpu<Name>));
#include "formulas/optimizers.def"
  m.impl("check_steps", TORCH_BOX(&check_steps_cpu));
  m.impl("restore_means", TORCH_BOX(&restore_means_cpu));
  m.impl("variational_kl", TORCH_BOX(&variational_kl_cpu));
}

#if defined(FE_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CUDA, m) {
#define FE_OPTIMIZER(Name, name) m.impl(#name "_", TORCH_BOX(&step_cuda<Name>));
#include "formulas/optimizers.def"
}
#endif
