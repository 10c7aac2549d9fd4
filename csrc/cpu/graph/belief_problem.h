// A problem's memory: what goes in before the first iteration, and what comes out after the last.
#pragma once

#include "cpu/buffer.h"
#include "cpu/graph/edge_tiles.h"
#include "cpu/graph/incidence.h"
#include "cpu/large_buffer.h"
#include "formulas/pairwise_messages.h"

namespace fe::inline FE_ISA {

inline constexpr int kMost = static_cast<int>(kMostStates);
inline constexpr int64_t kGrain = 1024;  // edges or variables, fewest for a second thread
inline constexpr int64_t kChunk = 4096;  // edges or variables of which one double is the sum, one float the largest change
inline constexpr int64_t kAhead = Incidence::kAhead;
inline constexpr int64_t kChunkTiles = kChunk / kLanes;

inline int64_t chunks_of(int64_t count) { return (count + kChunk - 1) / kChunk; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// One problem: its tables, its messages, and what every variable has been told. What takes the time is in `Passes`.
class Problem {
 public:
  // Of a number of states: its tiles, and what the ends of a tile's edges have been told by all but each other.
  struct Access {
    int (*edge_of_lane)(int);
    void (*load)(int n, const float* rows, FloatV* out);
    void (*store)(int n, float* rows, const FloatV* values);
    void (*cavities)(const Problem& problem, int64_t tile, FloatV* first, FloatV* second);
  };

  Problem(const BeliefCall& call, const Incidence& graph, int64_t index, ParallelFor parallel_for, const Access& access)
      : call_(call),
        graph_(graph),
        parallel_for_(parallel_for),
        access_(access),
        n_(static_cast<int>(call.states)),
        index_(index),
        unit_(call.max_product ? 1.0f : kLog2E),
        natural_(call.max_product ? 1.0f : kLog2),
        shared_(call.pairwise_edge_stride == 0),
        pairwise_(call.pairwise + index * call.pairwise_problem_stride),
        tiles_(graph.padded / kLanes),
        table_((shared_ ? 1 : tiles_) * kLanes * n_ * n_ + kLanes),
        peaks_(graph.padded + kLanes),
        messages_(2 * graph.padded * n_ + kLanes),
        told_((call.variables + kLanes) * n_),
        others_((call.variables + 1) * n_ + kLanes),
        shifts_(call.variables + kLanes),
        unary_((call.variables + 1) * n_ + kLanes),
        unary_peaks_(call.variables + kLanes),
        sums_(chunks_of(graph.padded) + chunks_of(call.variables) + 1),
        changes_(chunks_of(graph.padded) + 1) {
    for (int lane = 0; lane < kLanes; ++lane) edge_of_lane_[lane] = access.edge_of_lane(lane);
    make_tables();
    make_unary();
    read_messages();
  }

  void write(float residual, int64_t iterations) {
    call_.residual[index_] = residual;
    call_.iterations[index_] = iterations;
    in_parallel(parallel_for_, call_.variables, kGrain, [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) settle(i);
    });
    const int64_t of_variables = chunks_of(call_.variables), of_edges = chunks_of(graph_.padded);
    in_chunks(of_variables, [&](int64_t chunk) { sums_[chunk] = write_variables(chunk); });
    in_chunks(of_edges, [&](int64_t chunk) {
      double sum = 0.0;
      for (int64_t tile = chunk * kChunkTiles; tile < lesser((chunk + 1) * kChunkTiles, tiles_); ++tile) write_pairs(tile, sum);
      sums_[of_variables + chunk] = sum;
    });
    double total = 0.0;
    for (int64_t chunk = 0; chunk < of_variables + of_edges; ++chunk) total += sums_[chunk];
    call_.free_energy[index_] = total;
    write_messages();
  }

 protected:
  int64_t edge_at(int64_t tile, int lane) const { return tile * kLanes + edge_of_lane_[lane]; }
  float* message(int side, int64_t edge) const { return messages_ + (side * graph_.padded + edge) * n_; }
  const float* given_table(int64_t edge) const {
    return pairwise_ + int64_t{graph_.given[edge]} * call_.pairwise_edge_stride;
  }
  const float* table(int64_t tile) const { return table_ + (shared_ ? 0 : tile) * kLanes * n_ * n_; }

  template <class Body>
  void in_chunks(int64_t chunks, Body body) const {
    in_parallel(parallel_for_, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
    });
  }

