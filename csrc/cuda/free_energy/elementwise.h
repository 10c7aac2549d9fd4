// The elementwise kernels, one (or two) per term.
#pragma once

#include "cuda/free_energy/free_energy.h"
#include "formulas/gaussian_kl.h"
#include "formulas/likelihoods.h"

namespace fe::cuda {

template <template <class> class Term>
inline constexpr bool kTakesTarget = true;
template <>
inline constexpr bool kTakesTarget<NormalKl> = false;
template <>
inline constexpr bool kTakesTarget<NormalPriorKl> = false;
template <>
inline constexpr bool kTakesTarget<Value> = false;

// Block `block` of row `row`, if the row exists.
struct Position {
  int64_t row, block;
  bool exists;
};

// Groups take one block after the other, whatever row it is in.
FE_DEVICE Position next_position(const TermPass& pass) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / 4;
  const int64_t row = index / pass.blocks;
  return {row, index - row * pass.blocks, row < pass.rows};
}

// The GPU's half of a block of rows: group i has row i, all have the same columns.
FE_DEVICE Position position_in_row_block(const TermPass& pass, int half) {
  const int64_t row_block = blockIdx.x / pass.blocks;
  const int64_t row = row_block * kRowBlock + half * kGroups + threadIdx.x / 4;
  return {row, blockIdx.x - row_block * pass.blocks, row < pass.rows};
}

// Most of the traffic, with the least latency: kBatch loads per operand are in flight before the first is used.
template <template <class> class Term, int kBatch, DType kParamType, DType kTargetType>
__global__ void __launch_bounds__(kTermThreads, 6) plain_terms_kernel(const TermPass pass) {
  constexpr int kParams = Term<float>::kParams;
  if (blockIdx.x == 0 && threadIdx.x == 0) *pass.counter = 0;
  const Position position = next_position(pass);
  const int64_t first = position.block * kColumns + threadIdx.x % 4 * 4;
  // Columns that are left from `first` on; of those that do not exist nothing is loaded and `exists` leaves them out.
  const int64_t all_left = position.exists ? pass.columns - first : 0;
  int left = static_cast<int>(all_left < kColumns ? all_left : kColumns);
  const float scale = position.exists ? row_scale(pass.weight, pass.upstream, pass.scale, position.row) : 0.0f;
  const bool counts = position.exists && !dropped(pass.weight, position.row);
  int64_t from[kParams], to[kParams], from_target = 0;
#pragma unroll
  for (int i = 0; i < kParams; ++i) {
    from[i] = pass.inputs[i].data + (position.row * pass.inputs[i].row_stride + first) * kBytes<kParamType>;
    to[i] = pass.grads[i].data + (position.row * pass.columns + first) * kBytes<kParamType>;
  }
  if (kTakesTarget<Term>) {
    const TermInput& target = pass.inputs[kTarget];
    from_target = target.data + (position.row * target.row_stride + first) * kBytes<kTargetType>;
  }
  float lanes[4] = {-0.0f, -0.0f, -0.0f, -0.0f};  // -0 + e = e for every e
#pragma unroll 1
  for (int begin = 0; begin < kColumns; begin += 16 * kBatch) {
    Vector<kParamType, 4> p[kParams][kBatch];
    Vector<kTargetType, 4> x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int i = 0; i < kParams; ++i) {
        p[i][j] = {};
        if (16 * j < left) p[i][j].load(from[i], 16 * j);
      }
      x[j] = {};
      if (kTakesTarget<Term> && 16 * j < left) x[j].load(from_target, 16 * j);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const bool exists = 16 * j < left;
      Vector<kParamType, 4> result[kParams] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float values[kParams], e, g[kParams];
#pragma unroll
        for (int i = 0; i < kParams; ++i) values[i] = p[i][j].get(k);
        Term<float>::terms(values, x[j].get(k), e, g);
        lanes[k] += exists && counts ? e : 0.0f;
#pragma unroll
        for (int i = 0; i < kParams; ++i) result[i].set(k, counts ? g[i] * scale : 0.0f, {});
      }
