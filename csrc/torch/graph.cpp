// Messages on graphs.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/dispatch.h"
#include "torch/large_tensors.h"
#include "torch/registration.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

bool is_float32(const Tensor& tensor, int64_t dim) { return tensor.scalar_type() == ScalarType::Float && tensor.dim() == dim; }

// messages [N, E, 2, S], beliefs [N, V, S], pair_beliefs [N, E, S, S], free_energy [N], residual [N], iterations [N] of
// unary [N, V, S], edges [E, 2], pairwise [N or 1, E, S, S], whose edges may share one table, and messages to start from.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> belief_propagation_cpu(
    Tensor unary, Tensor edges, Tensor pairwise, std::optional<Tensor> messages, bool max_product, bool by_residual,
    double damping, double tol, int64_t max_iters) {
  STD_TORCH_CHECK(is_float32(unary, 3) && unary.is_contiguous(), "unary must be contiguous float32 [problems, variables, states]");
  STD_TORCH_CHECK(edges.scalar_type() == ScalarType::Long && edges.dim() == 2 && edges.size(1) == 2 && edges.is_contiguous(),
                  "edges must be contiguous int64 [edges, 2]");
  const int64_t problems = unary.size(0), variables = unary.size(1), states = unary.size(2), count = edges.size(0);
  STD_TORCH_CHECK(!messages || (is_float32(*messages, 4) && messages->is_contiguous() && messages->size(0) == problems &&
                                messages->size(1) == count && messages->size(2) == 2 && messages->size(3) == states),
                  "messages must be contiguous float32 [problems, edges, 2, states]");
  STD_TORCH_CHECK(is_float32(pairwise, 4) && (pairwise.size(0) == problems || pairwise.size(0) == 1) && pairwise.size(1) == count &&
                      pairwise.size(2) == states && pairwise.size(3) == states && pairwise.stride(3) == 1 &&
                      pairwise.stride(2) == states && (pairwise.stride(1) == 0 || pairwise.stride(1) == states * states),
                  "pairwise must be float32 [problems or 1, edges, states, states] whose tables have no gaps");
  STD_TORCH_CHECK(states >= 1 && states <= fe::kMostStates && variables < (int64_t{1} << 31) - 1 && count < (int64_t{1} << 29),
                  "states must be in [1, 64], variables below 2^31 - 1, edges below 2^29");
  const int64_t* ends = static_cast<const int64_t*>(edges.const_data_ptr());
  for (int64_t k = 0; k < 2 * count; ++k)
    STD_TORCH_CHECK(ends[k] >= 0 && ends[k] < variables, "edges must be in [0, ", variables, "); got ", ends[k]);
  const int64_t pairs_shape[4] = {problems, count, states, states};
  Tensor beliefs = fe::empty_large(unary, unary.sizes());
  Tensor pair_beliefs = fe::empty_large(unary, {pairs_shape, size_t{4}});
  Tensor free_energy = fe::empty_cpu(aoti_torch_dtype_float64(), {&problems, size_t{1}});
  Tensor residual = fe::empty_cpu(aoti_torch_dtype_float32(), {&problems, size_t{1}});
  Tensor iterations = fe::empty_cpu(aoti_torch_dtype_int64(), {&problems, size_t{1}});
  const int64_t messages_shape[4] = {problems, count, 2, states};
  Tensor out = fe::empty_large(unary, {messages_shape, size_t{4}});
  fe::BeliefCall call{};
  call.problems = problems;
  call.variables = variables;
  call.states = states;
  call.edges = count;
  call.unary = static_cast<const float*>(unary.const_data_ptr());
  call.ends = ends;
  call.pairwise = static_cast<const float*>(pairwise.const_data_ptr());
  call.pairwise_problem_stride = pairwise.size(0) == 1 ? 0 : pairwise.stride(0);
  call.pairwise_edge_stride = pairwise.stride(1);
  call.max_product = max_product;
  call.by_residual = by_residual;
  call.damping = static_cast<float>(damping);
  call.tol = static_cast<float>(tol);
  call.max_iters = max_iters;
  call.initial = messages ? static_cast<const float*>(messages->const_data_ptr()) : nullptr;
  call.messages = static_cast<float*>(out.mutable_data_ptr());
  call.beliefs = static_cast<float*>(beliefs.mutable_data_ptr());
  call.pair_beliefs = static_cast<float*>(pair_beliefs.mutable_data_ptr());
  call.free_energy = static_cast<double*>(free_energy.mutable_data_ptr());
  call.residual = static_cast<float*>(residual.mutable_data_ptr());
  call.iterations = static_cast<int64_t*>(iterations.mutable_data_ptr());
  fe::cpu_kernels().belief_propagation(call, fe::parallel_for);
  return {out, beliefs, pair_beliefs, free_energy, residual, iterations};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fekernels_native, m) {
  m.def(
      "belief_propagation(Tensor unary, Tensor edges, Tensor pairwise, Tensor? messages, bool max_product, bool by_residual,"
      " float damping, float tol, int max_iters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) { m.impl("belief_propagation", TORCH_BOX(&belief_propagation_cpu)); }
