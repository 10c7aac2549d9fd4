// The categorical energy of logits: a position has one, two, four or eight groups of four threads, as many as its
// blocks of 128 classes ask for.
#include "cuda/free_energy/free_energy.h"
#include "core/functions.h"

namespace fe::cuda {
namespace {

constexpr int kSweeps = kBlocks / 8;  // blocks that one group takes of a segment, at most

struct Categorical {
  const CategoricalPass& pass;
  int64_t position;
  int groups, group;  // of the position; which is this

  FE_DEVICE float logit(int64_t which) const {
    return load_float(pass.dtype, pass.logits, position * pass.classes + which);
  }

  // The four that begin at `first`; minus infinity where there is none.
  FE_DEVICE void logits(int64_t first, float (&values)[4]) const {
    if (pass.vectors && first < pass.classes) {
      load_four(pass.dtype, pass.logits, position * pass.classes + first, values);
      return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k] = first + k < pass.classes ? logit(first + k) : -__builtin_inff();
  }

  FE_DEVICE int64_t first_class(int64_t block, int j) const { return block * kColumns + threadIdx.x % 4 * 4 + 16 * j; }
  FE_DEVICE int64_t blocks() const { return (pass.classes + kColumns - 1) / kColumns; }

  // All threads of the warp call this, also those whose position does not exist.
  FE_DEVICE float largest(bool exists) const {
    float result = -__builtin_inff();
    for (int64_t block = group; exists && block < blocks(); block += groups) {
#pragma unroll 1
      for (int j = 0; j < 8; ++j) {
        float values[4];
        logits(first_class(block, j), values);
#pragma unroll
        for (int k = 0; k < 4; ++k) result = values[k] <= result ? result : values[k];
      }
    }
#pragma unroll
    for (int width = 1; width < 32; width *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, result, width);
      if (width < 4 * groups) result = other <= result ? result : other;
    }
    return result;
  }

  FE_DEVICE float block_sum(int64_t block, float shift) const {
    float lanes[4] = {};
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
      float values[4];
      logits(first_class(block, j), values);
#pragma unroll
      for (int k = 0; k < 4; ++k) lanes[k] += exp_negative<float>(values[k] - shift);
    }
    return fold_lanes(lanes);
  }

  // As above. Blocks that do not exist have no classes, and the total 0.
  FE_DEVICE float sum_of_exponentials(bool exists, float shift) const {
    double sum = 0.0;
    for (int64_t first = 0; first < blocks(); first += kBlocks) {
      double totals[kSweeps] = {};
#pragma unroll
      for (int sweep = 0; sweep < kSweeps; ++sweep) {
        const int64_t block = first + sweep * groups + group;
        if (sweep > 0 && groups < 8) continue;  // there are no more than `groups` blocks
        totals[sweep] = block_sum(exists ? block : blocks(), shift);
      }
      double total = (totals[0] + totals[2]) + (totals[1] + totals[3]);
#pragma unroll
      for (int width = 16; width >= 4; width /= 2) {
        const double other = __shfl_xor_sync(0xffffffffu, total, width);
        if (width < 4 * groups) total += other;
      }
      sum += total;
    }
    return static_cast<float>(sum);
  }

  FE_DEVICE void store_gradient(int64_t target, float shift, float sum, float scale, bool seen) const {
    for (int64_t block = group; block < blocks(); block += groups) {
#pragma unroll 1
      for (int j = 0; j < 8; ++j) {
        const int64_t first = first_class(block, j), at = position * pass.classes + first;
        float values[4], g[4];
        logits(first, values);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          g[k] = Lane<float>::divide(exp_negative<float>(values[k] - shift), sum);
          g[k] = (first + k == target ? g[k] - 1.0f : g[k]) * scale;
          g[k] = seen ? g[k] : 0.0f;
        }
        if (pass.vectors && first < pass.classes) {
          store_four(pass.dtype, pass.grad, at, g);
          continue;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (first + k < pass.classes) store_float(pass.dtype, pass.grad, at + k, g[k]);
        }
      }
    }
  }
};

// The logarithm of the number of groups to base 2.
FE_HD int log_groups(int64_t classes) {
  return classes <= kColumns ? 0 : classes <= 2 * kColumns ? 1 : classes <= 4 * kColumns ? 2 : 3;
}

__global__ void __launch_bounds__(kTermThreads, 8) categorical_kernel(const CategoricalPass pass) {
  const int shift_of_groups = log_groups(pass.classes), groups = 1 << shift_of_groups;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / 4;
  const int64_t position = index >> shift_of_groups;
  const Categorical c{pass, position, groups, static_cast<int>(threadIdx.x / 4) & (groups - 1)};
  const bool exists = position < pass.positions;
  const bool seen = exists && (!pass.mask || pass.mask[position]) && !dropped(pass.weight, position / pass.positions_per_row);
  const float shift = c.largest(seen), sum = c.sum_of_exponentials(seen, shift);
  const int64_t target = seen ? pass.target[position] : 0;
  const bool known = seen && target >= 0 && target < pass.classes;
  const float nothing = Lane<float>::from_bits(0x7fc00000u);  // a class that does not exist
  const float chosen = known ? c.logit(target) : nothing;
  __syncwarp();  // the gradient may be written over the logits, of which other threads have read now
  if (!exists) return;
  if (c.group == 0 && threadIdx.x % 4 == 0) pass.energies[position] = seen ? log<float>(sum) - (chosen - shift) : 0.0f;
  if (pass.grad == 0) return;
  const float scale = row_scale(pass.weight, pass.upstream, pass.scale, position / pass.positions_per_row);
  c.store_gradient(target, shift, sum, known ? scale : nothing, seen);
}

}  // namespace

int launch_categorical(const CategoricalPass& pass, void* stream) {
  const int64_t groups = pass.positions << log_groups(pass.classes);
  return launch(categorical_kernel, (groups + kGroups - 1) / kGroups, kTermThreads, pass, stream);
}

}  // namespace fe::cuda