#pragma unroll
      for (int i = 0; i < kParams; ++i) {
        if (exists && pass.grads[i].data != 0) result[i].store(to[i], 16 * j);
      }
    }
    left -= 16 * kBatch;
    from_target += 16 * kBatch * kBytes<kTargetType>;
#pragma unroll
    for (int i = 0; i < kParams; ++i) {
      from[i] += 16 * kBatch * kBytes<kParamType>;
      to[i] += 16 * kBatch * kBytes<kParamType>;
    }
    if (left <= 0) break;
  }
  const float total = fold_lanes(lanes);
  if (position.exists && threadIdx.x % 4 == 0) pass.totals[position.row * pass.blocks + position.block] = total;
}

template <int kSlots>
struct ColumnValues {
  alignas(16) float at[kSlots][kGroups][kColumns];

  FE_DEVICE void store(int slot, int column, const float (&values)[4]) {
    using L = Lane<float>;
    *reinterpret_cast<uint4*>(&at[slot][threadIdx.x / 4][column]) =
        make_uint4(L::bits(values[0]), L::bits(values[1]), L::bits(values[2]), L::bits(values[3]));
  }
};

// Every other case. What differs from call to call is the same in the whole block.
template <template <class> class Term, int kSlots>
struct AnyTerms {
  static constexpr int kParams = Term<float>::kParams;

  float lanes[4], sums[kParams][4];  // sums: of the gradients of kSum

