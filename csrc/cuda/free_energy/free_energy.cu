// The host side of the free energy: which kernels run, and where they work. Then the sums over blocks and rows.
#include "cuda/free_energy/free_energy.h"

#include "cuda/kernels.h"
#include "formulas/likelihoods.h"

namespace fe::cuda {
namespace {

constexpr int kFoldThreads = 256;  // as many as there are interleaved partial sums over rows
constexpr int kWarps = kFoldThreads / 32;
constexpr int64_t kMaxFoldBlocks = 1024;
constexpr int kOperandsOfCall = 7;

// A row's sum of what the passes left of its blocks.
struct RowSum {
  const float* totals;    // [rows, blocks]; null: 0
  int64_t blocks;
  const float* upstream;  // of a gradient
  double* values;         // [rows], where they add up over rows, else null
  int64_t out;            // of a gradient: [rows], or [1] when there are values
  int32_t dtype;
};

struct FoldRows {
  RowSum sums[2 + kOperandsOfCall];  // energy, KL, gradients
  int32_t n_sums;
  const float* weight;
  float scale;
  float* out[3];
  int32_t* counter;
  int64_t rows;
  double beta, divisor;
  bool reduced, finishes;  // finishes: there are sums over rows
};

struct FoldColumns {
  const float* partials;  // [row blocks, columns]
  int64_t row_blocks, columns;
  int64_t out;
  int32_t dtype;
};

struct Plan {
  TermPass energy, kl;
  CategoricalPass categorical;
  FoldRows rows;
  FoldColumns columns[kOperandsOfCall];
  int n_columns;
  int64_t bytes;
};

class Planner {
 public:
  explicit Planner(const FreeEnergyCall& call) : call_(call), next_(reinterpret_cast<int64_t>(call.scratch)) {}

  Plan plan() {
    const int64_t begin = next_;
    plan_.rows.counter = take<int32_t>(1);
    plan_.rows.weight = call_.weight;
    plan_.rows.scale = scale();
    for (int i = 0; i < 3; ++i) plan_.rows.out[i] = call_.out[i];
    plan_.rows.rows = call_.rows;
    plan_.rows.beta = call_.beta;
    plan_.rows.reduced = plan_.rows.finishes = call_.reduction != Reduction::kNone;
    plan_.rows.divisor = call_.reduction == Reduction::kMean ? static_cast<double>(call_.rows) : 1.0;
    plan_.rows.n_sums = 2;
    if (call_.n_params > 0) {
      plan_pass(plan_.energy, 0, call_.params, call_.n_params, call_.columns);
      if (categorical()) plan_categorical();
    }
    if (call_.n_latent > 0) plan_pass(plan_.kl, 1, call_.latent, call_.n_latent, call_.latents);
    plan_.bytes = next_ - begin;
    return plan_;
  }

  bool categorical() const { return call_.likelihood == kCategorical; }

 private:
  template <class T>
  T* take(int64_t count) {
    const int64_t at = next_;
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(at);
  }

  float scale() const {
    return call_.reduction == Reduction::kMean ? static_cast<float>(1.0 / static_cast<double>(call_.rows)) : 1.0f;
  }

  void plan_pass(TermPass& pass, int which, const FreeEnergyOperand* operands, int count, int64_t columns) {
    pass.rows = call_.rows;
    pass.columns = columns;
    pass.blocks = (columns + kColumns - 1) / kColumns;
    pass.weight = call_.weight;
    pass.upstream = call_.upstream[which];
    pass.scale = scale();
    pass.counter = plan_.rows.counter;
    pass.totals = take<float>(pass.rows * pass.blocks);
    double* values = plan_.rows.reduced ? take<double>(call_.rows) : nullptr;
    plan_.rows.sums[which] = {pass.totals, pass.blocks, nullptr, values, 0, kFloat32};
    if (which == 0 && categorical()) return;
    pass.vectors = columns % 4 == 0;
    pass.plain = true;
    for (int i = 0; i < count; ++i) {
      plan_input(pass, pass.inputs[i], operands[i]);
      pass.plain = pass.plain && operands[i].dtype == operands[0].dtype;
      plan_gradient(pass, pass.grads[i], operands[i]);
    }
    if (which == 0) {
      plan_input(pass, pass.inputs[kTarget], call_.target);
    }
    pass.mask = which == 0 ? call_.mask : call_.latent_mask;
    pass.mask_stride = which == 0 ? call_.mask_stride : call_.latent_mask_stride;
    pass.plain = pass.plain && pass.vectors && pass.mask == nullptr;
  }