  // Where one neighbour alone forbids a state, the sum without it is what that neighbour has to hear.
  __attribute__((noinline)) void tell_others(int64_t i) {
    for (int s = 0; s < n_; ++s) {
      double sum = unary_[i * n_ + s];
      int64_t forbidden = 0;
      for (int64_t k = graph_.begins[i]; k < graph_.begins[i + 1]; ++k) {
        const float told = messages_[int64_t{graph_.slots[k]} * n_ + s];
        if (told < -kLargest) {
          ++forbidden;
        } else {
          sum += told;
        }
      }
      others_[i * n_ + s] = forbidden == 1 ? static_cast<float>(sum) : told_[i * n_ + s];
    }
  }

  // After the last iteration: what a variable has been told, and without the one that forbids, relative to its largest, which
  // stays in double. The free energy counts a hub's once for each of its edges, where float32 is off by as many roundings.
  void settle(int64_t i) {
    double sum[kMost], most = -static_cast<double>(kLargest);
    int64_t forbidden[kMost];
    for (int s = 0; s < n_; ++s) {
      sum[s] = unary_[i * n_ + s];
      forbidden[s] = 0;
    }
    for (int64_t k = graph_.begins[i]; k < graph_.begins[i + 1]; ++k) {
      __builtin_prefetch(messages_ + int64_t{graph_.slots[k + kAhead]} * n_);
      const float* told = messages_ + int64_t{graph_.slots[k]} * n_;
      for (int s = 0; s < n_; ++s) {
        const bool forbids = told[s] < -kLargest;
        forbidden[s] += forbids;
        sum[s] += forbids ? 0.0f : told[s];
      }
    }
    for (int s = 0; s < n_; ++s)
      if (forbidden[s] == 0 && sum[s] > most) most = sum[s];
    shifts_[i] = most > -static_cast<double>(kLargest) ? most : 0.0;
    for (int s = 0; s < n_; ++s) {
      const float relative = static_cast<float>(sum[s] - shifts_[i]);
      told_[i * n_ + s] = forbidden[s] == 0 ? relative : -kInf;
      others_[i * n_ + s] = forbidden[s] <= 1 ? relative : -kInf;
    }
  }

  // What one end of an edge has been told by all but the other one.
  float cavity(int side, int64_t edge, int state) const {
    const int64_t at = int64_t{graph_.ends[side][edge]} * n_ + state;
    const float old = message(side, edge)[state];
    return old < -kLargest ? others_[at] : told_[at] - old;
  }

