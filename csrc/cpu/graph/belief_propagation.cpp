#include "cpu/graph/belief_propagation.h"

#include "cpu/graph/flooding.h"
#include "cpu/graph/residual_order.h"

namespace fe::FE_ISA {

namespace {

template <int States>
void flood(const BeliefCall& call, const Incidence& graph, int64_t index, ParallelFor parallel_for) {
  if (call.max_product) {
    Passes<States, true>(call, graph, index, parallel_for).flood();
  } else {
    Passes<States, false>(call, graph, index, parallel_for).flood();
  }
}

void by_residual(const BeliefCall& call, const Incidence& graph, int64_t index, ParallelFor parallel_for) {
  if (call.max_product) {
    ByResidual<true>(call, graph, index, parallel_for).run();
  } else {
    ByResidual<false>(call, graph, index, parallel_for).run();
  }
}

}  // namespace

void belief_propagation(const BeliefCall& call, ParallelFor parallel_for) {
  const Incidence graph(call);
  const auto flooding = call.states == 4 ? flood<4> : call.states == 2 ? flood<2> : flood<0>;
  const auto solve = call.by_residual ? by_residual : flooding;
  if (call.problems == 1) return solve(call, graph, 0, parallel_for);
  in_parallel(parallel_for, call.problems, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) solve(call, graph, index, nullptr);
  });
}

}  // namespace fe::FE_ISA
