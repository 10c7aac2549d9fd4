// Inner products of all pairs of few points with very many coordinates, in one pass over those: a block of columns at a
// time, which stays in the L2 cache, and segments of columns on different threads.
#pragma once

#include "cpu/buffer.h"
#include "cpu/stein/tiles.h"
#include "cpu/threads.h"

namespace fe::inline FE_ISA {

struct WideShape {
  static constexpr int64_t kSegments = 32;  // of columns, whose products are summed apart, whatever the threads are
  static constexpr int64_t kLeastSegment = 1024;
  static_assert(kLeastSegment % kDepth == 0);

  // Fewer columns do not repay it, nor do more points, whose panels are read often enough to be kept.
  static bool fits(int64_t n, int64_t d) { return n <= 512 && d >= 2048; }

  int64_t n, d;

  int64_t blocks() const { return (n + kTile - 1) / kTile; }
  int64_t tiles() const { return blocks() * (blocks() + 1) / 2; }
  int64_t tile(int64_t a, int64_t b) const { return b * (b + 1) / 2 + a; }  // a <= b
  int64_t segment() const {
    const int64_t length = round_up((d + kSegments - 1) / kSegments, kDepth);
    return length < kLeastSegment ? kLeastSegment : length;
  }
  int64_t segments() const { return (d + segment() - 1) / segment(); }
  int64_t floats() const { return segments() * tiles() * kTile * kTile; }
};

// The products of points less their means, or their squared distances: those of each segment of columns on its own, tile after
// tile. points: all columns of `shape`, or those of some segments. `means`: points.count floats, written; differences have
// no need of them.
template <bool kDifferences>
void segment_products(const Columns& points, const WideShape& shape, float* means, float* out, ParallelFor parallel_for) {
  const int64_t whole = shape.tiles() * kTile * kTile, segments = (points.count + shape.segment() - 1) / shape.segment();
  in_parallel(parallel_for, segments, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> packed(Points::floats(shape.n, kDepth));
    for (int64_t segment = begin; segment < end; ++segment) {
      const int64_t first = segment * shape.segment();
      const int64_t last = first + shape.segment() < points.count ? first + shape.segment() : points.count;
      for (int64_t at = first; at < last; at += kDepth) {
        const Columns some = points.part(at, last - at < kDepth ? last - at : kDepth);
        const Points block(shape.n, some.count, packed);
        if (!kDifferences) column_means(some, shape.n, means + at);
        for (int64_t a = 0; a < shape.blocks(); ++a) pack(some, kDifferences ? nullptr : means + at, a, block);
        for (int64_t b = 0; b < shape.blocks(); ++b)
          for (int64_t a = 0; a <= b; ++a)
            products<kDifferences>(block.row_block(a), block.stride, block.count(a), block.panel(b),
                                   static_cast<int>(round_up(block.count(b), kUnit)), some.count, at > first,
                                   out + segment * whole + shape.tile(a, b) * kTile * kTile);
      }
    }
  });
}

// Those of all columns, summed at the front of `memory`, which has room for shape.floats().
template <bool kDifferences>
void wide_products(const Columns& points, const WideShape& shape, float* means, float* memory, ParallelFor parallel_for) {
  const int64_t whole = shape.tiles() * kTile * kTile;
  segment_products<kDifferences>(points, shape, means, memory, parallel_for);
  // What lies in the padding is summed too, and is no number.
  in_parallel(parallel_for, whole, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0.0;
      for (int64_t segment = 0; segment < shape.segments(); ++segment) sum += memory[segment * whole + i];
      memory[i] = static_cast<float>(sum);
    }
  });
}

// All squared distances of such points.
class WideDistances {
 public:
  WideDistances(const Columns& points, int64_t n, ParallelFor parallel_for)
      : shape_{n, points.count}, tiles_(shape_.floats()) {
    const Buffer<float> means(points.count);
    wide_products<false>(points, shape_, means, tiles_, parallel_for);
    const Buffer<float> norms(shape_.blocks() * kTile);
    for (int64_t i = 0; i < shape_.blocks() * kTile; ++i) norms[i] = i < n ? *at(i, i) : 0.0f;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i / kTile * kTile; j < n; j += kLanes) store(at(i, j), sq_dist<false>(at(i, j), norms[i], norms + j));
  }

  // From row i to column j, of the same block or a later one.
  float* at(int64_t i, int64_t j) const {
    return tiles_ + (shape_.tile(i / kTile, j / kTile) * kTile + i % kTile) * kTile + j % kTile;
  }

 private:
  WideShape shape_;
  Buffer<float> tiles_;
};

}  // namespace fe::inline FE_ISA