  static void plan_input(TermPass& pass, TermInput& input, const FreeEnergyOperand& operand) {
    const bool per_row = operand.rows == pass.rows;
    input = {reinterpret_cast<int64_t>(operand.data), per_row ? operand.row_stride : 0,
             operand.columns == pass.columns, operand.dtype};
    if (input.per_column) {
      const bool rows_align = !per_row || pass.rows <= 1 || operand.row_stride % 4 == 0;
      pass.vectors = pass.vectors && rows_align && takes_fours(input.data, operand.dtype);
    }
    pass.plain = pass.plain && input.per_column;
  }

  void plan_gradient(TermPass& pass, TermGrad& grad, const FreeEnergyOperand& operand) {
    const int64_t out = reinterpret_cast<int64_t>(operand.gradient);
    grad = {out, GradKind::kNone, operand.dtype, 0};
    if (out == 0) return;
    const bool per_row = operand.rows == pass.rows, per_column = operand.columns == pass.columns;
    if (per_row && per_column) {
      grad.kind = GradKind::kFull;
      pass.vectors = pass.vectors && takes_fours(out, operand.dtype);
      return;
    }
    pass.plain = false;
    if (per_column) {
      const int64_t row_blocks = (pass.rows + kRowBlock - 1) / kRowBlock;
      float* partials = take<float>(row_blocks * pass.columns);
      int slot = 0;
      for (const TermGrad& other : pass.grads) slot += &other != &grad && other.kind == GradKind::kColumn;
      grad = {reinterpret_cast<int64_t>(partials), GradKind::kColumn, operand.dtype, slot};
      pass.any_columns = true;
      plan_.columns[plan_.n_columns++] = {partials, row_blocks, pass.columns, out, operand.dtype};
    } else {
      float* sums = take<float>(pass.rows * pass.blocks);
      double* values = per_row ? nullptr : take<double>(pass.rows);
      grad = {reinterpret_cast<int64_t>(sums), GradKind::kSum, operand.dtype, 0};
      plan_.rows.sums[plan_.rows.n_sums++] = {sums, pass.blocks, pass.upstream, values, out, operand.dtype};
      plan_.rows.finishes = plan_.rows.finishes || !per_row;
    }
  }

  // Its energies first, [rows, positions], and then the pass that sums them.
  void plan_categorical() {
    TermPass& pass = plan_.energy;
    float* energies = take<float>(call_.rows * call_.columns);
    const FreeEnergyOperand& logits = call_.params[0];
    plan_.categorical = {reinterpret_cast<int64_t>(logits.data), reinterpret_cast<int64_t>(logits.gradient),
                         static_cast<const int64_t*>(call_.target.data), call_.mask, call_.weight, call_.upstream[0],
                         energies, call_.rows * call_.columns, call_.columns, call_.classes, logits.dtype, scale()};
    plan_.categorical.vectors = call_.classes % 4 == 0 && takes_fours(plan_.categorical.logits, logits.dtype) &&
                                takes_fours(plan_.categorical.grad, logits.dtype);
    pass.inputs[0] = {reinterpret_cast<int64_t>(energies), call_.columns, true, kFloat32};
    pass.vectors = call_.columns % 4 == 0;
  }

  const FreeEnergyCall& call_;
  int64_t next_;
  Plan plan_{};
};

// Of a whole warp, which has one row.
FE_DEVICE double row_sum(const RowSum& sum, int64_t row) {
  const int lane = threadIdx.x % 32;
  double result = 0.0;
  for (int64_t first = 0; first < sum.blocks; first += kBlocks) {
    const int64_t block = first + lane;
    double total = block < sum.blocks ? static_cast<double>(sum.totals[row * sum.blocks + block]) : 0.0;
#pragma unroll
    for (int width = kBlocks / 2; width > 0; width /= 2) total += __shfl_xor_sync(0xffffffffu, total, width);
    result = first == 0 ? total : result + total;
  }
  return result;
}

struct Partials {
  double at[kFoldThreads];
  bool last;
};

// The sum over rows, in thread 0.
FE_DEVICE double sum_over_rows(const double* values, int64_t rows, Partials& shared) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < rows; row += kFoldThreads) sum += __ldcg(values + row);
  shared.at[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kFoldThreads / 2; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) shared.at[threadIdx.x] += shared.at[threadIdx.x + width];
    __syncthreads();
  }
  const double total = shared.at[0];
  __syncthreads();
  return total;
}

