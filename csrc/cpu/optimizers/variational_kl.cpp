#include "cpu/optimizers/variational_kl.h"

#include "cpu/free_energy/row_sum.h"

namespace fe::FE_ISA {

namespace {

// The sums of a block in the order of row_sum.h, from addresses that have all of it; the first `count` elements are real.
void block_sums(const float* mean, const float* spread, int count, const VariationalKlCoefficients& c, double& kl, double& log_ratio) {
  FloatV kls[kParts] = {}, ratios[kParts] = {};
  for (int column = 0; column < kColumns; column += kFold) {
    for (int part = 0; part < kParts; ++part) {
      const int at = column + part * kLanes;
      if (at >= count) continue;
      const VariationalKl<FloatV> term = VariationalKl<FloatV>::of(load(mean + at), load(spread + at), c);
      FloatV twice_kl = term.twice_kl, ratio = term.log_ratio;
      if (at + kLanes > count)
        for (int i = 0; i < kLanes; ++i)
          if (at + i >= count) twice_kl[i] = ratio[i] = 0.0f;
      kls[part] = kls[part] + twice_kl;
      ratios[part] = ratios[part] + ratio;
    }
  }
  kl = fold(kls);
  log_ratio = fold(ratios);
}

}  // namespace

void variational_kl(const VariationalKlCall& call, int64_t begin, int64_t end) {
  static_assert(kBlocks * kColumns == kKlSegment);
  for (int64_t segment = begin; segment < end; ++segment) {
    const int64_t first = segment * kKlSegment;
    const int64_t count = call.count - first < kKlSegment ? call.count - first : kKlSegment;
    double kls[kBlocks], ratios[kBlocks];
    int blocks = 0;
    for (int64_t at = 0; at < count; at += kColumns, ++blocks) {
      const float *mean = call.mean + first + at, *spread = call.spread + first + at;
      touch_ahead(mean);
      touch_ahead(spread);
      if (count - at >= kColumns) {
        block_sums(mean, spread, kColumns, call.coefficients, kls[blocks], ratios[blocks]);
        continue;
      }
      alignas(64) float padded[2][kColumns] = {};
      __builtin_memcpy(padded[0], mean, (count - at) * sizeof(float));
      __builtin_memcpy(padded[1], spread, (count - at) * sizeof(float));
      block_sums(padded[0], padded[1], static_cast<int>(count - at), call.coefficients, kls[blocks], ratios[blocks]);
    }
    call.sums[2 * segment] = fold(kls, blocks);
    call.sums[2 * segment + 1] = fold(ratios, blocks);
  }
}

}  // namespace fe::FE_ISA
