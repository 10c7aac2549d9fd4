#include "cpu/free_energy.h"

#include "cpu/convert.h"
#include "cpu/row_sum.h"
#include "math/free_energy.h"

namespace fe::FE_ISA {

namespace {

static_assert(kSegment == kBlocks * kColumns);

// Consecutive columns of one row: as many blocks as the segment has where values come straight from memory, else one,
// whose values pass through `staged`.
template <int kParams>
struct Run {
  int count;          // columns; a multiple of kFold unless staged
  bool first_row;     // of a block of rows: column gradients begin here
  float row_scale;
  const float* in[kParams + 1];  // the target last
  bool per_column[kParams + 1];  // false: `in` holds one value, in every lane
  GradKind kinds[kParams];
  float* out[kParams];
  bool streamed[kParams];
  const uint8_t* mask;
  double* totals[kParams + 1];  // of blocks: sums of gradients, and of the energy last
};

// False in lanes whose mask byte is 0.
FE_HD SignedV observed(const uint8_t* mask) {
  typedef uint8_t BytesV __attribute__((vector_size(kLanes)));
  BytesV bytes;
  __builtin_memcpy(&bytes, mask, sizeof bytes);
  return __builtin_convertvector(bytes, SignedV) != 0;
}

// A run's inputs and outputs as local values: what is stored through a pointer could otherwise change the run itself, and
// everything would be loaded again, and the sums kept in memory, at every vector.
template <bool kMasked, int kParams>
class Lanes {
 public:
  FE_HD explicit Lanes(const Run<kParams>& run)
      : first_row_(run.first_row), row_scale_(Lane<FloatV>::splat(run.row_scale)), mask_(run.mask) {
    for (int i = 0; i <= kParams; ++i) {
      in_[i] = run.in[i];
      moves_[i] = run.per_column[i] ? -1 : 0;
    }
    for (int i = 0; i < kParams; ++i) {
      out_[i] = run.out[i];
      kinds_[i] = run.kinds[i];
      streamed_[i] = run.streamed[i];
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

  FE_HD void finish_block(const Run<kParams>& run, int block) const {
    run.totals[kParams][block] = fold(energy_);
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i)
      if (kinds_[i] == GradKind::kSum) run.totals[i][block] = fold(sums_[i]);
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

// Sums are finished every `kBlock` columns: kColumns, or kFold where a row is one vector.
template <template <class> class Term, bool kMasked, int kBlock, int kParams = Term<float>::kParams>
void run_dense(const Run<kParams>& run) {
  Lanes<kMasked, kParams> lanes(run);
  const int count = run.count;
  for (int begin = 0; begin < count; begin += kBlock) {
    const int end = count - begin < kBlock ? count : begin + kBlock;
    for (int column = begin; column < end; column += kFold) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const int at = column + part * kLanes;
        FloatV p[kParams], e, g[kParams];
#pragma GCC unroll 4
        for (int i = 0; i < kParams; ++i) p[i] = lanes.input(i, at);
        Term<FloatV>::terms(p, lanes.input(kParams, at), e, g);
        lanes.keep(at, part, column == begin, e, g);
      }
    }
    lanes.finish_block(run, begin / kBlock);
  }
}

// The long form of the energy at the columns `counted`, brought together to fill vectors.
template <template <class> class Term, int kParams = Term<float>::kParams>
void run_counts(const Run<kParams>& run, const int* counted, int n, int begin, float* energies,
                float (*gradients)[kColumns]) {
  for (int first = 0; first < n; first += kLanes) {
    alignas(64) float p[kParams][kLanes], x[kLanes], e[kLanes], g[kParams][kLanes];
    const int last = n - first < kLanes ? n - first : kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int at = counted[first + (lane < last ? lane : 0)];
      x[lane] = run.in[kParams][at];
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) p[i][lane] = run.in[i][run.per_column[i] ? at : 0];
    }
    FloatV pv[kParams], ev, gv[kParams];
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i) pv[i] = load(p[i]);
    Term<FloatV>::counts(pv, load(x), ev, gv);
    store(e, ev);
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i) store(g[i], gv[i]);
    for (int lane = 0; lane < last; ++lane) {
      const int at = counted[first + lane] - begin;
      energies[at] = e[lane];
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) gradients[i][at] = g[i][lane];
    }
  }
}

