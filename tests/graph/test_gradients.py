"""Gradients of belief propagation at its fixed point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fekernels.graph import NotConverged, belief_propagation
from tests.support.graph import INF, enumerated, grid, random_tree
from tests.support.implementations import Place

LOOPY = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 2]])


def operands(edges: Tensor, variables: int, states: int, tables: int | None = None) -> tuple[Tensor, Tensor]:
    count = len(edges) if tables is None else tables
    unary = torch.randn(variables, states, dtype=torch.float64, requires_grad=True)
    pairwise = (0.5 * torch.randn(count, states, states, dtype=torch.float64)).requires_grad_()
    return unary, pairwise


@pytest.mark.parametrize(("states", "damping"), [(2, 0.3), (3, 0.0)])
def test_all_results_against_finite_differences(states: int, damping: float) -> None:
    def run(unary: Tensor, pairwise: Tensor) -> tuple[Tensor, ...]:
        found = belief_propagation(unary, LOOPY, pairwise, tol=1e-13, damping=damping)
        return found.bethe_free_energy, found.beliefs, found.pair_beliefs

    assert torch.autograd.gradcheck(run, operands(LOOPY, 4, states), fast_mode=states > 2)


def test_the_free_energy_twice() -> None:
    def run(unary: Tensor, pairwise: Tensor) -> Tensor:
        return belief_propagation(unary, LOOPY, pairwise, tol=1e-13).bethe_free_energy

    assert torch.autograd.gradgradcheck(run, operands(LOOPY, 4, 2))


def test_one_table_for_all_edges_and_a_batch() -> None:
    def run(unary: Tensor, pairwise: Tensor) -> tuple[Tensor, Tensor]:
        found = belief_propagation(torch.stack([unary, 2 * unary]), LOOPY, pairwise, tol=1e-13)
        return found.bethe_free_energy, found.beliefs

    assert torch.autograd.gradcheck(run, operands(LOOPY, 4, 2, tables=1))


def test_on_trees_they_are_those_of_the_partition_function(backend: Place) -> None:
    edges = random_tree(8)
    unary, pairwise = (
        each.detach().float().to(backend.device).requires_grad_() for each in operands(edges, 8, 2)
    )
    found = belief_propagation(unary, edges.to(backend.device), pairwise)
    exact = enumerated(unary.detach().cpu(), edges, pairwise.detach().cpu())
    of_unary, of_pairwise = torch.autograd.grad(found.bethe_free_energy, (unary, pairwise), retain_graph=True)
    torch.testing.assert_close(of_unary.cpu().double(), -exact.beliefs, atol=1e-5, rtol=0)
    torch.testing.assert_close(of_pairwise.cpu().double(), -exact.pair_beliefs, atol=1e-5, rtol=0)
    # Beliefs in unary potentials: covariances of indicators.
    (of_belief,) = torch.autograd.grad(found.beliefs[0, 1], unary)
    ends = edges.tolist()
    covariance = (
        exact.pair_beliefs - exact.beliefs[edges[:, 0], :, None] * exact.beliefs[edges[:, 1], None, :]
    )
    for (i, j), table in zip(ends, covariance, strict=True):
        if i == 0 or j == 0:
            row, other = (table[1], j) if i == 0 else (table[:, 1], i)
            torch.testing.assert_close(of_belief[other].cpu().double(), row, atol=1e-5, rtol=0)


def test_max_product_has_the_gradient_of_its_state_s_energy() -> None:
    edges = random_tree(6)
    unary, pairwise = operands(edges, 6, 3)
    found = belief_propagation(unary, edges, pairwise, product="max")
    of_unary, of_pairwise = torch.autograd.grad(found.bethe_free_energy, (unary, pairwise))
    assert torch.equal(of_unary, -torch.nn.functional.one_hot(found.assignment, 3).double())
    assert torch.equal(of_pairwise.sum((1, 2)), -torch.ones(5, dtype=torch.float64))

    def beliefs(unary: Tensor, pairwise: Tensor) -> Tensor:
        return belief_propagation(unary, edges, pairwise, product="max").beliefs

    assert torch.autograd.gradcheck(beliefs, (unary, pairwise))


def test_hard_constraints_have_gradients() -> None:
    unary, pairwise = operands(LOOPY, 4, 3)
    forbidden = torch.eye(3, dtype=torch.bool).expand(4, 3, 3)

    def run(unary: Tensor, pairwise: Tensor) -> tuple[Tensor, Tensor]:
        found = belief_propagation(unary, LOOPY, pairwise.masked_fill(forbidden, -INF), tol=1e-13)
        return found.bethe_free_energy, found.beliefs

    assert torch.autograd.gradcheck(run, (unary, pairwise), fast_mode=True)


def test_beliefs_cannot_be_differentiated_twice() -> None:
    unary, pairwise = operands(LOOPY, 4, 2)
    found = belief_propagation(unary, LOOPY, pairwise)
    (gradient,) = torch.autograd.grad(found.beliefs[0, 0], unary, create_graph=True)
    with pytest.raises(RuntimeError, match="beliefs can be differentiated once, the Bethe free energy twice"):
        gradient.sum().backward()


def test_an_adjoint_that_does_not_settle_says_so() -> None:
    unary, pairwise = operands(grid(4, 4), 16, 2)
    with pytest.warns(NotConverged, match="messages have not converged in 2"):
        found = belief_propagation(unary, grid(4, 4), pairwise, max_iters=2)
    with pytest.warns(NotConverged, match="gradients of beliefs have not converged in 2 iterations"):
        found.beliefs[0, 0].backward()


def test_nothing_is_kept_for_who_asks_for_no_gradient() -> None:
    unary, pairwise = operands(LOOPY, 4, 2)
    found = belief_propagation(unary.detach(), LOOPY, pairwise.detach())
    assert not any(
        each.requires_grad for each in (found.beliefs, found.pair_beliefs, found.bethe_free_energy)
    )
    found = belief_propagation(unary, LOOPY, pairwise)
    assert (
        found.beliefs.requires_grad and not found.messages.requires_grad and not found.residual.requires_grad
    )