  FE_DEVICE void run(const TermPass& pass, const Position& position, ColumnValues<kSlots>& shared) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      lanes[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < kParams; ++i) sums[i][k] = 0.0f;
    }
    if (!position.exists) return;
    const float scale = row_scale(pass.weight, pass.upstream, pass.scale, position.row);
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
      const int in_block = threadIdx.x % 4 * 4 + 16 * j;
      const int64_t column = position.block * kColumns + in_block, left = pass.columns - column;
      if (left <= 0) break;
      run_four(pass, position, shared, scale, in_block, column, left, j == 0);
    }
  }

  FE_DEVICE void run_four(const TermPass& pass, const Position& position, ColumnValues<kSlots>& shared, float scale,
                          int in_block, int64_t column, int64_t left, bool first) {
    float p[kParams][4], x[4] = {}, g[kParams][4];
#pragma unroll
    for (int i = 0; i < kParams; ++i) load_input(pass, pass.inputs[i], position.row, column, left, p[i]);
    if (kTakesTarget<Term>) load_input(pass, pass.inputs[kTarget], position.row, column, left, x);
    const uint32_t observed = load_mask(pass, position.row, column, left);
    float e[4];
    evaluate(p, x, observed, e, g);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool seen = observed >> k & 1u;
      e[k] = seen ? e[k] : 0.0f;
      lanes[k] = first ? e[k] : lanes[k] + e[k];
#pragma unroll
      for (int i = 0; i < kParams; ++i) g[i][k] = seen ? g[i][k] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kParams; ++i) {
      const TermGrad& grad = pass.grads[i];
      if (grad.kind == GradKind::kSum) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[i][k] = first ? g[i][k] : sums[i][k] + g[i][k];
      } else if (grad.kind != GradKind::kNone) {
#pragma unroll
        for (int k = 0; k < 4; ++k) g[i][k] *= scale;
        if (grad.kind == GradKind::kFull) {
          store_full(pass, grad, position.row * pass.columns + column, left, g[i]);
        } else {
          shared.store(grad.slot, in_block, g[i]);
        }
      }
    }
  }

  static FE_DEVICE void evaluate(const float (&p)[kParams][4], const float (&x)[4], uint32_t observed, float (&e)[4],
                                 float (&g)[kParams][4]) {
    uint32_t counted = 0;  // what is left for the full formula; NaN too
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float values[kParams], gradients[kParams];
#pragma unroll
      for (int i = 0; i < kParams; ++i) values[i] = p[i][k];
      if constexpr (Term<float>::kSparse) {
        Term<float>::zero(values, e[k], gradients);
        counted |= (x[k] != 0.0f ? 1u << k : 0u) & observed;
      } else {
        Term<float>::terms(values, x[k], e[k], gradients);
      }
#pragma unroll
      for (int i = 0; i < kParams; ++i) g[i][k] = gradients[i];
    }
    if constexpr (Term<float>::kSparse) {
      // Each thread takes its next count, wherever it is: a warp goes round as often as its fullest thread has counts,
      // where a branch for each of the four would be taken by some thread nearly every time.
      while (counted != 0) {
        const int k = counted & 1u ? 0 : counted & 2u ? 1 : counted & 4u ? 2 : 3;
        counted &= counted - 1;
        float values[kParams], energy, gradients[kParams];
#pragma unroll
        for (int i = 0; i < kParams; ++i) values[i] = pick(p[i], k);
        Term<float>::counts(values, pick(x, k), energy, gradients);
#pragma unroll
        for (int other = 0; other < 4; ++other) {
          if (other != k) continue;
          e[other] = energy;
#pragma unroll
          for (int i = 0; i < kParams; ++i) g[i][other] = gradients[i];
        }
      }
    }
  }

  static FE_DEVICE float pick(const float (&values)[4], int k) {
    return k == 0 ? values[0] : k == 1 ? values[1] : k == 2 ? values[2] : values[3];
  }

  static FE_DEVICE void load_input(const TermPass& pass, const TermInput& input, int64_t row, int64_t column,
                                   int64_t left, float (&values)[4]) {
    if (input.per_column) {
      const int64_t at = row * input.row_stride + column;
      if (pass.vectors) {
        load_four(input.dtype, input.data, at, values);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] = k < left ? load_float(input.dtype, input.data, at + k) : 0.0f;
      }
    } else {
      const float value = load_float(input.dtype, input.data, row * input.row_stride);
#pragma unroll
      for (int k = 0; k < 4; ++k) values[k] = value;
    }
  }

  static FE_DEVICE void store_full(const TermPass& pass, const TermGrad& grad, int64_t at, int64_t left,
                                   const float (&values)[4]) {
    if (pass.vectors) {
      store_four(grad.dtype, grad.data, at, values);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k < left) store_float(grad.dtype, grad.data, at + k, values[k]);
      }
    }
  }

  // One bit per element; 0 too where there is none.
  static FE_DEVICE uint32_t load_mask(const TermPass& pass, int64_t row, int64_t column, int64_t left) {
    uint32_t bits = 0;
    if (dropped(pass.weight, row)) return bits;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < left && (!pass.mask || pass.mask[row * pass.mask_stride + column + k])) bits |= 1u << k;
    }
    return bits;
  }
};

