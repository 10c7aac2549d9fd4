#include "cpu/free_energy.h"

#include "cpu/convert.h"
#include "cpu/row_sum.h"
#include "math/free_energy.h"

namespace fe::FE_ISA {

namespace {

static_assert(kSegment == kBlocks * kColumns);

// Up to 128 columns of one row. Values come straight from memory where they are float32 and fill the block, else
// through `buffer`; so do the results.
template <int kParams>
struct Block {
  static constexpr int kInputs = kParams + 1;  // the target last

  int count;  // columns
  bool first_row;  // of a block of rows: column gradients begin here
  float row_scale;
  const float* in[kInputs];
  bool per_column[kInputs];  // false: `in` holds one value, in every lane
  float* out[kParams];
  bool streamed[kParams];
  const uint8_t* mask;
  FloatV energy[kParts], sums[kParams][kParts];
  alignas(64) float buffer[kInputs][kColumns], results[kParams][kColumns];
  alignas(64) uint8_t observed[kColumns];
};

// False in lanes whose mask byte is 0.
FE_HD SignedV observed(const uint8_t* mask) {
  typedef uint8_t BytesV __attribute__((vector_size(kLanes)));
  BytesV bytes;
  __builtin_memcpy(&bytes, mask, sizeof bytes);
  return __builtin_convertvector(bytes, SignedV) != 0;
}

// A block's inputs and outputs as local values: what is stored through a pointer could otherwise change the block itself,
// and everything would be loaded again, and the sums kept in memory, at every vector.
template <bool kMasked, int kParams>
class Lanes {
 public:
  FE_HD Lanes(const Block<kParams>& block, const GradKind kinds[])
      : first_row_(block.first_row), row_scale_(Lane<FloatV>::splat(block.row_scale)), mask_(block.mask) {
    for (int i = 0; i <= kParams; ++i) {
      in_[i] = block.in[i];
      moves_[i] = block.per_column[i] ? -1 : 0;
    }
    for (int i = 0; i < kParams; ++i) {
      out_[i] = block.out[i];
      kinds_[i] = kinds[i];
      streamed_[i] = block.streamed[i];
    }
  }

  FE_HD FloatV input(int i, int column) const { return load(in_[i] + (column & moves_[i])); }

  // What becomes of one vector of energies and gradients. `first`: no value of this lane came before.
  FE_HD void keep(int column, int part, bool first, FloatV e, FloatV g[kParams]) {
    if (kMasked) {
      const SignedV seen = observed(mask_ + column);
      e = seen ? e : FloatV{};
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) g[i] = seen ? g[i] : FloatV{};
    }
    energy_[part] = first ? e : energy_[part] + e;
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i) {
      if (kinds_[i] == GradKind::kFull) {
        if (streamed_[i]) {
          stream(out_[i] + column, g[i] * row_scale_);
        } else {
          store(out_[i] + column, g[i] * row_scale_);
        }
      } else if (kinds_[i] == GradKind::kColumn) {
        const FloatV scaled = g[i] * row_scale_;
        store(out_[i] + column, first_row_ ? scaled : load(out_[i] + column) + scaled);
      } else if (kinds_[i] == GradKind::kSum) {
        sums_[i][part] = first ? g[i] : sums_[i][part] + g[i];
      }
    }
  }

  FE_HD void finish(Block<kParams>& block) const {
    for (int part = 0; part < kParts; ++part) {
      block.energy[part] = energy_[part];
      for (int i = 0; i < kParams; ++i) block.sums[i][part] = sums_[i][part];
    }
  }

 private:
  const float* in_[kParams + 1];
  int moves_[kParams + 1];
  float* out_[kParams];
  GradKind kinds_[kParams];
  bool streamed_[kParams], first_row_;
  FloatV row_scale_;
  const uint8_t* mask_;
  FloatV energy_[kParts] = {}, sums_[kParams][kParts] = {};
};

template <template <class> class Term, bool kMasked, int kParams = Term<float>::kParams>
void run_dense(Block<kParams>& block, const GradKind kinds[]) {
  Lanes<kMasked, kParams> lanes(block, kinds);
  const int count = block.count;
  for (int column = 0; column < count; column += kFold) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const int at = column + part * kLanes;
      FloatV p[kParams], e, g[kParams];
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) p[i] = lanes.input(i, at);
      Term<FloatV>::terms(p, lanes.input(kParams, at), e, g);
      lanes.keep(at, part, column == 0, e, g);
    }
  }
  lanes.finish(block);
}

