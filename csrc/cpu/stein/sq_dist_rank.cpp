// One pass over the tiles of pairs i < j counts the distances below a bracket that holds the rank, sorts those inside into
// bins, and collects them while they fit into a buffer. The bracket comes from a sample of pairs, four standard errors to
// either side, so that one pass nearly always does; where it does not, the next one has the rank's bin for its bracket.
//
// Counts and sets of values do not depend on the order of tiles, and tiles have the same bits each time: the result is
// exact, on any number of threads.
#include "cpu/stein/sq_dist_rank.h"

#include "cpu/buffer.h"
#include "cpu/stein/sq_dist_tiles.h"
#include "cpu/stein/wide_products.h"

namespace fe::FE_ISA {

namespace {


// Packs all points, less their mean where inner products would lose digits by it.
void pack_all(const void* particles, DType dtype, const Points& points, ParallelFor parallel_for) {
  const int64_t n = points.n, d = points.d;
  Buffer<float> means(d);
  const float* centre = by_differences(points) ? nullptr : static_cast<float*>(means);
  if (centre)
    in_parallel(parallel_for, (d + kTile - 1) / kTile, 1 + kGrainFlops / (n * kTile), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kTile, last = smaller(end * kTile, d);
      column_means({particles, dtype, d, first, last - first}, n, means + first);
    });
  in_parallel(parallel_for, points.blocks(), 1 + kGrainFlops / (8 * kTile * d), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) pack({particles, dtype, d, 0, d}, centre, block, points);
  });
}

// A sample of the distances, to their rounding: pair s is point s % n, so that each is drawn as often as any other, with
// a random one of the rest.
class Sample {
 public:
  Sample(const Points& points, int64_t size, ParallelFor parallel_for) : size_(size), keys_(size) {
    in_parallel(parallel_for, size, 1 + kGrainFlops / (2 * points.d + 64), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) keys_[s] = draw(points, s);
    });
  }

  // The bracket of these ranks among `pairs`; and how many keys it expects in it.
  void bracket(int64_t first, int64_t last, int64_t pairs, uint32_t& low, uint32_t& high, double& expected) {
    const double from = position(first, pairs, -4.0) - 2.0, to = position(last, pairs, 4.0) + 2.0;
    const double size = static_cast<double>(size_);
    if (from >= 0.0) low = larger(low, at(from) - kRounding);
    if (to < size) high = smaller(high, at(to) + kRounding);
    high = larger(low, high);
    expected = (smaller(to, size) - larger(from, 0.0)) / size * static_cast<double>(pairs);
  }

  uint32_t value(int64_t rank, int64_t pairs) { return size_ ? at(position(rank, pairs, 0.0)) : 0; }

 private:
  // Units in the last place that a bracket is wider by, for distances that are equal but for their rounding.
  static constexpr uint32_t kRounding = 16;

  // Where a rank stands in the sample, and so many standard errors to the side.
  double position(int64_t rank, int64_t pairs, double errors) const {
    const double p = (static_cast<double>(rank) + 0.5) / static_cast<double>(pairs), size = static_cast<double>(size_);
    return size * p + errors * __builtin_sqrt(size * p * (1.0 - p));
  }

  uint32_t at(double position) {
    return smaller(larger(select(keys_, size_, static_cast<int64_t>(position)), kRounding), kInfinity);
  }

  static Key draw(const Points& points, int64_t s) {
    uint64_t word = static_cast<uint64_t>(s) * 0x9e3779b97f4a7c15u + 0x9e3779b97f4a7c15u;  // SplitMix64
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9u;
    word = (word ^ word >> 27) * 0x94d049bb133111ebu;
    word ^= word >> 31;
    const int64_t i = s % points.n;
    int64_t j = static_cast<int64_t>((word >> 32) * static_cast<uint64_t>(points.n - 1) >> 32);
    j += j >= i;
    const float *x = points.rows + i * points.stride, *y = points.rows + j * points.stride;
    FloatV sum{};
    float t = 0.0f;
    if (by_differences(points)) {
      for (int64_t k = 0; k < points.stride; k += kLanes) sum += (load(x + k) - load(y + k)) * (load(x + k) - load(y + k));
      for (int lane = 0; lane < kLanes; ++lane) t += sum[lane];
    } else {
      for (int64_t k = 0; k < points.stride; k += kLanes) sum += load(x + k) * load(y + k);
      for (int lane = 0; lane < kLanes; ++lane) t += sum[lane];
      t = points.norms[i] + points.norms[j] - 2.0f * t;
      t = t < 0.0f ? 0.0f : t;
    }
    return {Lane<float>::bits(t)};
  }

  int64_t size_;
  Buffer<Key> keys_;
};

