#include "cpu/free_energy/categorical.h"

#include "cpu/convert.h"
#include "cpu/free_energy/row_sum.h"
#include "core/functions.h"

namespace fe::FE_ISA {

namespace {

// The classes of one position, 128 at a time. What is missing in the last vector is -infinity; the vectors after it, whose
// exponentials would add 0, are left out: most problems have far fewer than 128 classes.
class Logits {
 public:
  Logits(const CategoricalCall& call, int64_t position) : call_(call), first_(position * call.classes) {}

  int64_t blocks() const { return (call_.classes + kColumns - 1) / kColumns; }
  int count(int64_t block) const {
    const int64_t left = call_.classes - block * kColumns;
    return left < kColumns ? static_cast<int>(left) : kColumns;
  }
  int vectors(int64_t block) const { return (count(block) + kLanes - 1) / kLanes; }
  float at(int64_t which) const { return to_float(call_.logits, call_.dtype, first_ + which); }
  const float* block(int64_t block) {
    const int64_t at = first_ + block * kColumns;
    if (call_.dtype == kFloat32 && count(block) % kLanes == 0) return static_cast<const float*>(call_.logits) + at;
    if (held_ != block) {
      for (int i = count(block); i < vectors(block) * kLanes; ++i) buffer_[i] = -__builtin_inff();
      to_float(call_.logits, call_.dtype, at, count(block), buffer_);
      held_ = block;
    }
    return buffer_;
  }

 private:
  const CategoricalCall& call_;
  int64_t first_, held_ = -1;
  alignas(64) float buffer_[kColumns];
};

float largest(Logits& logits) {
  FloatV largest = Lane<FloatV>::splat(-__builtin_inff());
  for (int64_t b = 0; b < logits.blocks(); ++b) {
    const float* values = logits.block(b);
    for (int i = 0; i < logits.vectors(b); ++i) {
      const FloatV v = load(values + i * kLanes);
      largest = v <= largest ? largest : v;  // a NaN comes through here, or in the sum
    }
  }
  float result = largest[0];
  for (int i = 1; i < kLanes; ++i) result = largest[i] <= result ? result : largest[i];
  return result;
}

// exp(logit - shift) of a block's classes; their total.
float exponentials(Logits& logits, int64_t block, float shift, float* terms) {
  const float* values = logits.block(block);
  FloatV lanes[kParts] = {};
  for (int i = 0; i < logits.vectors(block); ++i) {
    const FloatV term = exp_negative<FloatV>(load(values + i * kLanes) - shift);
    store(terms + i * kLanes, term);
    lanes[i % kParts] = i < kParts ? term : lanes[i % kParts] + term;
  }
  return fold(lanes);
}

// `terms` are those of the last block.
float sum_of_exponentials(Logits& logits, float shift, float* terms) {
  double sum = 0.0;
  for (int64_t first = 0; first < logits.blocks(); first += kBlocks) {
    double totals[kBlocks];
    int count = 0;
    for (int64_t b = first; b < logits.blocks() && count < kBlocks; ++b)
      totals[count++] = exponentials(logits, b, shift, terms);
    sum += fold(totals, count);
  }
  return static_cast<float>(sum);
}

// `target` is one of the classes, or -1; `terms` the exponentials of the last block.
void store_gradient(const CategoricalCall& call, Logits& logits, int64_t position, int64_t target, float shift, float sum,
                    float scale, float* terms) {
  for (int64_t b = logits.blocks() - 1; b >= 0; --b) {
    if (b < logits.blocks() - 1) exponentials(logits, b, shift, terms);
    for (int i = 0; i < logits.vectors(b); ++i)
      store(terms + i * kLanes, Lane<FloatV>::divide(load(terms + i * kLanes), Lane<FloatV>::splat(sum)));
    if (target >= 0 && target / kColumns == b) terms[target % kColumns] -= 1.0f;
    for (int i = 0; i < logits.vectors(b); ++i) store(terms + i * kLanes, load(terms + i * kLanes) * scale);
    from_float(terms, logits.count(b), call.grad, call.dtype, position * call.classes + b * kColumns);
  }
}

bool seen(const CategoricalCall& call, int64_t position) {
  const bool dropped = call.weight && call.weight[position / call.positions] == 0.0f;
  return !dropped && (!call.mask || call.mask[position]);
}

// Few classes fill a vector badly, and what is done once for each position, across its lanes, takes most of the time:
// kLanes positions at once instead, one in each lane. Every sum is in the order of `fold`, so that the bits are those of
// one position at a time. Measured beside that: .12 of its time at 2 classes, .19 at 10, as long at 64.
constexpr int64_t kFewClasses = 48;

void few_classes(const CategoricalCall& call, int64_t first) {
  alignas(64) float rows[kFewClasses * kLanes], terms[kFewClasses * kLanes];
  alignas(64) float target_logit[kLanes], scale[kLanes], energy[kLanes];
  const int64_t classes = call.classes, from = first * classes;
  const int count = static_cast<int>(classes * kLanes);
  const float* logits = static_cast<const float*>(call.logits) + from;
  if (call.dtype != kFloat32) {
    to_float(call.logits, call.dtype, from, count, rows);
    logits = rows;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int64_t c = 0; c < classes; ++c) terms[c * kLanes + lane] = logits[lane * classes + c];

  FloatV shift = Lane<FloatV>::splat(-__builtin_inff());
  for (int64_t c = 0; c < classes; ++c) {
    const FloatV v = load(terms + c * kLanes);
    shift = v <= shift ? shift : v;
  }
  FloatV lanes[kFold] = {};
  for (int64_t c = 0; c < classes; ++c) {
    const FloatV term = exp_negative<FloatV>(load(terms + c * kLanes) - shift);
    store(terms + c * kLanes, term);
    lanes[c % kFold] = lanes[c % kFold] + term;
  }
  for (int width = kFold / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] + lanes[i + width];
  const FloatV sum = lanes[0];

  const float nothing = __builtin_nanf("");
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t target = call.target[first + lane];
    const bool exists = target >= 0 && target < classes;
    target_logit[lane] = exists ? logits[lane * classes + target] : nothing;
    scale[lane] = exists ? call.row_scale[(first + lane) / call.positions] : nothing;
  }
  store(energy, log<FloatV>(sum) - (load(target_logit) - shift));
  for (int lane = 0; lane < kLanes; ++lane) call.energies[first + lane] = seen(call, first + lane) ? energy[lane] : 0.0f;
  if (!call.grad) return;

