"""Fixed points that only a symmetry keeps, and pairs that were given twice: warned of, and nothing else is."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels.graph import belief_propagation
from tests.support.graph import grid, random_tree
from tests.support.implementations import Place

SPINS = torch.tensor([1.0, -1.0])
TABLE = torch.outer(SPINS, SPINS)
UNSTABLE = r"^belief_propagation: the fixed point{} is unstable, and only the symmetry"


def silent(unary: Tensor, edges: Tensor, pairwise: Tensor, **options: object) -> fe.graph.BeliefPropagation:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return belief_propagation(unary, edges, pairwise, **options)


def lattice(rows: int, coupling: float) -> float:
    """-log Z of an Ising model on a square without field, by transfer matrices."""
    s = torch.tensor(list(itertools.product([1.0, -1.0], repeat=rows)), dtype=torch.float64)
    within = coupling * (s[:, :-1] * s[:, 1:]).sum(1)
    log_z = within
    for _ in range(rows - 1):
        log_z = within + torch.logsumexp(log_z[:, None] + coupling * s @ s.T, 0)
    return -float(log_z.logsumexp(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", ["flooding", "residual"])
@pytest.mark.parametrize("coupling", [0.5, 1.0, -1.0, 3.0])
def test_a_symmetric_fixed_point_that_is_unstable_is_told(
    coupling: float, schedule: str, dtype: torch.dtype, backend: Place
) -> None:
    unary, edges, table = (each.to(backend.device) for each in (torch.zeros(64, 2), grid(8, 8), TABLE))
    unary, table = unary.to(dtype), coupling * table.to(dtype)
    with pytest.warns(UserWarning, match=UNSTABLE.format("")) as told:
        found = belief_propagation(unary, edges, table, schedule=schedule)
    assert found.converged and f"is {float(found.bethe_free_energy):.6g} at it" in str(told[0].message)
    # What the warning says to do is nearer the truth. The antiferromagnet's order has two signs.
    lean = torch.tensor([1e-4, 0.0], dtype=dtype, device=backend.device).expand(64, 2).clone()
    black = torch.arange(64, device=backend.device)
    if coupling < 0:
        lean[(black // 8 + black % 8) % 2 == 0] = 0.0
    broken = silent(unary + lean, edges, table, damping=0.5)
    exact = lattice(8, abs(coupling))
    gap, before = float(broken.bethe_free_energy) - exact, float(found.bethe_free_energy) - exact
    assert gap < 0.5 * before and before > 3


def test_two_of_three_states_that_can_be_exchanged() -> None:
    """The start is no fixed point, and what it leads to still has the symmetry."""
    unary = torch.tensor([0.0, 0.0, -1.0]).expand(36, 3)
    with pytest.warns(UserWarning, match=UNSTABLE.format("")):
        found = belief_propagation(unary, grid(6, 6), 2 * torch.eye(3))
    assert found.iterations > 1 and torch.allclose(found.beliefs[:, 0], found.beliefs[:, 1])


def test_problems_of_a_batch_are_told_apart() -> None:
    couplings = torch.tensor([0.1, 1.0, 0.2, 0.7])[:, None, None, None]
    with pytest.warns(UserWarning, match=UNSTABLE.format(" of 2 problems, 1 the first,")) as told:
        belief_propagation(torch.zeros(4, 64, 2), grid(8, 8), couplings * TABLE)
    assert "is -92.9449 at it and -112.1" in str(told[0].message)


def ring_with_hub(length: int, leaves: int) -> Tensor:
    at = torch.arange(length)
    hub = torch.stack([torch.zeros(leaves, dtype=torch.int64), torch.arange(length, length + leaves)], 1)
    return torch.cat([torch.stack([at, (at + 1) % length], 1), hub])


@pytest.mark.parametrize("coupling", [0.3, 1.0, 8.0])
@pytest.mark.parametrize(
    "edges",
    [
        random_tree(500),
        torch.stack([torch.arange(3000), torch.arange(1, 3001)], 1),
        ring_with_hub(3, 300),
        torch.cat([ring_with_hub(40, 300), ring_with_hub(5, 3) + 340]),
    ],
    ids=["tree", "chain", "triangle with a hub", "two rings"],
)
def test_trees_and_single_loops_are_stable(edges: Tensor, coupling: float) -> None:
    found = silent(torch.zeros(int(edges.max()) + 1, 2), edges, coupling * TABLE)
    assert found.converged and found.iterations <= 1


def test_deep_trees_beside_loops_are_stable() -> None:
    """A move goes down chains of strong couplings for hundreds of sweeps, and adds up where they meet."""
    weak = torch.combinations(torch.arange(5))
    at = torch.arange(60 * 300).view(60, 300) + 5
    trunk, chains = (torch.stack(ends, -1).view(-1, 2) for ends in
                     ((at[:-1, 0], at[1:, 0]), (at[:, :-1], at[:, 1:])))  # fmt: skip
    couplings = torch.cat([torch.full((10,), 0.05), torch.full((len(trunk) + len(chains),), 8.0)])
    edges, order = torch.cat([weak, trunk, chains]), torch.randperm(10 + len(trunk) + len(chains))
    silent(torch.zeros(18_005, 2), edges[order], couplings[order, None, None] * TABLE)


@pytest.mark.parametrize("seed", range(5))
def test_no_alarm_at_high_temperature_and_without_symmetry(seed: int) -> None:
    torch.manual_seed(seed)
    edges = torch.combinations(torch.arange(40))
    edges = edges[torch.rand(len(edges)) < 0.15]
    glass = torch.randn(len(edges), 1, 1)
    silent(torch.zeros(40, 2), edges, 0.1 * glass * TABLE)
    silent(torch.zeros(40, 4), edges, 0.2 * torch.eye(4))
    silent(torch.randn(40, 2), edges, 0.2 * glass * TABLE)
    silent(torch.zeros(64, 2), grid(8, 8), 0.35 * TABLE)
    # An antiferromagnet on triangles would oscillate without damping, and is stable.
    triangles = torch.cat([grid(6, 6, True), torch.stack([torch.arange(36), diagonal(6)], 1)])
    silent(torch.zeros(36, 2), triangles, -0.25 * TABLE)


def diagonal(rows: int) -> Tensor:
    at = torch.arange(rows * rows).view(rows, rows)
    return at.roll((-1, -1), (0, 1)).flatten()


def test_given_messages_and_max_product_are_not_looked_at() -> None:
    """The default start alone: who goes on from messages of their own knows where they come from."""
    unary, edges = torch.zeros(64, 2), grid(8, 8)
    with pytest.warns(UserWarning, match="unstable"):
        start = belief_propagation(unary, edges, TABLE).messages
    silent(unary, edges, TABLE, messages=start)
    silent(unary, edges, TABLE, product="max")


def test_a_pair_in_both_directions_is_told() -> None:
    tree = torch.tensor([[0, 1], [1, 2], [1, 3], [3, 4]])
    unary = torch.randn(5, 2)
    both = torch.cat([tree, tree.flip(1)])
    match = r"^belief_propagation: 4 of 8 edges join a pair of variables once more, \[0, 1\] among them"
    with pytest.warns(UserWarning, match=match):
        belief_propagation(unary, both, TABLE)
    with pytest.warns(UserWarning, match=r"^belief_propagation: 2 of 4 edges .* \[0, 1\] among them"):
        belief_propagation(unary, tree[[0, 0, 0, 1]], TABLE)
    once = both[both[:, 0] < both[:, 1]]
    assert torch.equal(
        silent(unary, once, TABLE).bethe_free_energy, silent(unary, tree, TABLE).bethe_free_energy
    )