// Counts are mostly zeros, where the energy is short: it is computed for all, and the long form for those that are left,
// brought together to fill vectors.
template <template <class> class Term, bool kMasked, int kParams = Term<float>::kParams>
void run_sparse(Block<kParams>& block, const GradKind kinds[]) {
  alignas(64) float energies[kColumns], gradients[kParams][kColumns];
  int counted[kColumns], n = 0;
  const float* target = block.in[kParams];
  Lanes<kMasked, kParams> lanes(block, kinds);
  const int filled = (block.count + kFold - 1) / kFold * kFold;
  for (int column = 0; column < filled; column += kLanes) {
    FloatV p[kParams], e, g[kParams];
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i) p[i] = lanes.input(i, column);
    Term<FloatV>::zero(p, e, g);
    store(energies + column, e);
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i) store(gradients[i] + column, g[i]);
    for (int i = column; i < column + kLanes; ++i) {
      counted[n] = i;
      n += target[i] != 0.0f;  // NaN too
    }
  }
  for (int begin = 0; begin < n; begin += kLanes) {
    alignas(64) float p[kParams][kLanes], x[kLanes], e[kLanes], g[kParams][kLanes];
    const int last = n - begin < kLanes ? n - begin : kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int at = counted[begin + (lane < last ? lane : 0)];
      x[lane] = target[at];
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) p[i][lane] = block.in[i][block.per_column[i] ? at : 0];
    }
    FloatV pv[kParams], ev, gv[kParams];
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i) pv[i] = load(p[i]);
    Term<FloatV>::counts(pv, load(x), ev, gv);
    store(e, ev);
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i) store(g[i], gv[i]);
    for (int lane = 0; lane < last; ++lane) {
      const int at = counted[begin + lane];
      energies[at] = e[lane];
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) gradients[i][at] = g[i][lane];
    }
  }
  for (int column = 0; column < block.count; column += kFold) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const int at = column + part * kLanes;
      FloatV g[kParams];
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) g[i] = load(gradients[i] + at);
      lanes.keep(at, part, column == 0, load(energies + at), g);
    }
  }
  lanes.finish(block);
}

template <template <class> class Term, bool kMasked, int kParams>
void run_block(Block<kParams>& block, const GradKind kinds[]) {
  if constexpr (Term<float>::kSparse) {
    run_sparse<Term, kMasked>(block, kinds);
  } else {
    run_dense<Term, kMasked>(block, kinds);
  }
}

