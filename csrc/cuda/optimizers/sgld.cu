// One launch updates every parameter of the table: a block takes one chunk of one row. No state, hence less to move and
// no powers to compute; the rest is as in langevin_adam.cu.
#include "formulas/sgld.h"

#include "cuda/optimizers/table_rows.h"

namespace fe::cuda {
namespace {

template <class S>
struct Shared {
  SharedWork work;
  SgldCoefficients<S> coefficients;
};

template <DType kParamType>
struct Kernel {
  using S = Math<kParamType>;
  using Coefficients = SgldCoefficients<S>;
  static constexpr int kSize = kBytes<kParamType> == 2 ? 8 : 4;
  static constexpr bool kRounds = kParamType == kBFloat16;

  struct Operands {
    Vector<kParamType, kSize> param, grad;

    FE_DEVICE void load(const TableRow& row, int64_t index) {
      param.load(row.pointers[kParam], index);
      grad.load(row.pointers[kGrad], index);
    }
  };

  template <bool kNoisy, bool kExtras>
  static FE_DEVICE void update_vectors(const SharedWork& work, Operands& ahead, const Coefficients& c, const Keys& keys) {
    const TableRow& row = work.row;
    for (int u = static_cast<int>(threadIdx.x); u < work.vectors; u += kThreads) {
      const int64_t index = work.first + static_cast<int64_t>(u) * kSize;
      Operands now = ahead;
      if (u + kThreads < work.vectors) ahead.load(row, index + kThreads * kSize);
      Vector<kParamType, kSize> anchor_vector{};
      if (kExtras && c.prior && row.pointers[kAnchor] != 0) anchor_vector.load(row.pointers[kAnchor], index);

      const uint64_t block = static_cast<uint64_t>(row.offset + index) / 4;
#pragma unroll
      for (int group = 0; group < kSize; group += 4) {
        Normals<float> n{};
        if (kNoisy) n = normals_of_block(block + group / 4, keys.noise);
        const float normals[4] = {n.x, n.y, n.z, n.w};
        Words<uint32_t> w{};
        if (kRounds && keys.stochastic) w = words_of_block(block + group / 4, keys.rounding);
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int i = group + k;
          S param = now.param.get(i);
          sgld<kNoisy, kExtras, S>(param, now.grad.get(i), anchor_vector.get(i), static_cast<S>(normals[k]), c);
          now.param.set(i, param, {keys.stochastic, words[k] & 0xffffu});
        }
      }
      now.param.store(row.pointers[kParam], index);
    }
  }

  static FE_DEVICE void update_elements(const SharedWork& work, const int64_t* layouts, const Coefficients& c,
                                        const Keys& keys) {
    const TableRow& row = work.row;
    const int anchor_type = static_cast<int>(row.dtypes >> 24 & 0xff);
    for (int e = work.vectors * kSize + static_cast<int>(threadIdx.x); e < work.count; e += kThreads) {
      const Offsets p = offsets(row, layouts, work.first + e);
      const uint64_t g = global_index(row, work.first + e);
      S param = load_element<kParamType>(row.pointers[kParam], p.at[kParam]);
      const S grad = load_element<kParamType>(row.pointers[kGrad], p.at[kGrad]);
      S anchor = 0;
      if (c.prior && row.pointers[kAnchor] != 0) {
        anchor = load_any<S>(anchor_type, row.pointers[kAnchor], p.at[kAnchor]);
      }
      if (c.noisy) {
        sgld<true, true, S>(param, grad, anchor, static_cast<S>(normal_of(g, keys.noise)), c);
      } else {
        sgld<false, true, S>(param, grad, anchor, S(0), c);
      }
      const uint32_t word = kRounds && keys.stochastic ? word_of(g, keys.rounding) : 0;
      store_element<kParamType>(row.pointers[kParam], p.at[kParam], param, {keys.stochastic, word & 0xffffu});
    }
  }

  static FE_DEVICE void run(const SgldCall& call, Shared<S>& shared) {
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
      const Keys keys = row_keys(call.step, work);
      if (c.noisy) {
        c.extras() ? update_vectors<true, true>(work, ahead, c, keys) : update_vectors<true, false>(work, ahead, c, keys);
      } else {
        c.extras() ? update_vectors<false, true>(work, ahead, c, keys) : update_vectors<false, false>(work, ahead, c, keys);
      }
      update_elements(work, call.step.layouts, c, keys);
    }

    __syncthreads();
    if (work.last) finish(call.step, work.scalars.skip);
  }

  static FE_DEVICE void prepare(const SgldCall& call, const TableRow* row, Shared<S>& shared) {
    const Scalars s = read_scalars(call.step, call.settings, row);
    SgldSettings settings = call.settings;
    settings.lr = s.lr;
    settings.temperature = s.temperature;
    shared.work.scalars = s;
    shared.coefficients = sgld_coefficients<S>(settings, s.grad_scale);
  }
};

template <DType kParamType>
__global__ void __launch_bounds__(kThreads, kParamType == kFloat64 ? 4 : 6) sgld_kernel(const SgldCall call) {
  using K = Kernel<kParamType>;
  FE_SHARED(Shared<typename K::S>, shared);
  K::run(call, shared);
}

using KernelPointer = void (*)(SgldCall);

KernelPointer kernel_for(int64_t dtypes) {
  const int64_t param = dtypes & 0xff, grad = dtypes >> 8 & 0xff;
  if (param != grad) return nullptr;
  switch (param) {
    case kFloat32:
      return sgld_kernel<kFloat32>;
    case kFloat64:
      return sgld_kernel<kFloat64>;
    case kBFloat16:
      return sgld_kernel<kBFloat16>;
    case kFloat16:
      return sgld_kernel<kFloat16>;
    default:
      return nullptr;
  }
}

}  // namespace

extern "C" bool fe_cuda_sgld_supports(int64_t dtypes) { return kernel_for(dtypes) != nullptr; }

extern "C" int fe_cuda_sgld(const SgldCall* call, void* stream) {
  const KernelPointer kernel = kernel_for(call->step.dtypes);
  if (kernel == nullptr) return static_cast<int>(cudaErrorInvalidValue);
  const int64_t blocks = call->step.n_chunks > 0 ? call->step.n_chunks : 1;
  return launch(kernel, blocks, kThreads, *call, stream);
}

}  // namespace fe::cuda
