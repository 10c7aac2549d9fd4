// One message after the other, that of the largest residual first (Elidan, McGraw & Koller 2006).
#pragma once

#include "cpu/graph/flooding.h"

namespace fe::inline FE_ISA {

// The row of the largest of many numbers that change one at a time, the first of several: a tournament.
class Largest {
 public:
  explicit Largest(int64_t rows) : leaves_(1), values_(rows) {
    while (leaves_ < rows) leaves_ *= 2;
    winners_ = new int32_t[leaves_];
    rows_ = rows;
    for (int64_t row = 0; row < rows; ++row) values_[row] = 0.0f;
    for (int64_t node = 0; node < leaves_; ++node) winners_[node] = 0;
  }
  ~Largest() { delete[] winners_; }
  Largest(const Largest&) = delete;
  Largest& operator=(const Largest&) = delete;

  void set_first(int64_t row, float value) { values_[row] = value; }
  void begin() {
    for (int64_t node = leaves_ - 1; node > 0; --node) winners_[node] = better(2 * node);
  }
  void set(int64_t row, float value) {
    values_[row] = value;
    for (int64_t node = (leaves_ + row) / 2; node > 0; node /= 2) winners_[node] = better(2 * node);
  }
  int64_t row() const { return leaves_ == 1 ? 0 : winners_[1]; }
  float value() const { return values_[row()]; }

 private:
  int32_t winner(int64_t node) const { return node < leaves_ ? winners_[node] : static_cast<int32_t>(node - leaves_); }
  int32_t better(int64_t node) const {
    const int32_t a = winner(node), b = winner(node + 1);
    return b < rows_ && values_[b] > values_[a] ? b : a;
  }

  int64_t leaves_, rows_;
  LargeBuffer<float> values_;
  int32_t* winners_;
};

template <bool kMax>
class ByResidual : public Passes<0, kMax> {
  using Base = Passes<0, kMax>;
  using Base::call_, Base::graph_, Base::messages_, Base::n_, Base::peaks_;

 public:
  ByResidual(const BeliefCall& call, const Incidence& graph, int64_t index, ParallelFor parallel_for)
      : Base(call, graph, index, parallel_for), fresh_(2 * graph.padded * n_ + 1), residuals_(2 * graph.padded + 1) {}

  // An iteration is as many updates as there are messages.
  void run() {
    if (graph_.edges == 0) return Base::flood();
    this->tell_all();
    for (int side = 0; side < 2; ++side)
      for (int64_t edge = 0; edge < graph_.edges; ++edge) residuals_.set_first(row_of(side, edge), renew(side, edge));
    residuals_.begin();
    int64_t updates = 0;
    const int64_t most = 2 * graph_.edges;
    // The comparison of quotients: the product of both limits need not be representable.
    for (; !(residuals_.value() <= call_.tol) && updates / most < call_.max_iters; ++updates) update(residuals_.row());
    const float residual = residuals_.value();
    this->write(residual, (updates + most - 1) / most);
  }

 private:
  int64_t row_of(int side, int64_t edge) const { return side * graph_.padded + edge; }

  // What the message to this end of the edge would be, and how far it is from what it is.
  float renew(int side, int64_t edge) {
    float h[kMost], factors[kMost];
    float* out = fresh_ + row_of(side, edge) * n_;
    const int64_t target = side == 0 ? n_ : 1, source = side == 0 ? 1 : n_;
    const float* pairs = this->table(edge / kLanes) + (this->shared_ ? 0 : edge % kLanes);
    for (int s = 0; s < n_; ++s) h[s] = this->cavity(1 - side, edge, s);
    if (!kMax) to_factors<0, float>(n_, h, factors);
    for (int t = 0; t < n_; ++t) {
      const float* row = pairs + t * target * kLanes;
      float value = kMax ? -kInf : 0.0f;
      for (int s = 0; s < n_; ++s) {
        const float pair = row[s * source * kLanes];
        value = kMax ? larger(value, pair + h[s]) : Lane<float>::fma(pair, factors[s], value);
      }
      if (kMax) {
        out[t] = value;
      } else if (value >= kLeastSum) {
        out[t] = log2_normal<float>(value);
      } else {
        out[t] = log2_sum(n_, h, this->given_table(edge) + t * target, source, peaks_[edge]);
      }
    }
    normalise<0, float>(n_, out);
    return change(side, edge);
  }

  float change(int side, int64_t edge) const {
    const float *fresh = fresh_ + row_of(side, edge) * n_, *old = this->message(side, edge);
    float most = 0.0f;
    for (int s = 0; s < n_; ++s) most = larger(most, distance(fresh[s], old[s]));
    return most * this->natural_;
  }

  // One message, and what it makes of those that leave its target.
  void update(int64_t row) {
    const int side = row >= graph_.padded;
    const int64_t edge = row - side * graph_.padded, variable = graph_.ends[side][edge];
    float *old = this->message(side, edge), *fresh = fresh_ + row * n_;
    for (int s = 0; s < n_; ++s) old[s] = call_.damping > 0.0f ? damped(fresh[s], old[s], call_.damping) : fresh[s];
    residuals_.set(row, change(side, edge));
    this->tell(variable, variable + 1);
    for (int64_t k = graph_.begins[variable]; k < graph_.begins[variable + 1]; ++k) {
      const int64_t arriving = graph_.slots[k];
      if (arriving == row) continue;
      const int own = arriving >= graph_.padded;
      const int64_t other = arriving - own * graph_.padded;
      residuals_.set(row_of(1 - own, other), renew(1 - own, other));
    }
  }

  LargeBuffer<float> fresh_;
  Largest residuals_;
};

}  // namespace fe::inline FE_ISA
