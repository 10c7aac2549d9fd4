// The kernel of a table for an operation that is one formula over its operands, as DrawFormula of
// formulas/variational_draw.h. One launch goes through every row: a block takes one chunk of one row.
#pragma once

#include "cuda/optimizers/table_rows.h"

namespace fe::cuda {

// The parameter, the gradient and the anchor have kParamType, the states kStateType.
template <class Operation, class Formula, class Settings, DType kParamType, DType kStateType>
struct FormulaKernel {
  using S = Math<kParamType>;
  using Call = OptimizerCall<Settings>;
  using Coefficients = decltype(Operation::template coefficients<S>(Settings{}, 1.0, 1u, 0.0));
  static constexpr int kSize = 4;  // elements that share a Philox call
  static constexpr uint32_t kUsed = Formula::kLoaded | Formula::kSaved;

  struct Shared {
    SharedWork work;
    Coefficients coefficients;
    NoiseKey noise;
  };

  static FE_DEVICE constexpr bool is_state(int operand) { return operand == kExpAvg || operand == kExpAvgSq || operand == kMaxExpAvgSq; }
  static FE_DEVICE constexpr bool loads(int operand) { return Formula::kLoaded >> operand & 1u; }
  static FE_DEVICE constexpr bool saves(int operand) { return Formula::kSaved >> operand & 1u; }

  // Those of the unused operands are never touched, and so take no register.
  struct Operands {
    Vector<kParamType, kSize> of_param[kOperands];
    Vector<kStateType, kSize> of_state[kOperands];

