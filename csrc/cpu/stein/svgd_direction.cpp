#include "cpu/stein/svgd_direction.h"

#include "cpu/stein/block_rounds.h"
#include "cpu/stein/svgd_tiles.h"
#include "cpu/stein/wide_products.h"

namespace fe::FE_ISA {

namespace {


int64_t tiles_workspace(int64_t n, int64_t d) {
  const int64_t stride = round_up(d, kUnit);
  return round_up(n, kTile) * (4 * stride + d + kUnit + 2) + stride;
}

int64_t pair_grain(int64_t d) { return kGrainFlops / (kTile * kTile * (6 * d + 32)) + 1; }
int64_t block_grain(int64_t d) { return kGrainFlops / (8 * kTile * d) + 1; }

// All particles of a call by tiles of pairs, in tiles_workspace floats.
template <class Kernel>
void by_tiles(const SvgdCall& call) {
  using Tiles = SvgdTiles<Kernel>;
  const int64_t n = call.n, d = call.d, blocks = (n + kTile - 1) / kTile;
  const ParallelFor parallel_for = call.parallel_for;
  float *means = call.workspace, *fixed = means + round_up(d, kUnit);
  const Tiles tiles(call, fixed, Tiles::fixed_floats(d), fixed + blocks * Tiles::fixed_floats(d), Tiles::sum_floats(d));
  if (!Kernel::kNeedsDifferences)
    in_parallel(parallel_for, (d + kTile - 1) / kTile, kGrainFlops / (n * kTile) + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kTile, last = end * kTile < d ? end * kTile : d;
      column_means({call.particles, call.particles_dtype, d, first, last - first}, n, means + first);
    });
  in_parallel(parallel_for, blocks, block_grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) tiles.prepare(tiles.at(block, block), block * kTile, means);
  });
  if constexpr (!Kernel::kNeedsDifferences) {
    double norms = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      const Points points = tiles.at(block, block).points;
      for (int i = 0; i < points.count(0); ++i) norms += points.norms[i];
    }
    if (is_sharp(norms, n, call.bandwidth)) return by_tiles<Sharp<Kernel>>(call);
  }
  for_all_pairs(parallel_for, blocks, group_size(blocks, d), pair_grain(d),
                [&](int64_t i, int64_t j) { tiles.meet(tiles.at(i, i), tiles.at(j, j), i == j); });
  in_parallel(parallel_for, blocks, block_grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) tiles.finish(tiles.at(block, block), block * kTile);
  });
}

// The kernel by tiles that a call asks for.
template <class Body>
void with_tiles(const SvgdCall& call, bool sharp, Body body) {
  with_kernel<FloatV>(call.kernel, [&]<class Kernel>() {
    if constexpr (!Kernel::kNeedsDifferences)
      if (sharp || call.d <= kDirectDimensions) return body.template operator()<Sharp<Kernel>>();
    body.template operator()<Kernel>();
  });
}

}  // namespace

int64_t svgd_direction_workspace(int64_t n, int64_t d) {
  if (is_small(n, d)) return 0;
  return WideShape::fits(n, d) ? svgd_direction_wide_workspace(n, d) : tiles_workspace(n, d);
}

void svgd_direction(const SvgdCall& call) {
  if (is_small(call.n, call.d)) return svgd_direction_small(call);
  if (WideShape::fits(call.n, call.d)) return svgd_direction_wide(call);
  with_tiles(call, false, [&]<class Kernel>() { by_tiles<Kernel>(call); });
}

SvgdLayout svgd_layout(const SvgdCall& call, bool sharp) {
  const int64_t n = call.n, d = call.d;
  if (is_small(n, d)) return {.algorithm = SvgdLayout::kSmall};
  SvgdLayout layout{.algorithm = SvgdLayout::kTiles};
  with_tiles(call, sharp, [&]<class Kernel>() {
    layout.centred = !Kernel::kNeedsDifferences;
    layout.fixed = SvgdTiles<Kernel>::fixed_floats(d);
    layout.sums = SvgdTiles<Kernel>::sum_floats(d);
  });
  layout.block = kTile;
  layout.group = group_size((n + kTile - 1) / kTile, d);
  if (WideShape::fits(n, d)) {
    const WideShape shape{n, d};
    layout.algorithm = SvgdLayout::kWide;
    layout.segment = shape.segment();
    layout.products = shape.tiles() * kTile * kTile;
  }
  return layout;
}