  for (int64_t c = 0; c < classes; ++c)
    store(terms + c * kLanes, Lane<FloatV>::divide(load(terms + c * kLanes), sum));
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t target = call.target[first + lane];
    if (target >= 0 && target < classes) terms[target * kLanes + lane] -= 1.0f;
  }
  for (int64_t c = 0; c < classes; ++c) store(terms + c * kLanes, load(terms + c * kLanes) * load(scale));
  for (int lane = 0; lane < kLanes; ++lane) {
    float* row = rows + lane * classes;
    if (seen(call, first + lane))
      for (int64_t c = 0; c < classes; ++c) row[c] = terms[c * kLanes + lane];
    else
      __builtin_memset(row, 0, classes * sizeof(float));
  }
  from_float(rows, count, call.grad, call.dtype, from);
}

}  // namespace

void categorical_positions(const CategoricalCall& call, int64_t begin, int64_t end) {
  if (call.classes <= kFewClasses)
    for (; begin + kLanes <= end; begin += kLanes) few_classes(call, begin);
  for (int64_t position = begin; position < end; ++position) {
    if (!seen(call, position)) {
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
    alignas(64) float terms[kColumns];
    const float shift = largest(logits), sum = sum_of_exponentials(logits, shift, terms);
    const float nothing = __builtin_nanf("");
    call.energies[position] = exists ? log<float>(sum) - (logits.at(target) - shift) : nothing;
    if (call.grad)
      store_gradient(call, logits, position, exists ? target : -1, shift, sum,
                     exists ? call.row_scale[position / call.positions] : nothing, terms);
  }
}

}  // namespace fe::FE_ISA
