#include "cpu/optimizers/variational_kl.h"

#include "cpu/free_energy/row_sum.h"

namespace fe::FE_ISA {

namespace {

// A term is long enough that only few lines are asked for ahead of it. From 1 to 8 KB ahead tried: 2 KB takes 40% off the
// time of data in memory.
constexpr int kAhead = 512;

// Where all ratios of a few rows are in [kLeastRatio, 1/2], no digit is lost in r - 1 - log r, and their product, which
// stays normal, has the sum of their logarithms: one logarithm for kRowsPerLog, which are half of the work. Decided by
// kRowsPerLog whole rows, so that every instruction set decides alike.
constexpr int kRowsPerLog = 4;
constexpr float kLeastRatio = 0x1p-31f;

// The sums of a block in the order of row_sum.h.
template <bool kDeviations>
void block_sums(const float* mean, const float* spread, const VariationalKlCoefficients& c, double& kl, double& log_ratio) {
  using Ratio = VarianceRatio<kDeviations, FloatV>;
  FloatV kls[kParts] = {}, ratios[kParts] = {};
  for (int column = 0; column < kColumns; column += kRowsPerLog * kFold) {
    Ratio rows[kRowsPerLog * kParts];
    SignedV narrow = FloatV{} == 0.0f;
    for (int i = 0; i < kRowsPerLog * kParts; ++i) {
      const int at = column + i * kLanes;
      __builtin_prefetch(mean + at + kAhead);
      __builtin_prefetch(spread + at + kAhead);
      rows[i] = Ratio::of(load(spread + at), c);
      narrow = narrow & (rows[i].value >= kLeastRatio) & (rows[i].value <= 0.5f);
    }
    if (Lane<FloatV>::all(narrow)) {
      FloatV products[kParts];
      for (int i = 0; i < kRowsPerLog * kParts; ++i) {
        const int part = i % kParts;
        const FloatV m = load(mean + column + i * kLanes);
        kls[part] = kls[part] + Lane<FloatV>::fma(m * c.prior_precision, m, rows[i].excess);
        products[part] = i < kParts ? rows[i].value : products[part] * rows[i].value;
      }
      for (int part = 0; part < kParts; ++part) {
        const FloatV negative_logs = negative_log<FloatV>(products[part], 1.0f - products[part]).value;
        kls[part] = kls[part] + negative_logs;
        ratios[part] = ratios[part] - negative_logs;
      }
      continue;
    }
    for (int i = 0; i < kRowsPerLog * kParts; ++i) {
      const auto term = VariationalKl<kDeviations, FloatV>::of(load(mean + column + i * kLanes), rows[i], c);
      kls[i % kParts] = kls[i % kParts] + term.twice_kl;
      ratios[i % kParts] = ratios[i % kParts] + term.log_ratio;
    }
  }
  kl = fold(kls);
  log_ratio = fold(ratios);
}

// The same of the last block, of which the first `count` elements are real.
template <bool kDeviations>
void last_block_sums(const float* mean, const float* spread, int count, const VariationalKlCoefficients& c, double& kl,
                     double& log_ratio) {
  FloatV kls[kParts] = {}, ratios[kParts] = {};
  for (int at = 0; at < count; at += kLanes) {
    alignas(64) float padded[2][kLanes] = {};
    const int real = count - at < kLanes ? count - at : kLanes;
    __builtin_memcpy(padded[0], mean + at, real * sizeof(float));
    __builtin_memcpy(padded[1], spread + at, real * sizeof(float));
    const auto ratio = VarianceRatio<kDeviations, FloatV>::of(load(padded[1]), c);
    auto term = VariationalKl<kDeviations, FloatV>::of(load(padded[0]), ratio, c);
    for (int i = real; i < kLanes; ++i) term.twice_kl[i] = term.log_ratio[i] = 0.0f;
    const int part = at % kFold / kLanes;
    kls[part] = kls[part] + term.twice_kl;
    ratios[part] = ratios[part] + term.log_ratio;
  }
  kl = fold(kls);
  log_ratio = fold(ratios);
}

template <bool kDeviations>
void segments(const VariationalKlCall& call, int64_t begin, int64_t end) {
  static_assert(kBlocks * kColumns == kKlSegment);
  const VariationalKlCoefficients c = call.coefficients;
  for (int64_t segment = begin; segment < end; ++segment) {
    const int64_t first = segment * kKlSegment;
    const int64_t count = call.count - first < kKlSegment ? call.count - first : kKlSegment;
    double kls[kBlocks], ratios[kBlocks];
    int blocks = 0;
    for (int64_t at = 0; at < count; at += kColumns, ++blocks) {
      const float *mean = call.mean + first + at, *spread = call.spread + first + at;
      if (count - at >= kColumns)
        block_sums<kDeviations>(mean, spread, c, kls[blocks], ratios[blocks]);
      else
        last_block_sums<kDeviations>(mean, spread, static_cast<int>(count - at), c, kls[blocks], ratios[blocks]);
    }
    call.sums[2 * segment] = fold(kls, blocks);
    call.sums[2 * segment + 1] = fold(ratios, blocks);
  }
}

}  // namespace

void variational_kl(const VariationalKlCall& call, int64_t begin, int64_t end) {
  call.coefficients.deviations ? segments<true>(call, begin, end) : segments<false>(call, begin, end);
}

}  // namespace fe::FE_ISA