void svgd_add_columns(const SvgdCall& rows, int64_t count, double* sums) {
  add_columns({rows.particles, rows.particles_dtype, rows.d, 0, rows.d}, count, sums);
}

void svgd_prepare(const SvgdShare& share, const int64_t* blocks, int64_t count, const float* means, float* norms) {
  const SvgdCall& call = share.call;
  with_tiles(call, share.sharp, [&]<class Kernel>() {
    const SvgdTiles<Kernel> tiles(share);
    in_parallel(call.parallel_for, count, block_grain(call.d), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const auto block = tiles.at(blocks[3 * at], blocks[3 * at + 1]);
        tiles.prepare(block, blocks[3 * at + 2], means);
        if (!Kernel::kNeedsDifferences)
          __builtin_memcpy(norms + blocks[3 * at + 2], block.points.norms, block.points.count(0) * sizeof(float));
      }
    });
  });
}

void svgd_meet(const SvgdShare& share, const int64_t* pairings, int64_t count) {
  const SvgdCall& call = share.call;
  const int64_t blocks = (call.n + kTile - 1) / kTile, size = group_size(blocks, call.d);
  with_tiles(call, share.sharp, [&]<class Kernel>() {
    const SvgdTiles<Kernel> tiles(share);
    in_parallel(call.parallel_for, count, pair_grain(call.d) / (size * size) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t *pairing = pairings + 4 * at, low = pairing[0] * size, high = pairing[1] * size;
        const auto end_of = [&](int64_t group) { return group + size < blocks ? group + size : blocks; };
        pairs_of_groups(low, end_of(low), high, end_of(high), [&](int64_t i, int64_t j) {
          const auto a = tiles.at(pairing[2] * size + i - low, i), b = tiles.at(pairing[3] * size + j - high, j);
          tiles.meet(a, b, i == j);
        });
      }
    });
  });
}

void svgd_totals(const SvgdShare& share, const int64_t* blocks, int64_t count, float* totals) {
  const SvgdCall& call = share.call;
  with_tiles(call, share.sharp, [&]<class Kernel>() {
    const SvgdTiles<Kernel> tiles(share);
    in_parallel(call.parallel_for, count, block_grain(call.d), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at)
        tiles.totals(tiles.at(blocks[3 * at], blocks[3 * at + 1]), [&](int i, const float* total) {
          __builtin_memcpy(totals + (blocks[3 * at + 2] + i) * call.d, total, call.d * sizeof(float));
        });
    });
  });
}

void svgd_complete(const SvgdCall& rows, int64_t count, const float* totals) {
  const int64_t d = rows.d, padded = round_up(d, kUnit);
  with_kernel<FloatV>(rows.kernel, [&]<class Kernel>() {
    const Kernel kernel(rows.params);
    in_parallel(rows.parallel_for, count, kGrainFlops / (8 * d) + 1, [&](int64_t begin, int64_t end) {
      const Buffer<float> scores(padded), total(padded);
      for (int64_t k = d; k < padded; ++k) scores[k] = total[k] = 0.0f;
      for (int64_t row = begin; row < end; ++row) {
        to_float(rows.scores, rows.scores_dtype, row * d, static_cast<int>(d), scores);
        __builtin_memcpy(total, totals + row * d, d * sizeof(float));
        complete_row(kernel, rows.n, d, scores, total);
        from_float(total, static_cast<int>(d), rows.direction, rows.particles_dtype, row * d);
      }
    });
  });
}

}  // namespace fe::FE_ISA
