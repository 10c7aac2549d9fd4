// Belief propagation on a pairwise graph (Pearl 1988; in the log domain, Yedidia, Freeman & Weiss 2005).
#pragma once

#include <cstdint>

#include "cpu/threads.h"

namespace fe {

inline constexpr int64_t kMostStates = 64;  // beyond, a table of one edge's pairs is 16 KB and tiles of edges leave the cache

struct BeliefCall {
  int64_t problems, variables, states, edges;
  const float* unary;          // [problems, variables, states]
  const int64_t* ends;         // [edges, 2]
  const float* pairwise;       // [states, states] at these strides; 0 where problems or edges share it
  int64_t pairwise_problem_stride, pairwise_edge_stride;
  bool max_product, by_residual;
  float damping, tol;
  int64_t max_iters;
  const float* initial;        // messages to start from, [problems, edges, 2, states]: to ends[e][0], to ends[e][1]; null: 0
  float* messages;             // the last ones, so too
  float* beliefs;              // [problems, variables, states]
  float* pair_beliefs;         // [problems, edges, states, states]
  double* free_energy;         // [problems], of the sum-product
  float* residual;             // [problems]
  int64_t* iterations;         // [problems]
};

// All problems. Their results do not depend on each other, nor on the threads.
using BeliefKernel = void(const BeliefCall& call, ParallelFor parallel_for);

}  // namespace fe
