// The inner loops of the free energy over a span of columns, for the terms of formulas/likelihoods.h and
// formulas/gaussian_kl.h.
#pragma once

#include "cpu/free_energy/free_energy.h"
#include "cpu/free_energy/row_sum.h"
#include "formulas/gaussian_kl.h"
#include "formulas/likelihoods.h"

namespace fe::inline FE_ISA {

// Consecutive columns of one row: as many blocks as the segment has where values come straight from memory, else one,
// whose values pass through the caller's buffers.
template <int kParams>
struct ColumnSpan {
  int count;          // columns; a multiple of kFold unless buffered
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

// A span's inputs and outputs as local values: what is stored through a pointer could otherwise change the span, and
// everything would be loaded again, and the sums kept in memory, at every vector.
template <bool kMasked, int kParams>
class Lanes {
 public:
  FE_HD explicit Lanes(const ColumnSpan<kParams>& span)
      : first_row_(span.first_row), row_scale_(Lane<FloatV>::splat(span.row_scale)), mask_(span.mask) {
    for (int i = 0; i <= kParams; ++i) {
      in_[i] = span.in[i];
      moves_[i] = span.per_column[i] ? -1 : 0;
    }
    for (int i = 0; i < kParams; ++i) {
      out_[i] = span.out[i];
      kinds_[i] = span.kinds[i];
      streamed_[i] = span.streamed[i];
    }
  }

  FE_HD FloatV input(int i, int column) const { return load(in_[i] + (column & moves_[i])); }

  FE_HD void touch_inputs_ahead(int column) const {
#pragma GCC unroll 4
    for (int i = 0; i <= kParams; ++i) touch_ahead(in_[i] + (column & moves_[i]));
  }

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

  FE_HD void finish_block(const ColumnSpan<kParams>& span, int block) const {
    span.totals[kParams][block] = fold(energy_);
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i)
      if (kinds_[i] == GradKind::kSum) span.totals[i][block] = fold(sums_[i]);
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

// Sums are finished every `block` columns: kColumns, or kFold where a row is one vector.
template <template <class> class Term, bool kMasked, int kParams = Term<float>::kParams>
void dense_span(const ColumnSpan<kParams>& span, int block) {
  Lanes<kMasked, kParams> lanes(span);
  const int count = span.count;
  for (int begin = 0, blocks = 0; begin < count; begin += block, ++blocks) {
    const int end = count - begin < block ? count : begin + block;
    if (begin % kPage<float> == 0) lanes.touch_inputs_ahead(begin);
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
    lanes.finish_block(span, blocks);
  }
}

// Elements of several rows that follow each other without a gap; `count` is a multiple of kFold. Their energies are kept, and
// the gradients wanted (not null) are all of one scale.
template <template <class> class Term, int kParams = Term<float>::kParams>
void flat_span(const float* const in[kParams + 1], float* const out[kParams], int count, float scale, float* energies) {
  const FloatV row_scale = Lane<FloatV>::splat(scale);
  for (int at = 0; at < count; at += kLanes) {
    FloatV p[kParams], e, g[kParams];
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i) p[i] = load(in[i] + at);
    Term<FloatV>::terms(p, load(in[kParams] + at), e, g);
    store(energies + at, e);
#pragma GCC unroll 4
    for (int i = 0; i < kParams; ++i)
      if (out[i]) store(out[i] + at, g[i] * row_scale);
  }
}

// The sum of a row of no more than kColumns values, which may be followed by others.
inline double sum_row(const float* values, int columns) {
  SignedV lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  FloatV sums[kParts];
  for (int column = 0; column < columns; column += kFold) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const int at = column + part * kLanes;
      const FloatV value = lane < columns - at ? load(values + at) : FloatV{};
      sums[part] = column == 0 ? value : sums[part] + value;
    }
  }
  return fold(sums);
}

// The full formula at the columns `counted`, brought together to fill vectors.
template <template <class> class Term, int kParams = Term<float>::kParams>
void counts_of_span(const ColumnSpan<kParams>& span, const int* counted, int n, int begin, float* energies,
                float (*gradients)[kColumns]) {
  for (int first = 0; first < n; first += kLanes) {
    alignas(64) float p[kParams][kLanes], x[kLanes], e[kLanes], g[kParams][kLanes];
    const int last = n - first < kLanes ? n - first : kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int at = counted[first + (lane < last ? lane : 0)];
      x[lane] = span.in[kParams][at];
#pragma GCC unroll 4
      for (int i = 0; i < kParams; ++i) p[i][lane] = span.in[i][span.per_column[i] ? at : 0];
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

// Counts are mostly zeros, where the formula is short: it is computed for all, and the full one for those that are left.
template <template <class> class Term, bool kMasked, int kParams = Term<float>::kParams>
void sparse_span(const ColumnSpan<kParams>& span, int block) {
  Lanes<kMasked, kParams> lanes(span);
  const float* target = span.in[kParams];
  const int filled = (span.count + kFold - 1) / kFold * kFold;
  for (int begin = 0, blocks = 0; begin < filled; begin += block, ++blocks) {
    alignas(64) float energies[kColumns], gradients[kParams][kColumns];
    int counted[kColumns + 1], n = 0;
    const int end = filled - begin < block ? filled : begin + block;
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
    counts_of_span<Term>(span, counted, n, begin, energies, gradients);
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
    lanes.finish_block(span, blocks);
  }
}

template <int kParams>
using SpanLoop = void(const ColumnSpan<kParams>& span, int block);

template <template <class> class Term, bool kMasked, int kParams>
constexpr SpanLoop<kParams>* span_loop() {
  if constexpr (Term<float>::kSparse) return &sparse_span<Term, kMasked, kParams>;
  else return &dense_span<Term, kMasked, kParams>;
}

}  // namespace fe::inline FE_ISA
