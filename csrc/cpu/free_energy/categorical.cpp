#include "cpu/free_energy/categorical.h"

#include "cpu/convert.h"
#include "cpu/free_energy/row_sum.h"
#include "core/functions.h"

namespace fe::FE_ISA {

namespace {

// The classes of one position, 128 at a time; those that are missing in the last block are -infinity.
class Logits {
 public:
  Logits(const CategoricalCall& call, int64_t position) : call_(call), first_(position * call.classes) {}

  int64_t blocks() const { return (call_.classes + kColumns - 1) / kColumns; }
  int count(int64_t block) const {
    const int64_t left = call_.classes - block * kColumns;
    return left < kColumns ? static_cast<int>(left) : kColumns;
  }
  float at(int64_t which) const { return to_float(call_.logits, call_.dtype, first_ + which); }
  const float* block(int64_t block) {
    const int64_t at = first_ + block * kColumns;
    if (call_.dtype == kFloat32 && count(block) == kColumns) return static_cast<const float*>(call_.logits) + at;
    for (int i = count(block); i < kColumns; ++i) buffer_[i] = -__builtin_inff();
    to_float(call_.logits, call_.dtype, at, count(block), buffer_);
    return buffer_;
  }

 private:
  const CategoricalCall& call_;
  int64_t first_;
  alignas(64) float buffer_[kColumns];
};

float largest(Logits& logits) {
  FloatV largest = Lane<FloatV>::splat(-__builtin_inff());
  for (int64_t b = 0; b < logits.blocks(); ++b) {
    const float* values = logits.block(b);
    for (int i = 0; i < kColumns; i += kLanes) {
      const FloatV v = load(values + i);
      largest = v <= largest ? largest : v;  // a NaN comes through here, or in the sum
    }
  }
  float result = largest[0];
  for (int i = 1; i < kLanes; ++i) result = largest[i] <= result ? result : largest[i];
  return result;
}

float sum_of_exponentials(Logits& logits, float shift) {
  double sum = 0.0;
  for (int64_t first = 0; first < logits.blocks(); first += kBlocks) {
    double totals[kBlocks];
    int count = 0;
    for (int64_t b = first; b < logits.blocks() && count < kBlocks; ++b) {
      const float* values = logits.block(b);
      FloatV lanes[kParts];
      for (int i = 0; i < kColumns / kLanes; ++i) {
        const FloatV term = exp_negative<FloatV>(load(values + i * kLanes) - shift);
        lanes[i % kParts] = i < kParts ? term : lanes[i % kParts] + term;
      }
      totals[count++] = fold(lanes);
    }
    sum += fold(totals, count);
  }
  return static_cast<float>(sum);
}

// `target` is one of the classes, or -1.
void store_gradient(const CategoricalCall& call, Logits& logits, int64_t position, int64_t target, float shift, float sum,
                    float scale) {
  alignas(64) float gradient[kColumns];
  for (int64_t b = 0; b < logits.blocks(); ++b) {
    const float* values = logits.block(b);
    for (int i = 0; i < kColumns; i += kLanes)
      store(gradient + i, Lane<FloatV>::divide(exp_negative<FloatV>(load(values + i) - shift), Lane<FloatV>::splat(sum)));
    if (target >= 0 && target / kColumns == b) gradient[target % kColumns] -= 1.0f;
    for (int i = 0; i < kColumns; i += kLanes) store(gradient + i, load(gradient + i) * scale);
    from_float(gradient, logits.count(b), call.grad, call.dtype, position * call.classes + b * kColumns);
  }
}

}  // namespace

void categorical_positions(const CategoricalCall& call, int64_t begin, int64_t end) {
  for (int64_t position = begin; position < end; ++position) {
    const bool dropped = call.weight && call.weight[position / call.positions] == 0.0f;
    const bool seen = !dropped && (!call.mask || call.mask[position]);
    if (!seen) {
      call.energies[position] = 0.0f;
      if (call.grad) {
        const int64_t bytes = call.classes * (call.dtype == kFloat32 ? 4 : 2);
        __builtin_memset(static_cast<char*>(call.grad) + position * bytes, 0, bytes);
      }
      continue;
    }
    Logits logits(call, position);
    const int64_t target = call.target[position];
    const bool exists = target >= 0 && target < call.classes;
    const float shift = largest(logits), sum = sum_of_exponentials(logits, shift);
    const float nothing = __builtin_nanf("");
    call.energies[position] = exists ? log<float>(sum) - (logits.at(target) - shift) : nothing;
    if (call.grad)
      store_gradient(call, logits, position, exists ? target : -1, shift, sum,
                     exists ? call.row_scale[position / call.positions] : nothing);
  }
}

}  // namespace fe::FE_ISA