// One pass over the pairs: how many keys are below a bracket, and those inside, in bins; also in `found`, while there is
// room, the keys of all bins or of some.
class Pass {
 public:
  Pass(const Points& points, uint32_t low, uint32_t high, Key* found, int64_t room)
      : low(low), high(high), bins(low, high), points_(points), found_(found), room_(room), last_(bins.used - 1) {}

  // Collects only bins around that of `centre`, `share` of all.
  void narrow(uint32_t centre, double share) {
    const int width = larger(1, static_cast<int>(share * bins.used));
    const int middle = static_cast<int>((larger(low, smaller(centre, high)) - low) >> bins.shift);
    first_ = larger(0, smaller(middle - width / 2, bins.used - width));
    last_ = first_ + width - 1;
  }

  void scan_all(ParallelFor parallel_for) {
    const int64_t blocks = points_.blocks(), grain = 1 + kGrainFlops / (kTile * kTile * (2 * points_.d + 8));
    in_parallel(parallel_for, blocks * (blocks + 1) / 2, grain, [&](int64_t begin, int64_t end) {
      by_differences(points_) ? scan<true>(begin, end) : scan<false>(begin, end);
    });
    inside = bins.total();
  }

  bool collected(int bin) const { return first_ <= bin && bin <= last_ && reserved_ <= room_; }
  int64_t size() const { return reserved_; }

  const uint32_t low, high;
  Bins bins;
  int64_t below = 0, inside = 0;

 private:
  template <bool kDifferences>
  void scan(int64_t begin, int64_t end) {
    Bins own(low, high);
    Key keys[kTile * kTile + kLanes];
    int64_t smaller_ones = 0;
    auto [i, j] = tile_number(points_.blocks(), begin);
    for (int64_t at = begin; at < end; ++at) {
      const int count = sift_tile<kDifferences>({points_, i, points_, j, i == j}, low, high - low, smaller_ones, keys);
      int kept = 0;
      for (int k = 0; k < count; ++k) {
        const int bin = own.add(keys[k]);
        keys[kept] = keys[k];
        kept += first_ <= bin && bin <= last_;
      }
      if (kept) keep(keys, kept);
      if (++j == points_.blocks()) j = ++i;
    }
    bins.merge(own);
    __atomic_fetch_add(&below, smaller_ones, __ATOMIC_RELAXED);
  }

  void keep(const Key* keys, int count) {
    const int64_t at = __atomic_fetch_add(&reserved_, count, __ATOMIC_RELAXED);
    if (at + count <= room_) __builtin_memcpy(found_ + at, keys, count * sizeof(Key));
  }

  const Points& points_;
  Key* found_;
  int64_t room_, reserved_ = 0;
  int first_ = 0, last_;
};

// A rank, and what is known of its key.
struct Target {
  int64_t rank, slot;               // slot: in `out` and `hint`
  uint32_t low = 0, high = kInfinity;
  double most;                      // at most so many keys lie from low to high
  bool sampled = false, done = false;

  bool operator<(const Target& other) const { return rank < other.rank; }
};

