// What the optimizers' kernels share: which elements a block updates, where an element lies and which noise it gets,
// and how the last block finishes the step.
#pragma once

#include "cuda/kernels.h"
#include "cuda/vector_access.h"
#include "core/normal.h"

namespace fe::cuda {

inline constexpr int kThreads = 128;

// A block's elements: first .. first + count of a row. No row at all in the one block of a call without chunks.
struct Work {
  const TableRow* row;
  int64_t first;
  int count;
};

FE_DEVICE Work block_work(const StepCall& call) {
  if (call.n_chunks == 0) return {nullptr, 0, 0};
  const int32_t* chunk = call.chunks + 2 * static_cast<int64_t>(blockIdx.x);
  const TableRow* row = call.rows + chunk[0];
  const int64_t first = static_cast<int64_t>(chunk[1]) * kChunk;
  const int64_t left = row->numel - first;
  return {row, first, static_cast<int>(left < kChunk ? left : kChunk)};
}

FE_DEVICE double read_scalar(const void* tensor, int32_t dtype, double otherwise) {
  if (tensor == nullptr) return otherwise;
  return dtype == kFloat64 ? *static_cast<const double*>(tensor) : *static_cast<const float*>(tensor);
}

// What may be overwritten by the step's last block is read by thread 0 alone, for all.
struct Scalars {
  double lr, temperature, grad_scale;
  uint32_t t;  // of this step, 1 for the first
  bool skip;
};

FE_DEVICE Scalars read_scalars(const StepCall& call, const StepSettings& settings, const TableRow* row) {
  Scalars s;
  s.lr = read_scalar(call.lr_tensor, call.lr_dtype, settings.lr);
  s.temperature = read_scalar(call.temperature_tensor, call.temperature_dtype, settings.temperature);
  s.grad_scale = call.grad_scale == nullptr ? 1.0 : *call.grad_scale;
  s.skip = call.found_inf != nullptr && *call.found_inf != 0.0f;
  s.t = 1;
  if (row != nullptr) {
    const void* step = reinterpret_cast<const void*>(row->step);
    s.t = static_cast<uint32_t>(read_scalar(step, static_cast<int32_t>(row->dtypes >> 32 & 0xff), 0.0) + 1.0);
  }
  return s;
}

// What a block keeps in shared memory: its threads' registers are for elements, and the table itself would be read
// again, from far away, after every store to a tensor.
struct SharedWork {
  TableRow row;
  Scalars scalars;
  int64_t first;
  int32_t count, vectors;  // of `count` elements, those of so many vectors are taken by vectors
  bool last;
};

// By all threads; a barrier must follow.
FE_DEVICE void share_work(const Work& work, int vectors, SharedWork& shared) {
  if (work.row != nullptr && threadIdx.x < kTableColumns) {
    reinterpret_cast<int64_t*>(&shared.row)[threadIdx.x] = reinterpret_cast<const int64_t*>(work.row)[threadIdx.x];
  }
  if (threadIdx.x == 0) {
    shared.first = work.first;
    shared.count = work.count;
    shared.vectors = vectors;
  }
}

// The noise of a row. Of an element's rounding word, the low half is the parameter's and the high half exp_avg's;
// exp_avg_sq takes the 16-bit halves, in order, of a second stream, that of the parameter with its top bit flipped.
struct Keys {
  NoiseKey noise, rounding, second_rounding;
  bool stochastic;
};

FE_DEVICE Keys row_keys(const StepCall& call, const SharedWork& work) {
  const uint32_t stream = static_cast<uint32_t>(work.row.stream), t = work.scalars.t;
  return {noise_key(call.seed, t, stream, kLangevinNoise), noise_key(call.seed, t, stream, kStochasticRounding),
          noise_key(call.seed, t, stream ^ 0x80000000u, kStochasticRounding), (call.flags & kStochastic) != 0};
}

// Whether all other blocks have read what the finish overwrites. For thread 0, after read_scalars.
FE_DEVICE bool is_last_block(const StepCall& call) {
  __threadfence();
  return atomicAdd(call.scratch, 1) == static_cast<int32_t>(gridDim.x) - 1;
}

// For the last block, all its threads: every parameter's t goes up by one, and the next launch finds a zero again.
FE_DEVICE void finish(const StepCall& call, bool skip) {
  if (threadIdx.x == 0) *call.scratch = 0;
  if (skip) return;
  for (int64_t r = threadIdx.x; r < call.n_rows; r += kThreads) {
    const TableRow& row = call.rows[r];
    if ((row.dtypes >> 32 & 0xff) == kFloat64) {
      *reinterpret_cast<double*>(row.step) += 1.0;
    } else {
      *reinterpret_cast<float*>(row.step) += 1.0f;
    }
  }
}

// Whether the row's elements can be taken by vectors: contiguous, on 16-byte boundaries, with consecutive
// indices that start at a multiple of kSize, and an anchor (if any) of the parameter's dtype.
template <DType kParamType, int kSize>
FE_DEVICE bool takes_vectors(const TableRow& row) {
  int64_t all = 0;
#pragma unroll
  for (int operand = 0; operand < kOperands; ++operand) all |= row.pointers[operand];
  const bool anchor_differs = row.pointers[kAnchor] != 0 && (row.dtypes >> 24 & 0xff) != kParamType;
  return row.layout == 0 && row.length >= row.numel && row.offset % kSize == 0 && (all & 15) == 0 && !anchor_differs;
}

// The index of a local element in the whole parameter.
FE_DEVICE uint64_t global_index(const TableRow& row, int64_t element) {
  const int64_t pieces = row.length >= row.numel ? 0 : element / row.length;
  return static_cast<uint64_t>(row.offset + pieces * (row.pitch - row.length) + element);
}

// How far a local element lies from each operand's pointer, in elements.
struct Offsets {
  int64_t at[kOperands];
};

FE_DEVICE Offsets offsets(const TableRow& row, const int64_t* layouts, int64_t element) {
  Offsets p;
  if (row.layout == 0) {
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) p.at[operand] = element;
    return p;
  }
  const int64_t* layout = layouts + (row.layout - 1);
  const int64_t ndim = layout[0];
#pragma unroll
  for (int operand = 0; operand < kOperands; ++operand) p.at[operand] = 0;
  for (int64_t dim = ndim; dim > 0; --dim) {
    const int64_t size = layout[dim];
    const int64_t index = element % size;
    element /= size;
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) p.at[operand] += index * layout[dim + (operand + 1) * ndim];
  }
  return p;
}

FE_DEVICE Words<uint32_t> words_of_block(uint64_t block, const NoiseKey& key) {
  return noise_words(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), key);
}

// The normals of elements 4 block .. 4 block + 3.
FE_DEVICE Normals<float> normals_of_block(uint64_t block, const NoiseKey& key) {
  return noise_normals<float>(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), key);
}

FE_DEVICE uint32_t word_of(uint64_t g, const NoiseKey& key) {
  const Words<uint32_t> words = words_of_block(g / 4, key);
  const uint32_t low = g & 1 ? words.y : words.x;
  const uint32_t high = g & 1 ? words.w : words.z;
  return g & 2 ? high : low;
}

FE_DEVICE float normal_of(uint64_t g, const NoiseKey& key) {
  const Words<uint32_t> words = words_of_block(g / 4, key);
  float first, second;
  box_muller<float>(g & 2 ? words.z : words.x, g & 2 ? words.w : words.y, first, second);
  return g & 1 ? second : first;
}

}  // namespace fe::cuda
