#include "cpu/free_energy/free_energy.h"

#include "cpu/convert.h"
#include "cpu/free_energy/column_spans.h"

namespace fe::FE_ISA {

namespace {

static_assert(kSegment == kBlocks * kColumns);

// Goes over segments of rows.
template <template <class> class Term>
class Rows {
  static constexpr int kParams = Term<float>::kParams;
  // By whether there is a mask.
  static constexpr SpanLoop<kParams>* kLoops[2] = {span_loop<Term, false, kParams>(), span_loop<Term, true, kParams>()};

 public:
  explicit Rows(const TermCall& call) : call_(call), direct_(true) {
    for (int i = 0; i <= kParams; ++i) {
      inputs_[i] = &call.inputs[i < kParams ? i : kTarget];
      span_.per_column[i] = inputs_[i]->per_column;
      span_.totals[i] = totals_[i];
      direct_ &= !inputs_[i]->per_column || inputs_[i]->dtype == kFloat32;
    }
    for (int i = 0; i < kParams; ++i) {
      span_.kinds[i] = call.grads[i].kind;
      direct_ &= call.grads[i].kind != GradKind::kFull || call.grads[i].dtype == kFloat32;
    }
    if (call.columns <= kFold) prepare_packs();
    flat_ = !Term<float>::kSparse && direct_ && !call.mask && call.columns > kFold && call.columns < kColumns;
    for (int i = 0; i <= kParams; ++i)
      flat_ &= !inputs_[i]->data || (inputs_[i]->per_column && inputs_[i]->row_stride == call.columns);
    for (const TermGrad& grad : call.grads)
      flat_ &= grad.kind == GradKind::kNone || (grad.kind == GradKind::kFull && grad.row_stride == call.columns);
  }

  // Whether rows that follow each other can be gone over together.
  bool is_flat() const { return flat_; }

  // kFlatRows of them, in vectors that take the end of one row and the start of the next: a row of 20 alone would be half
  // preparation, and of its two vectors the second mostly empty.
  void flat(int64_t row) {
    bool one_scale = !call_.dropped(row);
    for (int r = 1; call_.row_scale && r < kFlatRows; ++r) one_scale &= call_.row_scale[row + r] == call_.row_scale[row];
    for (int r = 1; call_.weight && r < kFlatRows; ++r) one_scale &= !call_.dropped(row + r);
    if (!one_scale) {
      for (int r = 0; r < kFlatRows; ++r) segment(row + r, 0, true);
      return;
    }
    const float* in[kParams + 1];
    float* out[kParams];
    for (int i = 0; i <= kParams; ++i)  // what has no target does not look at it
      in[i] = static_cast<const float*>(inputs_[inputs_[i]->data ? i : 0]->data) + row * call_.columns;
    for (int i = 0; i < kParams; ++i)
      out[i] = span_.kinds[i] == GradKind::kFull ? static_cast<float*>(call_.grads[i].data) + row * call_.columns : nullptr;
    const int columns = static_cast<int>(call_.columns);
    alignas(64) float energies[kFlatRows * kColumns];
    if constexpr (!Term<float>::kSparse)
      flat_span<Term>(in, out, kFlatRows * columns, call_.row_scale ? call_.row_scale[row] : 1.0f, energies);
    for (int r = 0; r < kFlatRows; ++r) call_.sums[row + r] = sum_row(energies + r * columns, columns) + 0.0;
  }

  static constexpr int kFlatRows = kFold;

  // Rows of no more than one vector, up to kPack of them: alone, each would be mostly preparation.
  void pack(int64_t row, int count, bool first_row) {
    const int columns = static_cast<int>(call_.columns);
    span_.count = count * kFold;
    for (int i = 0; i <= kParams; ++i) {
      const TermInput& input = *inputs_[i];
      if (!input.data) continue;
      for (int r = 0; r < count; ++r) {
        float* to = buffers_[i] + r * kFold;
        const int64_t at = (row + r) * input.row_stride;
        for (int c = 0; c < columns; ++c) to[c] = to_float(input.data, input.dtype, at + (input.per_column ? c : 0));
      }
    }
    for (int r = 0; (call_.mask || call_.weight) && r < count; ++r) {
      const uint8_t kept = !call_.dropped(row + r);
      for (int c = 0; c < columns; ++c)
        observed_[r * kFold + c] = kept && (!call_.mask || call_.mask[(row + r) * call_.mask_stride + c]);
    }
    kLoops[true](span_, kFold);
    for (int r = 0; r < count; ++r) {
      call_.sums[row + r] = totals_[kParams][r] + 0.0;
      const float scale = call_.row_scale ? call_.row_scale[row + r] : 1.0f;
      for (int i = 0; i < kParams; ++i) keep_packed(i, row + r, results_[i] + r * kFold, scale, first_row && r == 0, totals_[i][r]);
    }
  }