class Search {
 public:
  Search(const RankCall& call, const Points& points)
      : call_(call), points_(points), pairs_(points.n * (points.n - 1) / 2), targets_(call.count) {
    for (int64_t slot = 0; slot < call.count; ++slot) {
      targets_[slot] = {.rank = call.ranks[slot], .slot = slot, .most = static_cast<double>(pairs_)};
      if (call.ranks[slot] < 0 || call.ranks[slot] >= pairs_) settle(targets_[slot], kPadding);
      if (points.d == 0 && !targets_[slot].done) settle(targets_[slot], 0);
    }
    std::sort(targets_ + 0, targets_ + call.count);
  }

  // From all distances but those that are NaN.
  void among(Key* keys, int64_t count) {
    int64_t from = 0;  // what is before it is not larger
    for (int64_t t = 0; t < call_.count; ++t) {
      Target& target = targets_[t];
      if (target.done) continue;
      settle(target, target.rank < count ? select(keys + from, count - from, target.rank - from) : kPadding);
      if (target.rank < count && count <= kSorted) from = target.rank;
    }
  }

  void in_one_tile() {
    Key keys[kTile * kTile + kLanes];
    int64_t below = 0;
    const TileOfPairs tile{points_, 0, points_, 0, true};
    among(keys, by_differences(points_) ? sift_tile<true>(tile, 0, kInfinity, below, keys)
                                        : sift_tile<false>(tile, 0, kInfinity, below, keys));
  }

  void among_wide(const WideDistances& distances) {
    const Buffer<Key> keys(pairs_);
    int64_t count = 0;
    for (int64_t i = 0; i < call_.n; ++i)
      for (int64_t j = i + 1; j < call_.n; ++j) {
        keys[count] = {Lane<float>::bits(*distances.at(i, j))};
        count += keys[count].bits <= kInfinity;
      }
    among(keys, count);
  }

  void in_passes() {
    const int64_t room = room_for_keys(), size = sample_size(room);
    Sample sample(points_, size, call_.parallel_for);
    Buffer<Key> found(room);
    for (int64_t at = 0; at < call_.count;) {
      Target& first = targets_[at];
      if (first.done) {
        ++at;
        continue;
      }
      const int64_t end = end_of_group(at, room);
      const Target& last = targets_[end - 1];
      uint32_t low = first.low, high = last.high;
      double expected = joint(first, last), fits = static_cast<double>(room);
      if (size && !first.sampled) {
        sample.bracket(first.rank, last.rank, pairs_, low, high, expected);
        fits *= 0.8;  // what is expected is an estimate
      }
      Pass pass(points_, low, high, found, room);
      if (expected > fits) {
        const float near = call_.hint ? call_.hint[first.slot] : -1.0f;
        const uint32_t hinted = Lane<float>::bits(near);  // of a negative number or NaN it is above any bracket
        const bool use = hinted >= low && hinted <= high;
        pass.narrow(use ? hinted : sample.value(first.rank, pairs_), 0.5 * fits / expected);
      }
      pass.scan_all(call_.parallel_for);
      for (int64_t t = at; t < call_.count; ++t)
        if (!targets_[t].done) learn(targets_[t], pass, found);
      for (int64_t t = at; t < end; ++t) targets_[t].sampled = true;
    }
  }

 private:
  // Nothing of it is touched before it is written. 4 MB to 10,000 points or so, 16 MB above.
  int64_t room_for_keys() const {
    if (pairs_ > int64_t{1} << 26) return int64_t{1} << 22;
    return smaller(pairs_, int64_t{1} << 20);
  }

  // Few enough to draw, and enough that few keys are inside the bracket; more, where only then those fit into `room` and
  // one pass does. 0: all distances are inside.
  int64_t sample_size(int64_t room) const {
    const double pairs = static_cast<double>(pairs_), side = 2.0 + static_cast<double>(points_.d) / 12.0;
    if (pairs_ <= int64_t{1} << 14 || (pairs_ <= room && pairs < side * side * side)) return 0;
    const double root = __builtin_cbrt(pairs), balanced = 0.5 * root * root;
    const double for_one_pass = 4.0 * pairs / (0.75 * static_cast<double>(room));
    const double size = for_one_pass * for_one_pass;
    return static_cast<int64_t>(size > balanced && size <= 4194304.0 ? size : balanced);
  }