  __attribute__((noinline)) void mend_cavities(int64_t tile, FloatV* first, FloatV* second) const {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int s = 0; s < n_; ++s) {
        first[s][lane] = cavity(0, edge_at(tile, lane), s);
        second[s][lane] = cavity(1, edge_at(tile, lane), s);
      }
  }

  // Sums that are too small to be trusted, anew; h is relative to its largest.
  __attribute__((noinline)) void mend_sums(int64_t tile, int side, const FloatV* h, const FloatV* sums, FloatV* fresh) const {
    const int64_t target = side == 0 ? n_ : 1, source = side == 0 ? 1 : n_;
    float told[kMost];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t edge = edge_at(tile, lane);
      for (int s = 0; s < n_; ++s) told[s] = h[s][lane];
      for (int s = 0; s < n_; ++s)
        if (sums[s][lane] < kLeastSum)
          fresh[s][lane] = log2_sum(n_, told, given_table(edge) + s * target, source, peaks_[edge]);
    }
  }

  const BeliefCall& call_;
  const Incidence& graph_;
  ParallelFor parallel_for_;
  Access access_;
  int edge_of_lane_[kLanes];
  int n_;
  int64_t index_;
  float unit_, natural_;  // from the caller's logarithms to those of the messages, and back
  bool shared_;
  const float* pairwise_;
  int64_t tiles_;
  LargeBuffer<float> table_;  // pair potentials in lanes, scaled to at most 1: constant over all iterations
  LargeBuffer<float> peaks_;  // by which they are scaled; for maxima they are logarithms
  LargeBuffer<float> messages_;
  LargeBuffer<float> told_;    // [variables + 1, states]: sums of all that arrives
  LargeBuffer<float> others_;  // where one neighbour alone forbids a state, the sum of the others
  LargeBuffer<double> shifts_;  // at the end, the largest of what each variable has been told, to which the rest is relative
  LargeBuffer<float> unary_, unary_peaks_;
  Buffer<double> sums_;
  Buffer<float> changes_;

 private:
  void make_tables() {
    const int64_t pairs = int64_t{n_} * n_;
    const auto make = [&](int64_t tile, float* out) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t edge = edge_at(tile, lane);
        __builtin_prefetch(given_table(edge + kAhead));
        const float* given = given_table(edge);
        float most = -kLargest;
        for (int64_t k = 0; k < pairs; ++k) most = larger(most, given[k]);
        peaks_[edge] = most;
        for (int64_t k = 0; k < pairs; ++k) out[k * kLanes + lane] = given[k] - most;
      }
      if (!call_.max_product)
        for (int64_t k = 0; k < pairs; ++k) store(out + k * kLanes, exp_negative<FloatV>(load(out + k * kLanes)));
    };
    if (graph_.edges == 0) return;
    if (shared_) {
      make(0, table_);
      for (int64_t edge = 0; edge < graph_.padded; ++edge) peaks_[edge] = peaks_[0];
      return;
    }
    in_chunks(chunks_of(graph_.padded), [&](int64_t chunk) {
      for (int64_t tile = chunk * kChunkTiles; tile < lesser((chunk + 1) * kChunkTiles, tiles_); ++tile)
        make(tile, table_ + tile * kLanes * pairs);
    });
  }

  void make_unary() {
    const float* given = call_.unary + index_ * call_.variables * n_;
    for (int64_t i = 0; i < call_.variables; ++i) {
      float most = -kLargest;
      for (int s = 0; s < n_; ++s) most = larger(most, given[i * n_ + s]);
      unary_peaks_[i] = most;
      for (int s = 0; s < n_; ++s) unary_[i * n_ + s] = (given[i * n_ + s] - most) * unit_;
    }
    for (int s = 0; s < n_; ++s) told_[call_.variables * n_ + s] = others_[call_.variables * n_ + s] = 0.0f;
  }

  void read_messages() {
    if (!call_.initial) {
      in_chunks(2 * chunks_of(graph_.padded), [&](int64_t chunk) {
        const int64_t last = lesser((chunk + 1) * kChunk, 2 * graph_.padded) * n_;
        for (int64_t k = chunk * kChunk * n_; k < last; ++k) messages_[k] = 0.0f;
      });
      return;
    }
    const float* given = call_.initial + index_ * call_.edges * 2 * n_;
    in_chunks(chunks_of(graph_.padded), [&](int64_t chunk) {
      for (int64_t edge = chunk * kChunk; edge < lesser((chunk + 1) * kChunk, graph_.padded); ++edge)
        for (int side = 0; side < 2; ++side) {
          const float* from = given + (2 * int64_t{graph_.given[edge]} + side) * n_;
          float most = -kLargest;
          for (int s = 0; s < n_; ++s) most = larger(most, from[s]);
          for (int s = 0; s < n_; ++s) message(side, edge)[s] = edge < graph_.edges ? (from[s] - most) * unit_ : 0.0f;
        }
    });
  }

  void write_messages() const {
    float* out = call_.messages + index_ * call_.edges * 2 * n_;
    in_chunks(chunks_of(graph_.edges), [&](int64_t chunk) {
      for (int64_t edge = chunk * kChunk; edge < lesser((chunk + 1) * kChunk, graph_.edges); ++edge)
        for (int side = 0; side < 2; ++side)
          for (int s = 0; s < n_; ++s) out[(2 * int64_t{graph_.given[edge]} + side) * n_ + s] = message(side, edge)[s] * natural_;
    });
  }

  // Beliefs; and this chunk's part of the Bethe free energy by the messages' normalisers,
  // F = sum_i (d_i - 1) log Z_i - sum_e log Z_e, in which the scales of the messages cancel.
  double write_variables(int64_t chunk) const {
    double total = 0.0;
    alignas(64) float rows[kMost * kLanes];
    FloatV h[kMost], factors[kMost];
    const int64_t last = lesser((chunk + 1) * kChunk, call_.variables);
    for (int64_t i = chunk * kChunk; i < last; i += kLanes) {
      const int lanes = static_cast<int>(lesser(kLanes, last - i));
      access_.load(n_, told_ + i * n_, h);
      const FloatV most = as_factors(h, factors);
      FloatV sum{};
      for (int s = 0; s < n_; ++s) sum += factors[s];
      for (int s = 0; s < n_; ++s) factors[s] = factors[s] / sum;
      float* out = call_.beliefs + (index_ * call_.variables + i) * n_;
      access_.store(n_, lanes == kLanes ? out : rows, factors);
      if (lanes < kLanes)
        for (int k = 0; k < lanes * n_; ++k) out[k] = rows[k];
      const FloatV log_sum = log<FloatV>(sum);
      double parts[kLanes];  // in the order of variables, which is the same for all numbers of lanes
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t variable = i + edge_of_lane_[lane];
        if (variable >= last) continue;
        // The peak of a unary potential, and the shift, are in d_i cavities and, with this sign, in d_i - 1 terms here.
        parts[variable - i] =
            static_cast<double>(graph_.degree(variable) - 1) * (static_cast<double>(most[lane]) + log_sum[lane]) -
            unary_peaks_[variable] - shifts_[variable] * (call_.max_product ? 1.0 : 0.6931471805599453);
      }
      for (int k = 0; k < lanes; ++k) total += parts[k];
    }
    return total;
  }

  // A pair's belief is its potential times what both ends have been told; - log Z_e of the tile's edges, in their order.
  void write_pairs(int64_t tile, double& total) const {
    FloatV h[2][kMost], factors[2][kMost], most[2];
    access_.cavities(*this, tile, h[0], h[1]);
    for (int side = 0; side < 2; ++side) most[side] = as_factors(h[side], factors[side]);
    const float* pairs = table(tile);
    FloatV sum{};
    for (int x = 0; x < n_; ++x)
      for (int y = 0; y < n_; ++y) sum += pair_factor(pairs, x, y) * (factors[0][x] * factors[1][y]);
    const FloatV log_z = log<FloatV>(sum);
    double parts[kLanes] = {};
    alignas(64) float values[kLanes];
    float* rows[kLanes];
    bool fine[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t edge = edge_at(tile, lane);
      rows[lane] = call_.pair_beliefs + (index_ * graph_.edges + graph_.given[edge]) * n_ * n_;
      fine[lane] = edge < graph_.edges && sum[lane] >= kLeastSum;
      if (edge >= graph_.edges) continue;
      const double peaks = static_cast<double>(most[0][lane]) + most[1][lane] + peaks_[edge];
      parts[edge - tile * kLanes] = peaks + (fine[lane] ? log_z[lane] : write_pair(edge, lane, h, rows[lane]));
    }
    for (int x = 0; x < n_; ++x)
      for (int y = 0; y < n_; ++y) {
        store(values, pair_factor(pairs, x, y) * (factors[0][x] * factors[1][y]) / sum);
        for (int lane = 0; lane < kLanes; ++lane)
          if (fine[lane]) rows[lane][x * n_ + y] = values[lane];
      }
    for (int k = 0; k < kLanes; ++k) total -= parts[k];
  }

  // Logarithms of the messages' kind, which become relative and to base 2, to factors; returns the largest, natural.
  FloatV as_factors(FloatV* logarithms, FloatV* factors) const {
    if (call_.max_product)
      for (int s = 0; s < n_; ++s) logarithms[s] = logarithms[s] * kLog2E;
    return to_factors<0, FloatV>(n_, logarithms, factors) * kLog2;
  }

  FloatV pair_factor(const float* pairs, int x, int y) const {
    const FloatV pair = load(pairs + (x * n_ + y) * kLanes);
    return call_.max_product ? exp_negative<FloatV>(pair) : pair;
  }

  // One edge among logarithms, where products underflow.
  __attribute__((noinline)) float write_pair(int64_t edge, int lane, const FloatV (&h)[2][kMost], float* out) const {
    const float* given = given_table(edge);
    float most = -kLargest, sum = 0.0f;
    for (int x = 0; x < n_; ++x)
      for (int y = 0; y < n_; ++y) {
        out[x * n_ + y] = given[x * n_ + y] - peaks_[edge] + (h[0][x][lane] + h[1][y][lane]) * kLog2;
        most = larger(most, out[x * n_ + y]);
      }
    for (int k = 0; k < n_ * n_; ++k) sum += out[k] = exp_negative<float>(out[k] - most);
    for (int k = 0; k < n_ * n_; ++k) out[k] = Lane<float>::divide(out[k], sum);
    return most + log<float>(sum);
  }
};

}  // namespace fe::inline FE_ISA