  void segment(int64_t row, int64_t segment, bool first_row) {
    if (call_.dropped(row)) return drop(row, segment, first_row);
    for (int i = 0; i <= kParams; ++i) {
      const TermInput& input = *inputs_[i];
      if (input.per_column) continue;
      const float value = input.data ? to_float(input.data, input.dtype, row * input.row_stride) : 0.0f;
      store(buffers_[i], Lane<FloatV>::splat(value));
      span_.in[i] = buffers_[i];
    }
    span_.row_scale = call_.row_scale ? call_.row_scale[row] : 1.0f;
    span_.first_row = first_row;
    const int64_t begin = segment * kSegment, end = begin + kSegment < call_.columns ? begin + kSegment : call_.columns;
    const int64_t until = direct_ ? begin + (end - begin) / kFold * kFold : begin;
    // Straight from memory, but for the columns behind the last whole vector; these share a block with whole ones.
    const int64_t whole = until == end ? end : begin + (until - begin) / kColumns * kColumns;
    if (whole > begin) {
      point_span(row, begin, static_cast<int>(whole - begin));
      kLoops[span_.mask != nullptr](span_, kColumns);
    }
    for (int64_t column = whole; column < end; column += kColumns) {
      const int count = end - column < kColumns ? static_cast<int>(end - column) : kColumns;
      buffered_span(row, column, count, static_cast<int>((column - begin) / kColumns));
    }
    const int blocks = static_cast<int>((end - begin + kColumns - 1) / kColumns);
    const int64_t at = row * call_.segments() + segment;
    call_.sums[at] = fold(totals_[kParams], blocks);
    for (int i = 0; i < kParams; ++i)
      if (span_.kinds[i] == GradKind::kSum) static_cast<double*>(call_.grads[i].data)[at] = fold(totals_[i], blocks);
  }

  static constexpr int kPack = kColumns / kFold;

 private:
  void prepare_packs() {
    __builtin_memset(buffers_, 0, sizeof buffers_);
    __builtin_memset(observed_, 0, sizeof observed_);
    for (int r = 0; r < kPack; ++r)
      for (int c = 0; c < call_.columns; ++c) observed_[r * kFold + c] = 1;
    span_.mask = observed_;
    span_.row_scale = 1.0f;  // rows of a pack have scales of their own
    span_.first_row = true;
    for (int i = 0; i <= kParams; ++i) {
      span_.per_column[i] = true;
      span_.in[i] = buffers_[i];
    }
    for (int i = 0; i < kParams; ++i) {
      span_.out[i] = results_[i];
      span_.streamed[i] = false;
    }
  }