FE_DEVICE void fold_row(const FoldRows& call, int64_t row) {
  double values[2] = {};
  for (int s = 0; s < call.n_sums; ++s) {
    const RowSum& sum = call.sums[s];
    if (sum.totals == nullptr) continue;
    float factor = call.weight ? call.weight[row] : 1.0f;
    if (s >= 2) factor = row_scale(call.weight, sum.upstream, call.scale, row);
    const double value = row_sum(sum, row) * static_cast<double>(factor);
    if (s == 0) values[0] = value;
    if (s == 1) values[1] = value;
    if (threadIdx.x % 32 != 0) continue;
    if (sum.values) {
      sum.values[row] = value;
    } else if (sum.out != 0) {
      store_float(sum.dtype, sum.out, row, static_cast<float>(value));
    }
  }
  if (call.reduced || threadIdx.x % 32 != 0) return;
  call.out[0][row] = static_cast<float>(values[0] + call.beta * values[1]);
  call.out[1][row] = static_cast<float>(values[0]);
  call.out[2][row] = static_cast<float>(values[1]);
}

// A warp takes a row at a time; the last block to end adds up over rows.
__global__ void __launch_bounds__(kFoldThreads, 4) fold_rows_kernel(const FoldRows call) {
  FE_SHARED(Partials, shared);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < call.rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    fold_row(call, row);
  }
  if (!call.finishes) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.last = gridDim.x == 1 || atomicAdd(call.counter, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  double results[2] = {};
  for (int s = 0; s < call.n_sums; ++s) {
    const RowSum& sum = call.sums[s];
    if (sum.values == nullptr) continue;
    const double total = sum_over_rows(sum.values, call.rows, shared);
    if (s == 0) results[0] = total;
    if (s == 1) results[1] = total;
    if (s >= 2 && threadIdx.x == 0) store_float(sum.dtype, sum.out, 0, static_cast<float>(total));
  }
  if (!call.reduced || threadIdx.x != 0) return;
  for (double& result : results) result /= call.divisor;  // of no rows: NaN
  *call.out[0] = static_cast<float>(results[0] + call.beta * results[1]);
  *call.out[1] = static_cast<float>(results[0]);
  *call.out[2] = static_cast<float>(results[1]);
}

__global__ void __launch_bounds__(kFoldThreads) fold_columns_kernel(const FoldColumns call) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (column >= call.columns) return;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t b = 0; b < call.row_blocks; ++b) sum += static_cast<double>(call.partials[b * call.columns + column]);
  store_float(call.dtype, call.out, column, static_cast<float>(sum));
}

int launch_terms(int32_t term, const TermPass& pass, void* stream) {
  TermFile file = TermFile::memory_bound;
  Likelihoods::visit(term, [&]<template <class> class Term>() { file = file_of<Term>(); });
  switch (file) {
    case TermFile::count_likelihoods: return launch_count_likelihoods(term, pass, stream);
    case TermFile::compute_bound: return launch_compute_bound(term, pass, stream);
    default: return launch_memory_bound(term, pass, stream);
  }
}

int run(const FreeEnergyCall& call, void* stream) {
  Planner planner(call);
  const Plan plan = planner.plan();
  const bool any_energy = call.n_params > 0 && call.rows > 0 && call.columns > 0;
  const bool any_kl = call.n_latent > 0 && call.rows > 0 && call.latents > 0;
  int error = 0;
  if (any_energy && planner.categorical()) error = launch_categorical(plan.categorical, stream);
  if (any_energy && error == 0) {
    const int32_t term = planner.categorical() ? kValue : call.likelihood;
    error = launch_terms(term, plan.energy, stream);
  }
  if (any_kl && error == 0) {
    error = launch_terms(call.n_latent == 2 ? kStandardNormalKl : kNormalKl, plan.kl, stream);
  }
  for (int i = 0; i < plan.n_columns && error == 0; ++i) {
    const FoldColumns& columns = plan.columns[i];
    if (columns.columns == 0) continue;
    const int64_t blocks = (columns.columns + kFoldThreads - 1) / kFoldThreads;
    error = launch(fold_columns_kernel, blocks, kFoldThreads, columns, stream);
  }
  if (error != 0) return error;
  // Without a pass nothing has cleared the counter: one block needs none.
  const int64_t wanted = any_energy || any_kl ? (call.rows + kWarps - 1) / kWarps : 1;
  return launch(fold_rows_kernel, wanted < kMaxFoldBlocks ? wanted : kMaxFoldBlocks, kFoldThreads, plan.rows, stream);
}

}  // namespace

extern "C" int64_t fe_cuda_free_energy_scratch(const FreeEnergyCall* call) {
  FreeEnergyCall sized = *call;
  sized.scratch = nullptr;
  return Planner(sized).plan().bytes;
}

extern "C" int fe_cuda_free_energy(const FreeEnergyCall* call, void* stream) { return run(*call, stream); }

}  // namespace fe::cuda
