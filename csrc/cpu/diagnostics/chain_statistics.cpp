#include "cpu/diagnostics/chain_statistics.h"

namespace fe::FE_ISA {

namespace {

constexpr int kPartials = 8;  // sums in an order of their own, which every instruction set keeps
constexpr int kDigit = 11, kDigits = 1 << kDigit;
constexpr double kConstant = 1e-15;  // a smaller range is a constant's
constexpr uint32_t kMiddle = 0xffffffff;
constexpr double kTails[2] = {0.05, 0.95};

double folded(const double (&partial)[kPartials]) {
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) + ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

double sum(const double* x, int64_t n) {
  double partial[kPartials] = {};
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials)
    for (int j = 0; j < kPartials; ++j) partial[j] += x[i + j];
  for (int j = 0; i + j < n; ++j) partial[j] += x[i + j];
  return folded(partial);
}

double product(const double* x, const double* y, int64_t n) {
  double partial[kPartials] = {};
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials)
    for (int j = 0; j < kPartials; ++j) partial[j] += x[i + j] * y[i + j];
  for (int j = 0; i + j < n; ++j) partial[j] += x[i + j] * y[i + j];
  return folded(partial);
}

double squares_about(const double* x, double mean, int64_t n) {
  double partial[kPartials] = {};
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials)
    for (int j = 0; j < kPartials; ++j) partial[j] += (x[i + j] - mean) * (x[i + j] - mean);
  for (int j = 0; i + j < n; ++j) partial[j] += (x[i + j] - mean) * (x[i + j] - mean);
  return folded(partial);
}

bool is_constant(const double* x, int64_t n) {
  for (int64_t i = 1; i < n; ++i)
    if (x[i] - x[0] > kConstant || x[0] - x[i] > kConstant) return false;
  return true;
}