// Counts are mostly zeros, where the energy is short: it is computed for all, and the long form for those that are left.
template <template <class> class Term, bool kMasked, int kBlock, int kParams = Term<float>::kParams>
void run_sparse(const Run<kParams>& run) {
  Lanes<kMasked, kParams> lanes(run);
  const float* target = run.in[kParams];
  const int filled = (run.count + kFold - 1) / kFold * kFold;
  for (int begin = 0; begin < filled; begin += kBlock) {
    alignas(64) float energies[kColumns], gradients[kParams][kColumns];
    int counted[kColumns + 1], n = 0;
    const int end = filled - begin < kBlock ? filled : begin + kBlock;
    for (int column = begin; column < end; column += kLanes) {
      FloatV p[kParams], e, g[kParams];
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) p[i] = lanes.input(i, column);
      Term<FloatV>::zero(p, e, g);
      store(energies + column - begin, e);
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) store(gradients[i] + column - begin, g[i]);
      for (int i = column; i < column + kLanes; ++i) {
        counted[n] = i;
        n += target[i] != 0.0f;  // NaN too
      }
    }
    run_counts<Term>(run, counted, n, begin, energies, gradients);
    for (int column = begin; column < end; column += kFold) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const int at = column + part * kLanes;
        FloatV g[kParams];
#pragma GCC unroll 4
        for (int i = 0; i < kParams; ++i) g[i] = load(gradients[i] + at - begin);
        lanes.keep(at, part, column == begin, load(energies + at - begin), g);
      }
    }
    lanes.finish_block(run, begin / kBlock);
  }
}

template <template <class> class Term, bool kMasked, int kBlock, int kParams>
void run_blocks(const Run<kParams>& run) {
  if constexpr (Term<float>::kSparse) {
    run_sparse<Term, kMasked, kBlock>(run);
  } else {
    run_dense<Term, kMasked, kBlock>(run);
  }
}

// Goes over segments of rows.
template <template <class> class Term>
class Rows {
  static constexpr int kParams = Term<float>::kParams;

 public:
  explicit Rows(const TermCall& call) : call_(call), direct_(true) {
    for (int i = 0; i <= kParams; ++i) {
      inputs_[i] = &call.inputs[i < kParams ? i : kTarget];
      run_.per_column[i] = inputs_[i]->per_column;
      run_.totals[i] = totals_[i];
      direct_ &= !inputs_[i]->per_column || inputs_[i]->dtype == kFloat32;
    }
    for (int i = 0; i < kParams; ++i) {
      run_.kinds[i] = call.grads[i].kind;
      direct_ &= call.grads[i].kind != GradKind::kFull || call.grads[i].dtype == kFloat32;
    }
    if (call.columns <= kFold) prepare_packs();
  }

  // Rows of no more than one vector, up to kPack of them: alone, each would be mostly preparation.
  void pack(int64_t row, int count, bool first_row) {
    const int columns = static_cast<int>(call_.columns);
    run_.count = count * kFold;
    for (int i = 0; i <= kParams; ++i) {
      const TermInput& input = *inputs_[i];
      if (!input.data) continue;
      for (int r = 0; r < count; ++r) {
        float* to = staged_[i] + r * kFold;
        const int64_t at = (row + r) * input.row_stride;
        for (int c = 0; c < columns; ++c) to[c] = to_float(input.data, input.dtype, at + (input.per_column ? c : 0));
      }
    }
    for (int r = 0; call_.mask && r < count; ++r)
      for (int c = 0; c < columns; ++c) observed_[r * kFold + c] = call_.mask[(row + r) * call_.mask_stride + c];
    run_blocks<Term, true, kFold>(run_);
    for (int r = 0; r < count; ++r) {
      call_.sums[row + r] = totals_[kParams][r] + 0.0;
      const float scale = call_.row_scale ? call_.row_scale[row + r] : 1.0f;
      for (int i = 0; i < kParams; ++i) keep_packed(i, row + r, results_[i] + r * kFold, scale, first_row && r == 0, totals_[i][r]);
    }
  }

