// One launch updates every parameter of the table: a block takes one chunk of one row.
#include "formulas/langevin_adam.h"

#include "cuda/optimizers/table_rows.h"

namespace fe::cuda {
namespace {

template <class S>
struct Shared {
  SharedWork work;
  LangevinAdamCoefficients<S> coefficients;
};

// A few elements between their loads and their stores.
template <class S, int kSize>
struct Elements {
  S param[kSize], grad[kSize], exp_avg[kSize], exp_avg_sq[kSize], largest[kSize], anchor[kSize], normal[kSize];

  template <Noise kNoise, RareTerms kTerms>
  FE_DEVICE void update(const LangevinAdamCoefficients<S>& c) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      langevin_adam<kNoise, kTerms, S>(param[k], grad[k], exp_avg[k], exp_avg_sq[k], largest[k], anchor[k], normal[k],
                                       c);
    }
  }
};

template <DType kParamType, DType kStateType>
struct Kernel {
  using S = Math<kParamType>;
  using Coefficients = LangevinAdamCoefficients<S>;
  // Four elements share a Philox call; eight bfloat16 fill a 128-bit access.
  static constexpr int kSize = kParamType == kBFloat16 && kStateType == kBFloat16 ? 8 : 4;
  // The rarer dtypes have one loop for everything, which saves most of their compile time.
  static constexpr bool kHasPlainLoop = kParamType == kBFloat16 || (kParamType == kFloat32 && kStateType == kFloat32);
  static constexpr bool kRounds = kParamType == kBFloat16 || kStateType == kBFloat16;
  using ParamVector = Vector<kParamType, kSize>;
  using StateVector = Vector<kStateType, kSize>;

  struct Operands {
    ParamVector param, grad;
    StateVector exp_avg, exp_avg_sq;

    FE_DEVICE void load(const TableRow& row, Operand second_moment, int64_t index) {
      param.load(row.pointers[kParam], index);
      grad.load(row.pointers[kGrad], index);
      exp_avg.load(row.pointers[kExpAvg], index);
      exp_avg_sq.load(row.pointers[second_moment], index);
    }
  };