template <template <class> class Term>
void run_segment(const TermCall& call, int64_t row, int64_t segment, bool first_row) {
  constexpr int kParams = Term<float>::kParams;
  Block<kParams> block;
  GradKind kinds[kParams];
  double totals[kParams + 1][kBlocks] = {};
  const TermInput* inputs[kParams + 1];
  for (int i = 0; i <= kParams; ++i) {
    inputs[i] = &call.inputs[i < kParams ? i : kTarget];
    block.per_column[i] = inputs[i]->per_column;
    if (inputs[i]->per_column) continue;
    const float value = inputs[i]->data ? to_float(inputs[i]->data, inputs[i]->dtype, row * inputs[i]->row_stride) : 0.0f;
    store(block.buffer[i], Lane<FloatV>::splat(value));
    block.in[i] = block.buffer[i];
  }
  for (int i = 0; i < kParams; ++i) kinds[i] = call.grads[i].kind;
  block.row_scale = call.row_scale ? call.row_scale[row] : 1.0f;
  block.first_row = first_row;

  const int64_t begin = segment * kSegment, end = begin + kSegment < call.columns ? begin + kSegment : call.columns;
  for (int64_t column = begin; column < end; column += kColumns) {
    block.count = end - column < kColumns ? static_cast<int>(end - column) : kColumns;
    const bool whole = block.count == kColumns;
    for (int i = 0; i <= kParams; ++i) {
      if (!inputs[i]->per_column) continue;
      const int64_t at = row * inputs[i]->row_stride + column;
      if (whole && inputs[i]->dtype == kFloat32) {
        block.in[i] = static_cast<const float*>(inputs[i]->data) + at;
      } else {
        if (!whole) __builtin_memset(block.buffer[i], 0, sizeof block.buffer[i]);
        to_float(inputs[i]->data, inputs[i]->dtype, at, block.count, block.buffer[i]);
        block.in[i] = block.buffer[i];
      }
    }
    float* column_sums[kParams] = {};
    for (int i = 0; i < kParams; ++i) {
      const TermGrad& grad = call.grads[i];
      if (kinds[i] == GradKind::kColumn) column_sums[i] = static_cast<float*>(grad.data) + row / kRowBlock * call.columns + column;
      block.out[i] = block.results[i];
      block.streamed[i] = whole && grad.streamed;
      if (whole && kinds[i] == GradKind::kFull && grad.dtype == kFloat32) {
        block.out[i] = static_cast<float*>(grad.data) + row * grad.row_stride + column;
      } else if (whole && kinds[i] == GradKind::kColumn) {
        block.out[i] = column_sums[i];
      } else if (kinds[i] == GradKind::kColumn && !first_row) {
        __builtin_memcpy(block.results[i], column_sums[i], block.count * sizeof(float));
      }
    }
    const uint8_t* mask = call.mask ? call.mask + row * call.mask_stride + column : nullptr;
    block.mask = mask;
    if (!whole) {  // the columns that are missing count as unobserved
      __builtin_memset(block.observed, 0, sizeof block.observed);
      if (mask) {
        __builtin_memcpy(block.observed, mask, block.count);
      } else {
        __builtin_memset(block.observed, 1, block.count);
      }
      block.mask = block.observed;
    }
    if (block.mask) {
      run_block<Term, true>(block, kinds);
    } else {
      run_block<Term, false>(block, kinds);
    }
    const int64_t b = (column - begin) / kColumns;
    totals[kParams][b] = fold(block.energy);
    for (int i = 0; i < kParams; ++i) {
      const TermGrad& grad = call.grads[i];
      if (kinds[i] == GradKind::kSum) {
        totals[i][b] = fold(block.sums[i]);
      } else if (kinds[i] != GradKind::kNone && block.out[i] == block.results[i]) {
        if (kinds[i] == GradKind::kColumn) {
          __builtin_memcpy(column_sums[i], block.results[i], block.count * sizeof(float));
        } else {
          from_float(block.results[i], block.count, grad.data, grad.dtype, row * grad.row_stride + column);
        }
      }
    }
  }
  const int64_t at = row * call.segments() + segment;
  call.sums[at] = fold(totals[kParams]);
  for (int i = 0; i < kParams; ++i)
    if (kinds[i] == GradKind::kSum) static_cast<double*>(call.grads[i].data)[at] = fold(totals[i]);
}

template <template <class> class Term>
void run_units(const TermCall& call, int64_t begin, int64_t end) {
  const int64_t segments = call.segments(), rows = call.unit_rows();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit / segments * rows;
    for (int64_t row = first; row < first + rows && row < call.rows; ++row)
      run_segment<Term>(call, row, unit % segments, row == first);
  }
  end_stream();
}

// Its own row sum: what is left to do when the energies of a row are there.
template <class F>
struct Value {
  static constexpr int kParams = 1;
  static constexpr bool kSparse = false;
  static FE_HD void terms(const F* p, F, F& e, F* g) {
    e = p[0];
    g[0] = F{};
  }
};

}  // namespace

void free_energy_units(const TermCall& call, int64_t begin, int64_t end) {
  switch (call.term) {
    case kStandardNormalKl: return run_units<NormalKl>(call, begin, end);
    case kNormalKl: return run_units<NormalPriorKl>(call, begin, end);
    case kValue: return run_units<Value>(call, begin, end);
  }
  switch (static_cast<Likelihood>(call.term)) {
    case Likelihood::kMse: return run_units<Mse>(call, begin, end);
    case Likelihood::kGaussian: return run_units<Gaussian>(call, begin, end);
    case Likelihood::kGaussianLearned: return run_units<GaussianLearned>(call, begin, end);
    case Likelihood::kBernoulli: return run_units<Bernoulli>(call, begin, end);
    case Likelihood::kCategorical: return;  // not elementwise: cpu/categorical.cpp
    case Likelihood::kContinuousBernoulli: return run_units<ContinuousBernoulli>(call, begin, end);
    case Likelihood::kLaplace: return run_units<Laplace>(call, begin, end);
    case Likelihood::kStudentT: return run_units<StudentT>(call, begin, end);
    case Likelihood::kPoisson: return run_units<Poisson>(call, begin, end);
    case Likelihood::kNegativeBinomial: return run_units<NegativeBinomial>(call, begin, end);
    case Likelihood::kZeroInflatedNegativeBinomial: return run_units<ZeroInflatedNegativeBinomial>(call, begin, end);
  }
}

}  // namespace fe::FE_ISA
