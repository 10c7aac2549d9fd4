// A share of the pairs, for processes that look for a rank together: how many distances lie below a bracket, and those inside,
// counted in bins of their leading bits. Counts do not depend on who counts which pairs, and a pair's distance has the same
// bits for everybody.
#include "cpu/buffer.h"
#include "cpu/stein/sq_dist_rank.h"
#include "cpu/stein/sq_dist_tiles.h"

namespace fe::FE_ISA {

static_assert(kScanBins == kBins);

namespace {


struct Packed {
  Packed(const ScanCall& call, const void* particles, int64_t n) : memory(Points::floats(n, call.d)), points(n, call.d, memory) {
    in_parallel(call.parallel_for, points.blocks(), 1 + kGrainFlops / (8 * kTile * call.d), [&](int64_t begin, int64_t end) {
      const float* means = by_differences(points) ? nullptr : call.means;
      for (int64_t block = begin; block < end; ++block) pack({particles, call.dtype, call.d, 0, call.d}, means, block, points);
    });
  }

  const Buffer<float> memory;
  const Points points;
};

}  // namespace

int64_t sq_dist_tiles(int64_t n, int64_t others) {
  const int64_t rows = (n + kTile - 1) / kTile, columns = (others + kTile - 1) / kTile;
  return others < 0 ? rows * (rows + 1) / 2 : rows * columns;
}

void sq_dist_scan(const ScanCall& call) {
  const Packed rows(call, call.particles, call.n);
  const Packed others(call, call.others, call.others ? call.other_n : 0);
  const Points& columns = call.others ? others.points : rows.points;
  const int64_t blocks = columns.blocks(), tiles = call.end - call.begin;
  Bins bins(call.low, call.high);
  int64_t below = 0, found = 0;
  in_parallel(call.parallel_for, tiles, 1 + kGrainFlops / (kTile * kTile * (2 * call.d + 8)), [&](int64_t begin, int64_t end) {
    Bins own(call.low, call.high);
    Key keys[kTile * kTile + kLanes];
    int64_t smaller_ones = 0;
    const int64_t first = call.begin + begin;
    auto [i, j] = call.others ? TileNumber{first / blocks, first % blocks} : tile_number(blocks, first);
    for (int64_t at = begin; at < end; ++at) {
      const TileOfPairs tile{rows.points, i, columns, j, !call.others && i == j};
      const uint32_t span = call.high - call.low;
      const int count = by_differences(columns) ? sift_tile<true>(tile, call.low, span, smaller_ones, keys)
                                                : sift_tile<false>(tile, call.low, span, smaller_ones, keys);
      for (int k = 0; k < count; ++k) own.add(keys[k]);
      const int64_t to = __atomic_fetch_add(&found, count, __ATOMIC_RELAXED);
      if (to + count <= call.room) __builtin_memcpy(call.keys + to, keys, count * sizeof(Key));
      if (++j == blocks) {
        ++i;
        j = call.others ? 0 : i;
      }
    }
    bins.merge(own);
    __atomic_fetch_add(&below, smaller_ones, __ATOMIC_RELAXED);
  });
  call.counts[0] = below;
  for (int bin = 0; bin < kBins; ++bin) call.counts[1 + bin] = bin < bins.used ? bins.bins[bin].count : 0;
}

}  // namespace fe::FE_ISA
