// The iterations in which all messages change at once: sums by variable, then both messages of every edge in one visit.
#pragma once

#include "cpu/graph/belief_problem.h"

namespace fe::inline FE_ISA {

template <int States>
FE_HD bool any_below(int n, const FloatV* a, const FloatV* b, float bound) {
  FloatV least = a[0];
  each<States>(n, [&](int s) FE_INLINED {
    least = a[s] < least ? a[s] : least;
    least = b[s] < least ? b[s] : least;
  });
  return !Lane<FloatV>::all(least >= bound);
}

// The iterations. States: a number known beforehand, or 0.
template <int States, bool kMax>
class Passes : public Problem {
  using Tile = EdgeTile<States>;
  using L = Lane<FloatV>;
  static constexpr int kRoom = Tile::kRoom;

 public:
  Passes(const BeliefCall& call, const Incidence& graph, int64_t index, ParallelFor parallel_for)
      : Problem(call, graph, index, parallel_for, {Tile::edge_of_lane, load_rows, store_rows, copy_cavities}) {}

  void flood() {
    int64_t iteration = 0;
    float residual = graph_.edges > 0 ? kInf : 0.0f;
    for (; iteration < call_.max_iters && !(residual <= call_.tol); ++iteration) {
      tell_all();
      const int64_t chunks = chunks_of(graph_.padded);
      in_chunks(chunks, [this](int64_t chunk) { changes_[chunk] = pass(chunk); });
      residual = 0.0f;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) residual = larger(residual, static_cast<float>(changes_[chunk]) * natural_);
    }
    write(residual, iteration);
  }

 protected:
  FE_HD int n() const { return States ? States : n_; }

  void tell_all() {
    in_parallel(parallel_for_, call_.variables, kGrain, [this](int64_t begin, int64_t end) { tell(begin, end); });
  }

  // Each variable's potential and all that it has been told, summed in double: as exact for hubs as for others.
  __attribute__((noinline)) void tell(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowSum<States> sum;
      sum.set(n(), unary_ + i * n());
      for (int64_t k = graph_.begins[i]; k < graph_.begins[i + 1]; ++k) {
        __builtin_prefetch(messages_ + int64_t{graph_.slots[k + kAhead]} * n());
        sum.add(n(), messages_ + int64_t{graph_.slots[k]} * n());
      }
      sum.store(n(), told_ + i * n());
      if (sum.total(n()) < -static_cast<double>(kLargest)) tell_others(i);
    }
  }

  // One iteration over a chunk of edges: the largest change of a message before it is damped.
  __attribute__((noinline)) float pass(int64_t chunk) {
    FloatV change = L::splat(0.0f);
    const int64_t last = lesser((chunk + 1) * kChunkTiles, tiles_);
    for (int64_t tile = chunk * kChunkTiles; tile < last; ++tile) change = larger<FloatV>(change, pass_edges(tile));
    float most = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) most = larger(most, static_cast<float>(change[lane]));
    return most;
  }

  FE_HD void read_cavities(int64_t tile, FloatV (&old)[2][kRoom], FloatV (&h)[2][kRoom]) const {
    each<2>(2, [&](int side) FE_INLINED {
      Tile::load(n(), message(side, tile * kLanes), old[side]);
      Tile::gather(n(), told_, graph_.ends[side] + tile * kLanes, h[side]);
      each<States>(n(), [&](int s) FE_INLINED { h[side][s] = h[side][s] - old[side][s]; });
    });
    if (any_below<States>(n(), old[0], old[1], -kLargest)) mend_cavities(tile, h[0], h[1]);
  }

  static void load_rows(int n, const float* rows, FloatV* out) { Tile::load(n, rows, out); }
  static void store_rows(int n, float* rows, const FloatV* values) { Tile::store(n, rows, values); }
  static void copy_cavities(const Problem& problem, int64_t tile, FloatV* first, FloatV* second) {
    const Passes& self = static_cast<const Passes&>(problem);
    FloatV old[2][kRoom], h[2][kRoom];
    self.read_cavities(tile, old, h);
    for (int s = 0; s < self.n(); ++s) {
      first[s] = h[0][s];
      second[s] = h[1][s];
    }
  }

  FE_HD FloatV pass_edges(int64_t tile) {
    for (int lane = 0; lane < kLanes; ++lane)
      __builtin_prefetch(told_ + int64_t{graph_.ends[1][(tile + 1) * kLanes + lane]} * n());
    FloatV old[2][kRoom], h[2][kRoom], fresh[2][kRoom];
    read_cavities(tile, old, h);
    make_messages(tile, h, fresh);
    FloatV change = L::splat(0.0f);
    each<2>(2, [&](int side) FE_INLINED {
      each<States>(n(), [&](int s) FE_INLINED {
        change = larger<FloatV>(change, distance<FloatV>(fresh[side][s], old[side][s]));
        if (call_.damping > 0.0f) fresh[side][s] = damped<FloatV>(fresh[side][s], old[side][s], call_.damping);
      });
      Tile::store(n(), message(side, tile * kLanes), fresh[side]);
    });
    if ((tile + 1) * kLanes > graph_.edges)
      for (int lane = 0; lane < kLanes; ++lane)
        if (edge_at(tile, lane) >= graph_.edges) change[lane] = 0.0f;
    return change;
  }

  // Messages to both ends from what both have been told. Sums make h relative to its largest.
  FE_HD void make_messages(int64_t tile, FloatV (&h)[2][kRoom], FloatV (&fresh)[2][kRoom]) const {
    const float* pairs = table(tile);
    const FloatV nothing = L::splat(kMax ? -kInf : 0.0f);
    FloatV factors[2][kRoom];
    each<2>(2, [&](int side) FE_INLINED {
      if constexpr (!kMax) to_factors<States, FloatV>(n(), h[side], factors[side]);
      each<States>(n(), [&](int s) FE_INLINED { fresh[side][s] = nothing; });
    });
    each<States>(n(), [&](int x) FE_INLINED {
      each<States>(n(), [&](int y) FE_INLINED {
        const FloatV pair = load(pairs + (x * n() + y) * kLanes);
        if constexpr (kMax) {
          fresh[0][x] = larger<FloatV>(fresh[0][x], pair + h[1][y]);
          fresh[1][y] = larger<FloatV>(fresh[1][y], pair + h[0][x]);
        } else {
          fresh[0][x] = L::fma(pair, factors[1][y], fresh[0][x]);
          fresh[1][y] = L::fma(pair, factors[0][x], fresh[1][y]);
        }
      });
    });
    if constexpr (!kMax) {
      const bool lost = any_below<States>(n(), fresh[0], fresh[1], kLeastSum);
      FloatV sums[2][kRoom];
      each<2>(2, [&](int side) FE_INLINED {
        each<States>(n(), [&](int s) FE_INLINED {
          sums[side][s] = fresh[side][s];
          fresh[side][s] = log2_normal<FloatV>(sums[side][s]);
        });
      });
      if (lost)
        for (int side = 0; side < 2; ++side) mend_sums(tile, side, h[1 - side], sums[side], fresh[side]);
    }
    each<2>(2, [&](int side) FE_INLINED { normalise<States, FloatV>(n(), fresh[side]); });
  }
};

}  // namespace fe::inline FE_ISA