  void segment(int64_t row, int64_t segment, bool first_row) {
    for (int i = 0; i <= kParams; ++i) {
      const TermInput& input = *inputs_[i];
      if (input.per_column) continue;
      const float value = input.data ? to_float(input.data, input.dtype, row * input.row_stride) : 0.0f;
      store(staged_[i], Lane<FloatV>::splat(value));
      run_.in[i] = staged_[i];
    }
    run_.row_scale = call_.row_scale ? call_.row_scale[row] : 1.0f;
    run_.first_row = first_row;
    const int64_t begin = segment * kSegment, end = begin + kSegment < call_.columns ? begin + kSegment : call_.columns;
    const int64_t until = direct_ ? begin + (end - begin) / kFold * kFold : begin;
    // Straight from memory, but for the columns behind the last whole vector; these share a block with whole ones.
    const int64_t whole = until == end ? end : begin + (until - begin) / kColumns * kColumns;
    if (whole > begin) run_direct(row, begin, static_cast<int>(whole - begin));
    for (int64_t column = whole; column < end; column += kColumns) {
      const int count = end - column < kColumns ? static_cast<int>(end - column) : kColumns;
      run_staged(row, column, count, static_cast<int>((column - begin) / kColumns));
    }
    const int blocks = static_cast<int>((end - begin + kColumns - 1) / kColumns);
    const int64_t at = row * call_.segments() + segment;
    call_.sums[at] = fold(totals_[kParams], blocks);
    for (int i = 0; i < kParams; ++i)
      if (run_.kinds[i] == GradKind::kSum) static_cast<double*>(call_.grads[i].data)[at] = fold(totals_[i], blocks);
  }

  static constexpr int kPack = kColumns / kFold;

 private:
  void prepare_packs() {
    __builtin_memset(staged_, 0, sizeof staged_);
    __builtin_memset(observed_, 0, sizeof observed_);
    for (int r = 0; r < kPack; ++r)
      for (int c = 0; c < call_.columns; ++c) observed_[r * kFold + c] = 1;
    run_.mask = observed_;
    run_.row_scale = 1.0f;  // rows of a pack have scales of their own
    run_.first_row = true;
    for (int i = 0; i <= kParams; ++i) {
      run_.per_column[i] = true;
      run_.in[i] = staged_[i];
    }
    for (int i = 0; i < kParams; ++i) {
      run_.out[i] = results_[i];
      run_.streamed[i] = false;
    }
  }

  void keep_packed(int i, int64_t row, float* gradient, float scale, bool first_row, double sum) {
    const TermGrad& grad = call_.grads[i];
    const int columns = static_cast<int>(call_.columns);
    if (grad.kind == GradKind::kFull) {
      for (int c = 0; c < columns; ++c) gradient[c] *= scale;
      from_float(gradient, columns, grad.data, grad.dtype, row * grad.row_stride);
    } else if (grad.kind == GradKind::kColumn) {
      float* sums = column_sums(i, row, 0);
      for (int c = 0; c < columns; ++c) sums[c] = first_row ? gradient[c] * scale : sums[c] + gradient[c] * scale;
    } else if (grad.kind == GradKind::kSum) {
      static_cast<double*>(grad.data)[row] = sum + 0.0;
    }
  }

  float* column_sums(int i, int64_t row, int64_t column) const {
    return static_cast<float*>(call_.grads[i].data) + row / kRowBlock * call_.columns + column;
  }