    FE_DEVICE void load(const TableRow& row, int64_t index) {
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
        if (!loads(operand)) continue;
        if (is_state(operand)) {
          of_state[operand].load(row.pointers[operand], index);
        } else {
          of_param[operand].load(row.pointers[operand], index);
        }
      }
    }
    FE_DEVICE void store(const TableRow& row, int64_t index) const {
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
        if (!saves(operand)) continue;
        if (is_state(operand)) {
          of_state[operand].store(row.pointers[operand], index);
        } else {
          of_param[operand].store(row.pointers[operand], index);
        }
      }
    }
    FE_DEVICE S get(int operand, int i) const {
      return is_state(operand) ? static_cast<S>(of_state[operand].get(i)) : of_param[operand].get(i);
    }
    FE_DEVICE void set(int operand, int i, S value) {
      if (is_state(operand)) {
        of_state[operand].set(i, value, {false, 0u});
      } else {
        of_param[operand].set(i, value, {false, 0u});
      }
    }
  };

  static FE_DEVICE void update(S* x, S normal, const Coefficients& c) {
    if constexpr (Formula::kFollows && kBytes<kParamType> == 2) {
      const float rounded = widen<kParamType>(narrow<kParamType>(x[kExpAvg], {false, 0u}));
      if (Lane<float>::bits(rounded) != Lane<float>::bits(x[kParam])) x[kExpAvg] = x[kParam];
    }
    Formula::template update<S>(x, normal, c);
  }

  static FE_DEVICE void update_vectors(const SharedWork& work, Operands& ahead, const Coefficients& c, const NoiseKey& key) {
    const TableRow& row = work.row;
    for (int u = static_cast<int>(threadIdx.x); u < work.vectors; u += kThreads) {
      const int64_t index = work.first + static_cast<int64_t>(u) * kSize;
      Operands now = ahead;
      if (u + kThreads < work.vectors) ahead.load(row, index + kThreads * kSize);
      Normals<float> n{};
      if (Formula::kNoise) n = normals_of_block(static_cast<uint64_t>(row.offset + index) / 4, key);
      const float normals[4] = {n.x, n.y, n.z, n.w};
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        S x[kOperands] = {};
#pragma unroll
        for (int operand = 0; operand < kOperands; ++operand)
          if (loads(operand)) x[operand] = now.get(operand, i);
        update(x, static_cast<S>(normals[i]), c);
#pragma unroll
        for (int operand = 0; operand < kOperands; ++operand)
          if (saves(operand)) now.set(operand, i, x[operand]);
      }
      now.store(row, index);
    }
  }

  // The rest, one element at a time: any layout, shard and alignment.
  static FE_DEVICE void update_elements(const SharedWork& work, const int64_t* layouts, const Coefficients& c,
                                        const NoiseKey& key) {
    const TableRow& row = work.row;
    const int anchor_type = static_cast<int>(row.dtypes >> 24 & 0xff);
    for (int e = work.vectors * kSize + static_cast<int>(threadIdx.x); e < work.count; e += kThreads) {
      const Offsets p = offsets(row, layouts, work.first + e);
      S x[kOperands] = {};
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
        if (!loads(operand)) continue;
        if (operand == kAnchor) {
          x[operand] = load_any<S>(anchor_type, row.pointers[operand], p.at[operand]);
        } else if (is_state(operand)) {
          x[operand] = static_cast<S>(load_element<kStateType>(row.pointers[operand], p.at[operand]));
        } else {
          x[operand] = load_element<kParamType>(row.pointers[operand], p.at[operand]);
        }
      }
      const S normal = Formula::kNoise ? static_cast<S>(normal_of(global_index(row, work.first + e), key)) : S(0);
      update(x, normal, c);
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
        if (!saves(operand)) continue;
        if (is_state(operand)) {
          store_element<kStateType>(row.pointers[operand], p.at[operand], x[operand], {false, 0u});
        } else {
          store_element<kParamType>(row.pointers[operand], p.at[operand], x[operand], {false, 0u});
        }
      }
    }
  }

  static FE_DEVICE void run(const Call& call, Shared& shared) {
    Operands ahead{};
    {
      const Work work = block_work(call.step);
      const int vectors = work.count > 0 && takes_vectors<kParamType, kSize>(*work.row) ? work.count / kSize : 0;
      if (static_cast<int>(threadIdx.x) < vectors) {
        ahead.load(*work.row, work.first + static_cast<int64_t>(threadIdx.x) * kSize);
      }
      share_work(work, vectors, shared.work);
      if (threadIdx.x == 0) prepare(call, work.row, shared);
    }
    __syncthreads();

    const SharedWork& work = shared.work;
    if (threadIdx.x == 0) shared.work.last = is_last_block(call.step);
    if (!work.scalars.skip && work.count > 0) {
      const Coefficients c = shared.coefficients;
      const NoiseKey key = shared.noise;
      update_vectors(work, ahead, c, key);
      update_elements(work, call.step.layouts, c, key);
    }

    __syncthreads();
    if (work.last) finish(call.step, work.scalars.skip || !Operation::kAdvances);
  }

  static FE_DEVICE void prepare(const Call& call, const TableRow* row, Shared& shared) {
    const Scalars s = read_scalars(call.step, call.settings, row);
    Settings settings = call.settings;
    settings.lr = s.lr;
    settings.temperature = s.temperature;
    shared.work.scalars = s;
    const int64_t at = row == nullptr ? 0 : row->noise_unit;
    const double unit = at == 0 ? 0.0 : *reinterpret_cast<const double*>(at);
    shared.coefficients = Operation::template coefficients<S>(settings, s.grad_scale, s.t, unit);
    const uint32_t stream = row == nullptr ? 0u : static_cast<uint32_t>(row->stream);
    shared.noise = noise_key(call.step.seed, Operation::noise_step(s.t, unit), stream, Operation::kNoise);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(kThreads, sizeof(typename Kernel::S) == 8 ? 3 : 5) formula_kernel(const typename Kernel::Call call) {
  FE_SHARED(typename Kernel::Shared, shared);
  Kernel::run(call, shared);
}

// By the dtypes of parameter, gradient and states: all alike, or 16-bit parameters with float32 states, for which
// RoundedFormula stands in. Null where there is none.
template <class Operation, class Settings, class Formula, class RoundedFormula>
auto formula_kernel_for(int64_t dtypes) -> void (*)(OptimizerCall<Settings>) {
  const int64_t param = dtypes & 0xff, grad = dtypes >> 8 & 0xff, state = dtypes >> 16 & 0xff;
  if (param != grad) return nullptr;
  switch (param << 8 | state) {
    case kFloat32 << 8 | kFloat32:
      return formula_kernel<FormulaKernel<Operation, Formula, Settings, kFloat32, kFloat32>>;
    case kFloat64 << 8 | kFloat64:
      return formula_kernel<FormulaKernel<Operation, Formula, Settings, kFloat64, kFloat64>>;
    case kBFloat16 << 8 | kFloat32:
      return formula_kernel<FormulaKernel<Operation, RoundedFormula, Settings, kBFloat16, kFloat32>>;
    case kFloat16 << 8 | kFloat32:
      return formula_kernel<FormulaKernel<Operation, RoundedFormula, Settings, kFloat16, kFloat32>>;
    default:
      return nullptr;
  }
}

template <class Settings>
int launch_formula(void (*kernel)(OptimizerCall<Settings>), const OptimizerCall<Settings>& call, void* stream) {
  if (kernel == nullptr) return static_cast<int>(cudaErrorInvalidValue);
  const int64_t blocks = call.step.n_chunks > 0 ? call.step.n_chunks : 1;
  return launch(kernel, blocks, kThreads, call, stream);
}

}  // namespace fe::cuda