  // `ahead` holds the thread's first vector; each further one is in flight while the one before is computed. Without
  // extras the loop is made for kNoise; with them one loop serves every noise, and finds it in the coefficients.
  template <bool kExtras, Noise kNoise>
  static FE_DEVICE void update_vectors(const SharedWork& work, Operands& ahead, const Coefficients& c, const Keys& keys) {
    const TableRow& row = work.row;
    const Operand second_moment = kExtras ? c.second_moment : kExpAvgSq;
    const bool frozen = kExtras && c.frozen;
    for (int u = static_cast<int>(threadIdx.x); u < work.vectors; u += kThreads) {
      const int64_t index = work.first + static_cast<int64_t>(u) * kSize;
      Operands now = ahead;
      if (u + kThreads < work.vectors) ahead.load(row, second_moment, index + kThreads * kSize);
      StateVector largest_unit{};
      ParamVector anchor_unit{};
      const bool amsgrad = kExtras && c.amsgrad;
      if (amsgrad) largest_unit.load(row.pointers[kMaxExpAvgSq], index);
      if (kExtras && c.prior && row.pointers[kAnchor] != 0) anchor_unit.load(row.pointers[kAnchor], index);

      const uint64_t block = static_cast<uint64_t>(row.offset + index) / 4;
      Words<uint32_t> second{};
      if (kStateType == kBFloat16 && keys.stochastic && !frozen) second = words_of_block(block / 2, keys.second_rounding);
#pragma unroll
      for (int group = 0; group < kSize; group += 4) {
        Normals<float> n{};
        if (kExtras ? c.noise != Noise::kNone : kNoise != Noise::kNone) {
          n = normals_of_block(block + group / 4, keys.noise);
        }
        const float normals[4] = {n.x, n.y, n.z, n.w};
        Words<uint32_t> w{};
        if (kRounds && keys.stochastic) w = words_of_block(block + group / 4, keys.rounding);
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
        const bool even = kSize == 8 ? group == 0 : block % 2 == 0;
        const uint32_t second_words[2] = {even ? second.x : second.z, even ? second.y : second.w};
        Elements<S, 4> e;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int i = group + k;
          e.param[k] = now.param.get(i);
          e.grad[k] = now.grad.get(i);
          e.exp_avg[k] = now.exp_avg.get(i);
          e.exp_avg_sq[k] = now.exp_avg_sq.get(i);
          e.largest[k] = largest_unit.get(i);
          e.anchor[k] = anchor_unit.get(i);
          e.normal[k] = static_cast<S>(normals[k]);
        }
        if constexpr (kExtras) {
          e.template update<Noise::kAny, RareTerms::kAll>(c);
        } else {
          e.template update<kNoise, RareTerms::kPlain>(c);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int i = group + k;
          const uint32_t half = second_words[k / 2] >> (16 * (k % 2)) & 0xffffu;
          now.param.set(i, e.param[k], {keys.stochastic, words[k] & 0xffffu});
          now.exp_avg.set(i, e.exp_avg[k], {keys.stochastic, words[k] >> 16});
          now.exp_avg_sq.set(i, e.exp_avg_sq[k], {keys.stochastic, half});
          // Either the old value, which no rounding changes, or exp_avg_sq, which is to be rounded as above.
          if (kExtras) largest_unit.set(i, e.largest[k], {keys.stochastic, half});
        }
      }
      now.param.store(row.pointers[kParam], index);
      now.exp_avg.store(row.pointers[kExpAvg], index);
      if (!frozen) now.exp_avg_sq.store(row.pointers[kExpAvgSq], index);
      if (amsgrad) largest_unit.store(row.pointers[kMaxExpAvgSq], index);
    }
  }

  // The rest, one element at a time: any layout, shard and alignment.
  static FE_DEVICE void update_elements(const SharedWork& work, const int64_t* layouts, const Coefficients& c,
                                        const Keys& keys) {
    const TableRow& row = work.row;
    const int anchor_type = static_cast<int>(row.dtypes >> 24 & 0xff);
    for (int i = work.vectors * kSize + static_cast<int>(threadIdx.x); i < work.count; i += kThreads) {
      const Offsets p = offsets(row, layouts, work.first + i);
      const uint64_t g = global_index(row, work.first + i);
      Elements<S, 1> e{};
      e.param[0] = load_element<kParamType>(row.pointers[kParam], p.at[kParam]);
      e.grad[0] = load_element<kParamType>(row.pointers[kGrad], p.at[kGrad]);
      e.exp_avg[0] = load_element<kStateType>(row.pointers[kExpAvg], p.at[kExpAvg]);
      // An index of the offsets that is not known to the compiler would put all of them into memory.
      const int64_t second = c.second_moment == kExpAvgSq ? p.at[kExpAvgSq] : p.at[kMaxExpAvgSq];
      e.exp_avg_sq[0] = load_element<kStateType>(row.pointers[c.second_moment], second);
      if (c.amsgrad) e.largest[0] = load_element<kStateType>(row.pointers[kMaxExpAvgSq], p.at[kMaxExpAvgSq]);
      if (c.prior && row.pointers[kAnchor] != 0) {
        e.anchor[0] = load_any<S>(anchor_type, row.pointers[kAnchor], p.at[kAnchor]);
      }
      if (c.noise != Noise::kNone) e.normal[0] = static_cast<S>(normal_of(g, keys.noise));
      e.template update<Noise::kAny, RareTerms::kAll>(c);

      uint32_t word = 0, half = 0;
      if (kRounds && keys.stochastic) {
        word = word_of(g, keys.rounding);
        if (kStateType == kBFloat16 && !c.frozen) half = word_of(g / 2, keys.second_rounding) >> (16 * (g % 2)) & 0xffffu;
      }
      store_element<kParamType>(row.pointers[kParam], p.at[kParam], e.param[0], {keys.stochastic, word & 0xffffu});
      store_element<kStateType>(row.pointers[kExpAvg], p.at[kExpAvg], e.exp_avg[0], {keys.stochastic, word >> 16});
      if (c.frozen) continue;
      store_element<kStateType>(row.pointers[kExpAvgSq], p.at[kExpAvgSq], e.exp_avg_sq[0], {keys.stochastic, half});
      if (!c.amsgrad) continue;
      store_element<kStateType>(row.pointers[kMaxExpAvgSq], p.at[kMaxExpAvgSq], e.largest[0], {keys.stochastic, half});
    }
  }

  static FE_DEVICE void update_vectors_plain(const SharedWork& work, Operands& ahead, const Coefficients& c,
                                           const Keys& keys) {
    switch (c.noise) {
      case Noise::kMomentum:
        update_vectors<false, Noise::kMomentum>(work, ahead, c, keys);
        break;
      case Noise::kPreconditioned:
        update_vectors<false, Noise::kPreconditioned>(work, ahead, c, keys);
        break;
      case Noise::kIsotropic:
        update_vectors<false, Noise::kIsotropic>(work, ahead, c, keys);
        break;
      default:
        update_vectors<false, Noise::kNone>(work, ahead, c, keys);
    }
  }

  static FE_DEVICE void run(const LangevinAdamCall& call, Shared<S>& shared) {
    Operands ahead{};
    {
      const Work work = block_work(call.step);
      const int vectors = work.count > 0 && takes_vectors<kParamType, kSize>(*work.row) ? work.count / kSize : 0;
      if (static_cast<int>(threadIdx.x) < vectors) {
        ahead.load(*work.row, call.settings.second_moment(), work.first + static_cast<int64_t>(threadIdx.x) * kSize);
      }
      // The loads above travel while thread 0 computes the powers and roots.
      share_work(work, vectors, shared.work);
      if (threadIdx.x == 0) prepare(call, work.row, shared);
    }
    __syncthreads();

    const SharedWork& work = shared.work;
    if (threadIdx.x == 0) shared.work.last = is_last_block(call.step);
    if (!work.scalars.skip && work.count > 0) {
      const Coefficients c = shared.coefficients;
      const Keys keys = row_keys(call.step, work);
      if (!kHasPlainLoop || c.rare_terms() != RareTerms::kPlain) {
        update_vectors<true, Noise::kNone>(work, ahead, c, keys);
      } else if constexpr (kHasPlainLoop) {
        update_vectors_plain(work, ahead, c, keys);
      }
      update_elements(work, call.step.layouts, c, keys);
    }

    __syncthreads();
    if (!work.last) return;
    const Scalars& s = work.scalars;
    finish(call.step, s.skip);
    if (s.skip || !(s.lr > 0.0)) return;
    const double unit = momentum_noise_unit(s.lr, s.temperature, call.settings.beta1, call.settings.noise());
    for (int64_t r = threadIdx.x; r < call.step.n_rows; r += kThreads) {
      const int64_t at = call.step.rows[r].noise_unit;
      if (at != 0) *reinterpret_cast<double*>(at) = unit;
    }
  }

  static FE_DEVICE void prepare(const LangevinAdamCall& call, const TableRow* row, Shared<S>& shared) {
    const Scalars s = read_scalars(call.step, call.settings, row);
    LangevinAdamSettings settings = call.settings;
    settings.lr = s.lr;
    settings.temperature = s.temperature;
    shared.work.scalars = s;
    const int64_t at = row == nullptr ? 0 : row->noise_unit;
    const double previous_unit = at == 0 ? 0.0 : *reinterpret_cast<const double*>(at);
    shared.coefficients = langevin_adam_coefficients<S>(settings, s.grad_scale, s.t, previous_unit);
  }
};