  void run_direct(int64_t row, int64_t column, int count) {
    run_.count = count;
    for (int i = 0; i <= kParams; ++i) {
      run_.totals[i] = totals_[i];
      if (inputs_[i]->per_column) run_.in[i] = static_cast<const float*>(inputs_[i]->data) + row * inputs_[i]->row_stride + column;
    }
    for (int i = 0; i < kParams; ++i) {
      const TermGrad& grad = call_.grads[i];
      run_.streamed[i] = grad.streamed;
      if (grad.kind == GradKind::kFull) run_.out[i] = static_cast<float*>(grad.data) + row * grad.row_stride + column;
      if (grad.kind == GradKind::kColumn) run_.out[i] = column_sums(i, row, column);
    }
    run_.mask = call_.mask ? call_.mask + row * call_.mask_stride + column : nullptr;
    run_columns();
  }

  void run_columns() {
    if (run_.mask) {
      run_blocks<Term, true, kColumns>(run_);
    } else {
      run_blocks<Term, false, kColumns>(run_);
    }
  }

  // One block, the columns that are missing in its last vector counting as unobserved.
  void run_staged(int64_t row, int64_t column, int count, int block) {
    const int filled = (count + kFold - 1) / kFold * kFold;
    run_.count = count;
    for (int i = 0; i <= kParams; ++i) {
      run_.totals[i] = totals_[i] + block;
      if (!inputs_[i]->per_column) continue;
      to_float(inputs_[i]->data, inputs_[i]->dtype, row * inputs_[i]->row_stride + column, count, staged_[i]);
      for (int c = count; c < filled; ++c) staged_[i][c] = 0.0f;
      run_.in[i] = staged_[i];
    }
    for (int i = 0; i < kParams; ++i) {
      run_.out[i] = results_[i];
      run_.streamed[i] = false;
      if (run_.kinds[i] == GradKind::kColumn && !run_.first_row)
        __builtin_memcpy(results_[i], column_sums(i, row, column), count * sizeof(float));
    }
    run_.mask = nullptr;
    if (call_.mask || filled != count) {
      if (call_.mask) {
        __builtin_memcpy(observed_, call_.mask + row * call_.mask_stride + column, count);
      } else {
        __builtin_memset(observed_, 1, count);
      }
      __builtin_memset(observed_ + count, 0, filled - count);
      run_.mask = observed_;
    }
    run_columns();
    for (int i = 0; i < kParams; ++i) {
      const TermGrad& grad = call_.grads[i];
      if (grad.kind == GradKind::kFull) {
        from_float(results_[i], count, grad.data, grad.dtype, row * grad.row_stride + column);
      } else if (grad.kind == GradKind::kColumn) {
        __builtin_memcpy(column_sums(i, row, column), results_[i], count * sizeof(float));
      }
    }
  }

  const TermCall& call_;
  const TermInput* inputs_[kParams + 1];
  bool direct_;  // whole vectors need no conversion
  Run<kParams> run_;
  double totals_[kParams + 1][kBlocks];
  alignas(64) float staged_[kParams + 1][kColumns], results_[kParams][kColumns];
  alignas(64) uint8_t observed_[kColumns];
};

template <template <class> class Term>
void run_units(const TermCall& call, int64_t begin, int64_t end) {
  Rows<Term> rows(call);
  const int64_t segments = call.segments(), unit_rows = call.unit_rows();
  if (call.columns <= kFold) {  // one segment a row
    const int64_t last = end * unit_rows < call.rows ? end * unit_rows : call.rows;
    for (int64_t row = begin * unit_rows; row < last; row += Rows<Term>::kPack) {
      const int count = last - row < Rows<Term>::kPack ? static_cast<int>(last - row) : Rows<Term>::kPack;
      rows.pack(row, count, row % unit_rows == 0);
    }
    return;
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit / segments * unit_rows;
    for (int64_t row = first; row < first + unit_rows && row < call.rows; ++row)
      rows.segment(row, unit % segments, row == first);
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