  // A row that counts nothing, whatever it holds: a product with its weight of 0 would keep a NaN.
  void drop(int64_t row, int64_t segment, bool first_row) {
    const int64_t begin = segment * kSegment, left = call_.columns - begin, count = left < kSegment ? left : kSegment;
    const int64_t at = row * call_.segments() + segment;
    call_.sums[at] = 0.0;
    for (int i = 0; i < kParams; ++i) {
      const TermGrad& grad = call_.grads[i];
      if (grad.kind == GradKind::kFull) {
        const int64_t bytes = grad.dtype == kFloat32 ? 4 : 2;
        __builtin_memset(static_cast<char*>(grad.data) + (row * grad.row_stride + begin) * bytes, 0, count * bytes);
      } else if (grad.kind == GradKind::kColumn && first_row) {
        __builtin_memset(column_sums(i, row, begin), 0, count * sizeof(float));
      } else if (grad.kind == GradKind::kSum) {
        static_cast<double*>(grad.data)[at] = 0.0;
      }
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

  // For the columns [column, column + count), of values that lie in memory as the loop takes them.
  void point_span(int64_t row, int64_t column, int count) {
    span_.count = count;
    for (int i = 0; i <= kParams; ++i) {
      span_.totals[i] = totals_[i];
      if (inputs_[i]->per_column) span_.in[i] = static_cast<const float*>(inputs_[i]->data) + row * inputs_[i]->row_stride + column;
    }
    for (int i = 0; i < kParams; ++i) {
      const TermGrad& grad = call_.grads[i];
      span_.streamed[i] = grad.streamed;
      if (grad.kind == GradKind::kFull) span_.out[i] = static_cast<float*>(grad.data) + row * grad.row_stride + column;
      if (grad.kind == GradKind::kColumn) span_.out[i] = column_sums(i, row, column);
    }
    span_.mask = call_.mask ? call_.mask + row * call_.mask_stride + column : nullptr;
  }

  // One block, the columns that are missing in its last vector counting as unobserved.
  void buffered_span(int64_t row, int64_t column, int count, int block) {
    const int filled = (count + kFold - 1) / kFold * kFold;
    span_.count = count;
    for (int i = 0; i <= kParams; ++i) {
      span_.totals[i] = totals_[i] + block;
      if (!inputs_[i]->per_column) continue;
      to_float(inputs_[i]->data, inputs_[i]->dtype, row * inputs_[i]->row_stride + column, count, buffers_[i]);
      for (int c = count; c < filled; ++c) buffers_[i][c] = 0.0f;
      span_.in[i] = buffers_[i];
    }
    for (int i = 0; i < kParams; ++i) {
      span_.out[i] = results_[i];
      span_.streamed[i] = false;
      if (span_.kinds[i] == GradKind::kColumn && !span_.first_row)
        __builtin_memcpy(results_[i], column_sums(i, row, column), count * sizeof(float));
    }
    span_.mask = nullptr;
    if (call_.mask || filled != count) {
      if (call_.mask) {
        __builtin_memcpy(observed_, call_.mask + row * call_.mask_stride + column, count);
      } else {
        __builtin_memset(observed_, 1, count);
      }
      __builtin_memset(observed_ + count, 0, filled - count);
      span_.mask = observed_;
    }
    kLoops[span_.mask != nullptr](span_, kColumns);
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
  bool flat_;
  ColumnSpan<kParams> span_;
  double totals_[kParams + 1][kBlocks];
  alignas(64) float buffers_[kParams + 1][kColumns], results_[kParams][kColumns];
  alignas(64) uint8_t observed_[kColumns];
};

// Segments of a row that are gone through before the next row of a block. One alone is a walk of four pages that ends and
// begins again elsewhere; the sums over rows of these stay in the L2 cache.
inline constexpr int64_t kWalk = 16;

template <template <class> class Term>
void row_tasks(const TermCall& call, int64_t begin, int64_t end) {
  Rows<Term> rows(call);
  const int64_t segments = call.segments(), task_rows = call.task_rows();
  if (call.columns <= kFold) {  // one segment per row
    const int64_t last = end * task_rows < call.rows ? end * task_rows : call.rows;
    for (int64_t row = begin * task_rows; row < last; row += Rows<Term>::kPack) {
      const int count = last - row < Rows<Term>::kPack ? static_cast<int>(last - row) : Rows<Term>::kPack;
      rows.pack(row, count, row % task_rows == 0);
    }
    return;
  }
  int64_t task = begin;
  if (rows.is_flat())  // where a task is a row
    for (; task + Rows<Term>::kFlatRows <= end; task += Rows<Term>::kFlatRows) rows.flat(task);
  while (task < end) {
    const int64_t first = task / segments * task_rows, from = task % segments;
    int64_t to = from + kWalk < segments ? from + kWalk : segments;
    if (to > from + (end - task)) to = from + (end - task);
    for (int64_t row = first; row < first + task_rows && row < call.rows; ++row)
      for (int64_t segment = from; segment < to; ++segment) rows.segment(row, segment, row == first);
    task += to - from;
  }
  end_stream();
}

}  // namespace

TermKernel* free_energy_kernel(int32_t term) {
  switch (term) {
    case kStandardNormalKl: return row_tasks<NormalKl>;
    case kNormalKl: return row_tasks<NormalPriorKl>;
    case kValue: return row_tasks<Value>;
  }
  TermKernel* found = nullptr;
  Likelihoods::visit(term, [&]<template <class> class Term>() {
    if constexpr (!Term<float>::kClasses) found = row_tasks<Term>;
  });
  return found;
}

}  // namespace fe::FE_ISA