  // At most so many keys lie from the first's lower end to the last's upper.
  static double joint(const Target& first, const Target& last) {
    if (first.low == last.low && first.high == last.high) return first.most;
    return first.most + last.most + static_cast<double>(last.rank - first.rank);
  }

  // Ranks to be found in one pass: close ones, whose keys are in one bracket or fit together.
  int64_t end_of_group(int64_t at, int64_t room) const {
    const Target& first = targets_[at];
    int64_t end = at + 1;
    for (; end < call_.count; ++end) {
      const Target& next = targets_[end];
      if (next.done || next.sampled != first.sampled || next.rank - first.rank > room / 4) break;
      const bool same = next.low == first.low && next.high == first.high;
      if (!same && joint(first, next) > static_cast<double>(room)) break;
    }
    return end;
  }

  void learn(Target& target, const Pass& pass, Key* found) {
    int64_t rank = target.rank - pass.below;
    if (rank < 0) {
      target.high = smaller(target.high, pass.low - 1);
      target.most = smaller(target.most, static_cast<double>(pass.below));
    } else if (rank >= pass.inside && pass.high == kInfinity) {
      settle(target, kPadding);
    } else if (rank >= pass.inside) {
      target.low = larger(target.low, pass.high + 1);
      target.most = smaller(target.most, static_cast<double>(pairs_ - pass.below - pass.inside));
    } else {
      const int at = pass.bins.find(rank);
      const Bins::Bin& bin = pass.bins.bins[at];
      if (bin.least == bin.largest) {
        settle(target, bin.least);
      } else if (pass.collected(at)) {
        settle(target, select(found, to_front(found, pass.size(), bin.least, bin.largest), rank));
      } else {
        target.low = larger(target.low, bin.least);
        target.high = smaller(target.high, bin.largest);
        target.most = smaller(target.most, static_cast<double>(bin.count));
      }
    }
  }

  void settle(Target& target, uint32_t key) {
    call_.out[target.slot] = key > kInfinity ? __builtin_nanf("") : Lane<float>::from_bits(key);
    target.done = true;
  }

  const RankCall& call_;
  const Points& points_;
  int64_t pairs_;
  Buffer<Target> targets_;
};

}  // namespace

void sq_dist_rank(const RankCall& call) {
  const int64_t n = call.n, d = call.d;
  const bool wide = WideShape::fits(n, d);
  const Buffer<float> memory(wide ? 0 : Points::floats(n, d));
  const Points points(n, d, memory);
  Search search(call, points);
  if (n < 2 || d == 0) return;
  if (wide) return search.among_wide(WideDistances({call.particles, call.dtype, d, 0, d}, n, call.parallel_for));
  pack_all(call.particles, call.dtype, points, call.parallel_for);
  n <= kTile ? search.in_one_tile() : search.in_passes();
}

void sq_dist(int64_t n, int64_t d, const void* particles, DType dtype, float* out) {
  if (d == 0) __builtin_memset(out, 0, n * n * sizeof(float));
  if (n == 0 || d == 0) return;
  if (WideShape::fits(n, d)) {
    const WideDistances distances({particles, dtype, d, 0, d}, n, nullptr);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i; j < n; ++j) out[i * n + j] = out[j * n + i] = *distances.at(i, j);
    return;
  }
  const Buffer<float> memory(Points::floats(n, d));
  const Points points(n, d, memory);
  pack_all(particles, dtype, points, nullptr);
  alignas(64) float tile[kTile * kTile];
  for (int64_t a = 0; a < points.blocks(); ++a)
    for (int64_t b = 0; b < points.blocks(); ++b) {
      by_differences(points) ? distances<true>({points, a, points, b, a == b}, tile)
                             : distances<false>({points, a, points, b, a == b}, tile);
      for (int i = 0; i < points.count(a); ++i)
        __builtin_memcpy(out + (a * kTile + i) * n + b * kTile, tile + i * kTile, points.count(b) * sizeof(float));
    }
}

}  // namespace fe::FE_ISA