// Resident blocks per multiprocessor, as many as the registers allow without spills: more of them hide more latency.
template <DType kParamType, DType kStateType>
inline constexpr int kBlocks = kParamType == kFloat64 ? 3 : 5;

template <DType kParamType, DType kStateType>
__global__ void __launch_bounds__(kThreads, kBlocks<kParamType, kStateType>)
    langevin_adam_kernel(const LangevinAdamCall call) {
  using K = Kernel<kParamType, kStateType>;
  FE_SHARED(Shared<typename K::S>, shared);
  K::run(call, shared);
}

using KernelPointer = void (*)(LangevinAdamCall);

KernelPointer kernel_for(int64_t dtypes) {
  const int64_t param = dtypes & 0xff, grad = dtypes >> 8 & 0xff, state = dtypes >> 16 & 0xff;
  if (param != grad) return nullptr;
  switch (param << 8 | state) {
    case kFloat32 << 8 | kFloat32:
      return langevin_adam_kernel<kFloat32, kFloat32>;
    case kFloat32 << 8 | kBFloat16:
      return langevin_adam_kernel<kFloat32, kBFloat16>;
    case kFloat64 << 8 | kFloat64:
      return langevin_adam_kernel<kFloat64, kFloat64>;
    case kBFloat16 << 8 | kBFloat16:
      return langevin_adam_kernel<kBFloat16, kBFloat16>;
    case kBFloat16 << 8 | kFloat32:
      return langevin_adam_kernel<kBFloat16, kFloat32>;
    case kFloat16 << 8 | kFloat16:
      return langevin_adam_kernel<kFloat16, kFloat16>;
    case kFloat16 << 8 | kFloat32:
      return langevin_adam_kernel<kFloat16, kFloat32>;
    default:
      return nullptr;
  }
}

}  // namespace

extern "C" bool fe_cuda_langevin_adam_supports(int64_t dtypes) { return kernel_for(dtypes) != nullptr; }

extern "C" int fe_cuda_langevin_adam(const LangevinAdamCall* call, void* stream) {
  const KernelPointer kernel = kernel_for(call->step.dtypes);
  if (kernel == nullptr) return static_cast<int>(cudaErrorInvalidValue);
  const int64_t blocks = call->step.n_chunks > 0 ? call->step.n_chunks : 1;
  return launch(kernel, blocks, kThreads, *call, stream);
}

}  // namespace fe::cuda