template <template <class> class Term, int kSlots>
__global__ void __launch_bounds__(kTermThreads, 3) any_terms_kernel(const TermPass pass) {
  constexpr int kParams = Term<float>::kParams;
  FE_SHARED(ColumnValues<kSlots>, shared);
  if (blockIdx.x == 0 && threadIdx.x == 0) *pass.counter = 0;
  float column_sums[kSlots] = {};
#pragma unroll 1
  for (int half = 0; half < (pass.any_columns ? kRowBlock / kGroups : 1); ++half) {
    const Position position = pass.any_columns ? position_in_row_block(pass, half) : next_position(pass);
    AnyTerms<Term, kSlots> terms;
    terms.run(pass, position, shared);
    const bool writes = position.exists && threadIdx.x % 4 == 0;
    const int64_t at = position.row * pass.blocks + position.block;
    const float total = fold_lanes(terms.lanes);
    if (writes) pass.totals[at] = total;
#pragma unroll
    for (int i = 0; i < kParams; ++i) {
      if (pass.grads[i].kind != GradKind::kSum) continue;
      const float sum = fold_lanes(terms.sums[i]);
      if (writes) reinterpret_cast<float*>(pass.grads[i].data)[at] = sum;
    }
    if (!pass.any_columns) continue;
    __syncthreads();
    const int64_t first_row = position.row - threadIdx.x / 4;
#pragma unroll 1
    for (int r = 0; r < kGroups && first_row + r < pass.rows; ++r) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float value = shared.at[slot][r][threadIdx.x];
        column_sums[slot] = half + r == 0 ? value : column_sums[slot] + value;
      }
    }
    __syncthreads();
  }
  if (!pass.any_columns) return;
  const int64_t row_block = blockIdx.x / pass.blocks;
  const int64_t column = (blockIdx.x - row_block * pass.blocks) * kColumns + threadIdx.x;
  if (column >= pass.columns) return;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
    for (int i = 0; i < kParams; ++i) {
      if (pass.grads[i].kind != GradKind::kColumn || pass.grads[i].slot != slot) continue;
      reinterpret_cast<float*>(pass.grads[i].data)[row_block * pass.columns + column] = column_sums[slot];
    }
  }
}

template <template <class> class Term, int kSlots = Term<float>::kParams>
int launch_any(const TermPass& pass, void* stream) {
  const int64_t row_blocks = (pass.rows + kRowBlock - 1) / kRowBlock;
  const int64_t grid = pass.any_columns ? row_blocks * pass.blocks : (pass.rows * pass.blocks + kGroups - 1) / kGroups;
  return launch(any_terms_kernel<Term, kSlots>, grid, kTermThreads, pass, stream);
}

// For terms that are bound by memory: the commonest dtypes have kernels of their own.
template <template <class> class Term, int kBatch, int kSlots = Term<float>::kParams>
int launch_plain_or_any(const TermPass& pass, void* stream) {
  const int64_t grid = (pass.rows * pass.blocks + kGroups - 1) / kGroups;
  const int32_t param = pass.inputs[0].dtype, target = pass.inputs[kTarget].dtype;
  if (pass.plain && param == kFloat32 && (!kTakesTarget<Term> || target == kFloat32)) {
    return launch(plain_terms_kernel<Term, kBatch, kFloat32, kFloat32>, grid, kTermThreads, pass, stream);
  }
  if (pass.plain && param == kBFloat16 && (!kTakesTarget<Term> || target == kFloat32)) {
    return launch(plain_terms_kernel<Term, kBatch, kBFloat16, kFloat32>, grid, kTermThreads, pass, stream);
  }
  if constexpr (kTakesTarget<Term>) {
    if (pass.plain && param == kBFloat16 && target == kBFloat16) {
      return launch(plain_terms_kernel<Term, kBatch, kBFloat16, kBFloat16>, grid, kTermThreads, pass, stream);
    }
  }
  return launch_any<Term, kSlots>(pass, stream);
}

template <template <class> class Term>
int launch_of(const TermPass& pass, void* stream) {
  if constexpr (Term<float>::kMemoryBound) {
    return launch_plain_or_any<Term, Term<float>::kParams == 1 ? 4 : 2>(pass, stream);
  } else {
    return launch_any<Term>(pass, stream);
  }
}

// One of the likelihoods of this file; the others' kernels are not made here.
template <TermFile kFile>
int launch_likelihood(int32_t term, const TermPass& pass, void* stream) {
  int error = static_cast<int>(cudaErrorInvalidValue);
  Likelihoods::visit(term, [&]<template <class> class Term>() {
    if constexpr (!Term<float>::kClasses && file_of<Term>() == kFile) error = launch_of<Term>(pass, stream);
  });
  return error;
}

}  // namespace fe::cuda