// Keys in the order of the numbers.
inline uint32_t key_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline uint64_t key_of(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

// One weight's draws: sorted once, then ranked, folded and compared with their quantiles.
template <class Number>
class Weight {
  using Key = decltype(key_of(Number{}));

 public:
  Weight(const ChainCall& call, double* scratch) : call_(call), n_(call.total()), half_(call.half()), rows_(2 * call.chains) {
    const int64_t each = n_ + 8;
    words_[0] = reinterpret_cast<uint64_t*>(scratch);
    words_[1] = reinterpret_cast<uint64_t*>(scratch + each);
    places_[0] = reinterpret_cast<uint32_t*>(scratch + 2 * each);
    places_[1] = reinterpret_cast<uint32_t*>(scratch + 3 * each);
    values_ = scratch + 4 * each;
    merged_ = scratch + 5 * each;
    scores_ = scratch + 6 * each;
    in_halves_ = reinterpret_cast<uint32_t*>(scratch + 7 * each);
    distances_ = scratch;  // where the sort has ended by then
    for (int64_t chain = 0, place = 0; chain < call.chains; ++chain)
      for (int64_t draw = 0; draw < call.draws; ++draw, ++place) {
        const int64_t second = draw - (call.draws - half_);
        const int64_t at = draw < half_ ? chain * half_ + draw : (call.chains + chain) * half_ + second;
        in_halves_[place] = draw >= half_ && second < 0 ? kMiddle : static_cast<uint32_t>(at);
      }
  }

  void run(const Number* x, int64_t weight) {
    double* out = call_.out + weight;
    for (int64_t i = 0; i < n_; ++i)
      if (!__builtin_isfinite(x[i])) {
        for (int s = 0; s < 3; ++s)
          if (call_.wanted >> s & 1) out[s * call_.weights] = __builtin_nan("");
        return;
      }
    sort(x);
    if (call_.wanted & kTail) out[2 * call_.weights] = tails(x);
    drop_middles(x);
    const int64_t m = rows_ * half_;
    if (call_.wanted & (kRhat | kBulk)) score(values_, places_[0], m);
    double rhat = call_.wanted & kRhat ? split_rhat() : 0.0;
    if (call_.wanted & kBulk) out[call_.weights] = effective_size();
    if (!(call_.wanted & kRhat)) return;
    fold(m);
    score(merged_, places_[1], m);
    out[0] = __builtin_fmax(rhat, split_rhat());  // folded draws of two values are a constant, which has none
  }

 private:
  // Digits from the lowest on: places_[0] are those of the draws in ascending order. float32's keys and places share a word,
  // so that one array moves instead of two.
  void sort(const Number* x) {
    constexpr bool kPacked = sizeof(Key) == 4;
    constexpr int kPasses = (8 * static_cast<int>(sizeof(Key)) + kDigit - 1) / kDigit, kLow = kPacked ? 32 : 0;
    uint32_t all[kPasses][kDigits] = {};
    for (int64_t i = 0; i < n_; ++i) {
      const uint64_t key = static_cast<uint64_t>(key_of(x[i]));
      words_[0][i] = kPacked ? key << 32 | static_cast<uint64_t>(i) : key;
      if constexpr (!kPacked) places_[0][i] = static_cast<uint32_t>(i);
      for (int pass = 0; pass < kPasses; ++pass) ++all[pass][key >> (pass * kDigit) & (kDigits - 1)];
    }
    for (int pass = 0; pass < kPasses; ++pass) {
      const int shift = kLow + pass * kDigit;
      uint32_t* counts = all[pass];
      if (counts[words_[0][0] >> shift & (kDigits - 1)] == n_) continue;  // all alike here
      uint32_t at = 0;
      for (int digit = 0; digit < kDigits; ++digit) {
        const uint32_t count = counts[digit];
        counts[digit] = at;
        at += count;
      }
      for (int64_t i = 0; i < n_; ++i) {
        const uint32_t to = counts[words_[0][i] >> shift & (kDigits - 1)]++;
        words_[1][to] = words_[0][i];
        if constexpr (!kPacked) places_[1][to] = places_[0][i];
      }
      swap(words_[0], words_[1]);
      if constexpr (!kPacked) swap(places_[0], places_[1]);
    }
    if constexpr (kPacked)
      for (int64_t i = 0; i < n_; ++i) places_[0][i] = static_cast<uint32_t>(words_[0][i]);
  }

  template <class T>
  static void swap(T*& a, T*& b) {
    T* const other = a;
    a = b;
    b = other;
  }

  // Of an odd number of draws the one in the middle is in neither half. Places become those in [first halves, second].
  void drop_middles(const Number* x) {
    int64_t kept = 0;
    for (int64_t k = 0; k < n_; ++k) {
      const uint32_t place = places_[0][k];
      if (in_halves_[place] == kMiddle) continue;
      values_[kept] = x[place];
      places_[0][kept++] = in_halves_[place];
    }
  }

  // Normal quantiles of the ranks of ascending values, ties at their mean rank.
  void score(const double* ascending, const uint32_t* places, int64_t m) {
    for (int64_t begin = 0; begin < m;) {
      int64_t end = begin + 1;
      while (end < m && ascending[end] == ascending[begin]) ++end;
      const double value = call_.scores[begin + end - 1];
      for (; begin < end; ++begin) scores_[places[begin]] = value;
    }
  }

  // Distances from the median, ascending: what lies below it and what lies above are in order already, as many of both. Which
  // of two is nearer is anybody's guess, so that a branch would be mispredicted half the time: places are chosen by
  // arithmetic. The nearest of those left and the farthest are found side by side, two chains of loads and comparisons that
  // do not wait for each other; neither reaches beyond its half before the other has met it.
  void fold(int64_t m) {
    const int64_t half = m / 2;
    const double median = (values_[half - 1] + values_[half]) / 2;
    for (int64_t k = 0; k < m; ++k) distances_[k] = __builtin_fabs(values_[k] - median);
    int64_t near_below = half - 1, near_above = half, far_below = 0, far_above = m - 1;
    for (int64_t k = 0; k < half; ++k) {
      const int64_t below = -static_cast<int64_t>(distances_[near_below] <= distances_[near_above]);
      const int64_t nearest = near_above ^ ((near_above ^ near_below) & below);
      near_below += below;
      near_above += 1 + below;
      const int64_t above = -static_cast<int64_t>(distances_[far_below] <= distances_[far_above]);
      const int64_t farthest = far_below ^ ((far_below ^ far_above) & above);
      far_above += above;
      far_below += 1 + above;
      merged_[k] = distances_[nearest];
      places_[1][k] = places_[0][nearest];
      merged_[m - 1 - k] = distances_[farthest];
      places_[1][m - 1 - k] = places_[0][farthest];
    }
  }

  double split_rhat() {
    double within = 0.0, mean = 0.0, squares = 0.0;
    for (int64_t row = 0; row < rows_; ++row) {
      const double* x = scores_ + row * half_;
      const double own = sum(x, half_) / static_cast<double>(half_);
      within += squares_about(x, own, half_) / static_cast<double>(half_ - 1);
      const double delta = own - mean;
      mean += delta / static_cast<double>(row + 1);
      squares += delta * (own - mean);
    }
    const double n = static_cast<double>(half_);
    const double between = n * squares / static_cast<double>(rows_ - 1);
    return __builtin_sqrt((between / (within / static_cast<double>(rows_)) + n - 1) / n);
  }

  double tails(const Number* x) {
    double least = __builtin_inf();
    for (const double tail : kTails) {
      const double at = tail * static_cast<double>(n_ - 1);
      const int64_t below = static_cast<int64_t>(at), above = below + 1 < n_ ? below + 1 : below;
      const double low = x[places_[0][below]], high = x[places_[0][above]], share = at - static_cast<double>(below);
      const double quantile = share < 0.5 ? low + share * (high - low) : high - (high - low) * (1 - share);
      for (int64_t chain = 0; chain < call_.chains; ++chain)
        for (int64_t i = 0; i < half_; ++i) {
          const Number* own = x + chain * call_.draws;
          scores_[chain * half_ + i] = own[i] <= quantile;
          scores_[(call_.chains + chain) * half_ + i] = own[call_.draws - half_ + i] <= quantile;
        }
      least = __builtin_fmin(least, effective_size());
    }
    return least;
  }

  // Of the rows in scores_, which are centred: Geyer's initial monotone sequence.
  double effective_size() {
    const int64_t m = rows_ * half_;
    if (is_constant(scores_, m)) return static_cast<double>(m);
    double mean = 0.0, squares = 0.0;
    double* centred = merged_;
    for (int64_t row = 0; row < rows_; ++row) {
      const double own = sum(scores_ + row * half_, half_) / static_cast<double>(half_), delta = own - mean;
      mean += delta / static_cast<double>(row + 1);
      squares += delta * (own - mean);
      for (int64_t i = 0; i < half_; ++i) centred[row * half_ + i] = scores_[row * half_ + i] - own;
    }
    const double n = static_cast<double>(half_);
    const auto covariance = [&](int64_t lag) {
      double total = 0.0;
      for (int64_t row = 0; row < rows_; ++row)
        total += product(centred + row * half_, centred + row * half_ + lag, half_ - lag);
      return total / static_cast<double>(rows_) / n;
    };
    const double first = covariance(0), within = first * n / (n - 1);
    const double all = first + squares / static_cast<double>(rows_ - 1);
    const auto correlation = [&](int64_t lag) { return lag == 0 ? 1.0 : 1 - (within - covariance(lag)) / all; };
    const int64_t most = (half_ - 1) / 2 - 1 > 0 ? (half_ - 1) / 2 - 1 : 0;
    double before = 0.0, smallest = __builtin_inf(), last = 1.0;
    for (int64_t pair = 0; pair <= most; ++pair) {
      // With an even lag at the end, its neighbour is one that the rows are too short for.
      const double even = correlation(2 * pair), both = even + correlation(2 * pair + 1);
      last = both >= 0 ? even : (even > 0 ? even : 0.0);
      if (both <= 0) break;
      if (pair == most) break;
      smallest = both < smallest ? both : smallest;
      before += smallest;
    }
    const double tau = 2 * before + last - 1;
    return static_cast<double>(m) / (tau > call_.least_tau ? tau : call_.least_tau);
  }

  const ChainCall& call_;
  int64_t n_, half_, rows_;
  uint64_t* words_[2];
  uint32_t *places_[2], *in_halves_;
  double *values_, *merged_, *scores_, *distances_;
};

template <class Number>
void blocks(const ChainCall& call, int64_t begin, int64_t end, double* scratch) {
  Weight<Number> one(call, scratch);
  const int64_t n = call.total();
  const Number* data = static_cast<const Number*>(call.data);
  Number* gathered = reinterpret_cast<Number*>(scratch + 8 * (n + 8));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kWeightBlock;
    const int64_t count = call.weights - first < kWeightBlock ? call.weights - first : kWeightBlock;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t w = 0; w < count; ++w) gathered[w * n + i] = data[i * call.weights + first + w];
    for (int64_t w = 0; w < count; ++w) one.run(gathered + w * n, first + w);
  }
}

}  // namespace

void chain_statistics(const ChainCall& call, int64_t begin, int64_t end, double* scratch) {
  if (call.is_double) {
    blocks<double>(call, begin, end, scratch);
  } else {
    blocks<float>(call, begin, end, scratch);
  }
}

}  // namespace fe::FE_ISA
