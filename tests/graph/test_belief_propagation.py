"""Belief propagation beside exact answers: trees, small graphs by enumeration, lattices by their own theory."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels.graph import NotConverged, belief_propagation
from tests.support.graph import INF, enumerated, grid, random_tree
from tests.support.implementations import Place

BOUNDS = {torch.float32: 2e-5, torch.float64: 1e-11}


def model(edges: Tensor, variables: int, states: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    unary = torch.randn(variables, states, dtype=torch.float64)
    pairwise = strength * torch.randn(len(edges), states, states, dtype=torch.float64)
    return unary, edges, pairwise


def ising(
    edges: Tensor, variables: int, coupling: float, field: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Spins -1 and +1: log potentials coupling s_i s_j and field s_i, one table for all edges."""
    spins = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    return field * spins.expand(variables, 2), edges, coupling * torch.outer(spins, spins)


@pytest.mark.parametrize("schedule", ["flooding", "residual"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("variables", "states"), [(1, 3), (2, 2), (11, 2), (7, 3), (6, 4), (4, 5)])
def test_trees_are_exact(
    variables: int, states: int, dtype: torch.dtype, schedule: str, backend: Place
) -> None:
    unary, edges, pairwise = model(random_tree(variables), variables, states)
    exact = enumerated(unary, edges, pairwise)
    found = belief_propagation(
        *(each.to(backend.device) for each in (unary.to(dtype), edges, pairwise.to(dtype))), schedule=schedule
    )
    assert found.converged is True and found.iterations <= variables
    bound = BOUNDS[dtype]
    assert abs(float(found.bethe_free_energy) - exact.free_energy) <= bound * max(1, abs(exact.free_energy))
    torch.testing.assert_close(found.beliefs.cpu().double(), exact.beliefs, atol=bound, rtol=0)
    torch.testing.assert_close(found.pair_beliefs.cpu().double(), exact.pair_beliefs, atol=bound, rtol=0)


@pytest.mark.parametrize("schedule", ["flooding", "residual"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("variables", "states"), [(2, 2), (10, 2), (7, 3), (6, 4)])
def test_max_product_finds_the_best_state_of_a_tree(
    variables: int, states: int, dtype: torch.dtype, schedule: str
) -> None:
    unary, edges, pairwise = model(random_tree(variables), variables, states)
    exact = enumerated(unary, edges, pairwise)
    found = belief_propagation(unary.to(dtype), edges, pairwise.to(dtype), product="max", schedule=schedule)
    assert torch.equal(found.assignment, exact.best)
    assert abs(float(found.bethe_free_energy) - float(exact.least_energy)) < 1e-5


def fixed_point_equations(
    unary: Tensor, edges: Tensor, pairwise: Tensor, found: fe.graph.BeliefPropagation
) -> float:
    """How far the beliefs are from those of a stationary point: marginals that agree, and one constant per edge."""
    b, pairs = found.beliefs, found.pair_beliefs
    worst = 0.0
    for e, (i, j) in enumerate(edges.tolist()):
        worst = max(
            worst, float((pairs[e].sum(1) - b[i]).abs().max()), float((pairs[e].sum(0) - b[j]).abs().max())
        )
    # log b_i - unary_i = sum of the messages; the reparameterisation: sum_e log(b_ij / b_i b_j) + sum_i log b_i is the
    # model's log potential up to a constant.
    x = torch.randint(unary.shape[1], (50, unary.shape[0]))
    at = torch.arange(unary.shape[0])
    ends = x[:, edges[:, 0]], x[:, edges[:, 1]]
    e = torch.arange(len(edges))
    ratio = pairs.log() - b[edges[:, 0]].log()[:, :, None] - b[edges[:, 1]].log()[:, None, :]
    table = pairwise.expand(len(edges), *pairwise.shape[-2:])
    difference = b.log()[at, x].sum(1) + ratio[e, ends[0], ends[1]].sum(1)
    difference = difference - unary[at, x].sum(1) - table[e, ends[0], ends[1]].sum(1)
    return max(worst, float(difference.std()))


def bethe_of_beliefs(
    unary: Tensor, edges: Tensor, pairwise: Tensor, found: fe.graph.BeliefPropagation
) -> Tensor:
    """By its definition, energies less entropies, which the kernel does not use."""
    b, pairs = found.beliefs, found.pair_beliefs
    degrees = torch.bincount(edges.flatten(), minlength=len(unary))
    table = pairwise.expand(len(edges), *pairwise.shape[-2:])
    energy = -(pairs * table).sum() - (b * unary).sum()
    return energy + (pairs * pairs.log()).sum() - ((degrees - 1) * (b * b.log()).sum(1)).sum()


@pytest.mark.parametrize("schedule", ["flooding", "residual"])
@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_loops_reach_a_stationary_point_near_the_truth(damping: float, schedule: str) -> None:
    """A single loop and a 3 x 3 lattice, enumerated; damping and schedule move no fixed point."""
    for edges, variables in ((torch.tensor([[0, 1], [1, 2], [2, 0]]), 3), (grid(3, 3), 9)):
        unary, edges, pairwise = model(edges, variables, 2, strength=0.4)
        exact = enumerated(unary, edges, pairwise)
        found = belief_propagation(unary, edges, pairwise, damping=damping, schedule=schedule)
        assert found.converged and fixed_point_equations(unary, edges, pairwise, found) < 1e-9
        assert abs(float(found.bethe_free_energy - bethe_of_beliefs(unary, edges, pairwise, found))) < 1e-9
        plain = belief_propagation(unary, edges, pairwise)
        torch.testing.assert_close(found.beliefs, plain.beliefs, atol=1e-8, rtol=0)
        # An approximation, which is not exact here and not far.
        gap = abs(float(found.bethe_free_energy - exact.free_energy))
        assert 1e-7 < gap < 0.3 and float((found.beliefs - exact.beliefs).abs().max()) < 0.1


def test_a_single_loop_without_field_is_known() -> None:
    """n spins in a ring, coupling K: Bethe's F = -n log(2 cosh K), while Z = (2 cosh K)^n + (2 sinh K)^n."""
    n, coupling = 5, 0.7
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n], 1)
    found = belief_propagation(*ising(ring, n, coupling))
    assert abs(float(found.bethe_free_energy) + n * math.log(2 * math.cosh(coupling))) < 1e-12
    exact = enumerated(*ising(ring, n, coupling))
    gap = math.log1p(math.tanh(coupling) ** n)
    assert abs(float(found.bethe_free_energy - exact.free_energy) - gap) < 1e-12


def bethe_lattice(coupling: float, field: float, neighbours: int = 4) -> tuple[float, float]:
    """Free energy per spin and magnetisation of the homogeneous fixed point, by iteration of one cavity field."""
    u = 0.1
    for _ in range(100_000):
        u, before = math.atanh(math.tanh(coupling) * math.tanh(field + (neighbours - 1) * u)), u
        if u == before:
            break
    h = field + (neighbours - 1) * u
    # Z_e of two cavities h joined by an edge, Z_i of one spin and its neighbours' messages.
    z_edge = 2 * math.exp(coupling) * math.cosh(2 * h) + 2 * math.exp(-coupling)
    scale = 2 * math.cosh(u)  # messages exp(+-u) / scale
    z_spin = 2 * math.cosh(field + neighbours * u) / scale**neighbours
    z_edge /= scale ** (2 * (neighbours - 1))
    free_energy = (neighbours - 1) * math.log(z_spin) - neighbours / 2 * math.log(z_edge)
    return free_energy, math.tanh(field + neighbours * u)


def onsager(coupling: float) -> float:
    """-log Z per spin of the infinite square lattice (Onsager 1944)."""
    k = 2 * math.sinh(2 * coupling) / math.cosh(2 * coupling) ** 2
    count = 4000
    angles = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    integral = torch.log((1 + (1 - k * k * angles.sin() ** 2).clamp_min(0).sqrt()) / 2).mean() / 2
    return -(math.log(2 * math.cosh(2 * coupling)) + float(integral))


@pytest.mark.parametrize(("coupling", "field"), [(0.2, 0.0), (0.3, 0.1), (0.5, 0.05), (0.8, 0.0)])
def test_a_torus_is_the_bethe_lattice(coupling: float, field: float) -> None:
    """Every spin has four neighbours, as on the infinite tree: its fixed point, to rounding; ordered from .3466 on."""
    rows = 6
    unary, edges, pairwise = ising(grid(rows, rows, periodic=True), rows * rows, coupling, field)
    start = torch.zeros(len(edges), 2, 2, dtype=torch.float64)
    start[..., 0] = -0.2  # towards +1
    found = belief_propagation(unary, edges, pairwise, tol=1e-14, max_iters=5000, messages=start)
    free_energy, magnetisation = bethe_lattice(coupling, field)
    assert abs(float(found.bethe_free_energy) / rows**2 - free_energy) < 1e-12
    assert float((found.beliefs[:, 1] - found.beliefs[:, 0] - magnetisation).abs().max()) < 1e-10
    if field == 0:
        assert 0 < free_energy - onsager(coupling) < 0.01


def test_the_gap_to_onsager_is_that_of_the_lattice_s_loops() -> None:
    """Every spin has one loop of four edges, two of six, ...: log Z's series in v = tanh K beyond Bethe's."""
    v = math.tanh(0.2)
    loops = v**4 + 2 * v**6 + 4.5 * v**8 + 12 * v**10
    assert bethe_lattice(0.2, 0.0)[0] - onsager(0.2) == pytest.approx(loops, abs=2e-7)


def test_a_schedule_by_residuals_settles_what_flooding_does_not() -> None:
    """A lattice with strong couplings of both signs (Elidan et al. 2006 have such)."""
    torch.manual_seed(9)
    edges = grid(8, 8)
    spins = torch.tensor([-1.0, 1.0])
    pairwise = torch.empty(len(edges), 1, 1).uniform_(-1.6, 1.6) * torch.outer(spins, spins)
    unary = torch.empty(64, 1).uniform_(-0.4, 0.4) * spins
    with pytest.warns(NotConverged, match="messages have not converged in 200 iterations"):
        flooded = belief_propagation(unary, edges, pairwise, max_iters=200)
    assert flooded.converged is False and flooded.iterations == 200
    assert belief_propagation(unary, edges, pairwise, schedule="residual", max_iters=200).converged is True


def test_damping_settles_what_oscillates() -> None:
    complete = torch.combinations(torch.arange(6))
    unary, edges, pairwise = ising(complete, 6, -1.0, 0.3)
    with pytest.warns(NotConverged, match=r"damping=0\.5"):
        assert belief_propagation(unary, edges, pairwise, max_iters=300).converged is False
    assert belief_propagation(unary, edges, pairwise, damping=0.6, max_iters=300).converged is True


def test_a_warm_start_goes_on(backend: Place) -> None:
    unary, edges, pairwise = (each.to(backend.device) for each in model(grid(12, 12), 144, 4, 0.5))
    unary, pairwise = unary.float(), pairwise.float()
    cold = belief_propagation(unary, edges, pairwise)
    again = belief_propagation(unary, edges, pairwise, messages=cold.messages)
    assert cold.iterations > 8 and again.iterations <= 1
    near = belief_propagation(unary + 0.001, edges, pairwise * 1.001, messages=cold.messages)
    assert near.iterations < cold.iterations
    torch.testing.assert_close(again.beliefs, cold.beliefs, atol=1e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        parts = belief_propagation(unary, edges, pairwise, tol=0.0, max_iters=3)
        parts = belief_propagation(unary, edges, pairwise, tol=0.0, max_iters=4, messages=parts.messages)
        whole = belief_propagation(unary, edges, pairwise, tol=0.0, max_iters=7)
    torch.testing.assert_close(parts.messages, whole.messages, atol=1e-6, rtol=0)


def test_a_batch_is_its_problems_and_a_union_their_sum(backend: Place) -> None:
    edges = grid(5, 4).to(backend.device)
    unary = torch.randn(2, 3, 20, 3, device=backend.device)
    pairwise = 0.5 * torch.randn(
        3, len(edges), 3, 3, device=backend.device
    )  # one for both of the first dimension
    batch = belief_propagation(unary, edges, pairwise)
    assert batch.beliefs.shape == (2, 3, 20, 3) and batch.pair_beliefs.shape == (2, 3, len(edges), 3, 3)
    assert batch.bethe_free_energy.shape == batch.converged.shape == batch.iterations.shape == (2, 3)
    assert batch.messages.shape == (2, 3, len(edges), 2, 3) and batch.converged.all()
    alone = [belief_propagation(unary[k // 3, k % 3], edges, pairwise[k % 3]) for k in range(6)]
    for k, one in enumerate(alone):
        assert torch.equal(one.beliefs, batch.beliefs[k // 3, k % 3])
        assert torch.equal(one.messages, batch.messages[k // 3, k % 3])
        assert one.iterations == int(batch.iterations[k // 3, k % 3])
    union = belief_propagation(
        unary.flatten(0, 2),
        torch.cat([edges + 20 * k for k in range(6)]),
        pairwise.expand(2, *pairwise.shape).flatten(0, 2),
    )
    assert union.iterations == int(batch.iterations.max())
    torch.testing.assert_close(union.bethe_free_energy, batch.bethe_free_energy.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(union.beliefs, batch.beliefs.flatten(0, 2), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("product", ["sum", "max"])
def test_hard_constraints(product: str, dtype: torch.dtype, backend: Place) -> None:
    """Colourings of a tree, one end's colour given: -inf among potentials, no NaN among results."""
    edges = random_tree(7)
    unary = torch.randn(7, 3, dtype=torch.float64)
    unary[0] = torch.tensor([-INF, 0.0, -INF])
    pairwise = torch.zeros(3, 3, dtype=torch.float64).fill_diagonal_(-INF)
    exact = enumerated(unary, edges, pairwise)
    operands = (each.to(backend.device) for each in (unary.to(dtype), edges, pairwise.to(dtype)))
    found = belief_propagation(*operands, product=product)
    if product == "sum":
        assert abs(float(found.bethe_free_energy) - exact.free_energy) < 1e-5
        torch.testing.assert_close(found.beliefs.cpu().double(), exact.beliefs, atol=2e-6, rtol=0)
        torch.testing.assert_close(found.pair_beliefs.cpu().double(), exact.pair_beliefs, atol=2e-6, rtol=0)
    else:
        assert torch.equal(found.assignment.cpu(), exact.best)
    assert not found.messages.isnan().any()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_one_neighbour_may_forbid_what_others_need(dtype: torch.dtype) -> None:
    """Messages of -inf from several neighbours: what each hears is without its own."""
    torch.manual_seed(1)
    for _ in range(20):
        edges = random_tree(6)
        unary, _, pairwise = model(edges, 6, 3)
        pairwise[torch.rand(pairwise.shape) < 0.4] = -INF
        pairwise[:, 0, 0] = 0.0
        exact = enumerated(unary, edges, pairwise)
        found = belief_propagation(unary.to(dtype), edges, pairwise.to(dtype))
        assert abs(float(found.bethe_free_energy) - exact.free_energy) < 1e-5
        torch.testing.assert_close(found.beliefs.double(), exact.beliefs, atol=2e-6, rtol=0)


def test_products_that_underflow_are_taken_among_logarithms(backend: Place) -> None:
    """Log potentials of -300 against each other, as products 0: marginals of a chain are right all the same."""
    edges = torch.tensor([[0, 1], [1, 2]])
    unary = torch.tensor([[0.0, -300.0], [0.0, 0.0], [-299.0, 0.0]], dtype=torch.float64)
    pairwise = torch.tensor([[-300.0, -301.0], [0.0, -2.0]], dtype=torch.float64)
    exact = enumerated(unary, edges, pairwise)
    found = belief_propagation(
        *(each.to(backend.device) for each in (unary.float(), edges, pairwise.float()))
    )
    torch.testing.assert_close(found.beliefs.cpu().double(), exact.beliefs, atol=1e-4, rtol=0)
    assert abs(float(found.bethe_free_energy) - exact.free_energy) < 1e-3


def test_max_product_breaks_no_promise_on_integers() -> None:
    """Ties among potentials that are whole numbers stay ties: the messages are exact."""
    unary = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    found = belief_propagation(unary, torch.tensor([[0, 1]]), torch.zeros(3, 3), product="max")
    assert torch.equal(found.messages[0, 1], torch.zeros(3)) and found.assignment.tolist() == [1, 0]
    assert float(found.bethe_free_energy) == -1.0


@pytest.mark.parametrize("leaves", [1_000, 10_000, 100_000])
def test_free_energy_of_hubs_is_exact(leaves: int, backend: Place) -> None:
    unary = torch.zeros(leaves + 1, 2)
    unary[1:, 0] = torch.randn(leaves)
    edges = torch.stack([torch.zeros(leaves, dtype=torch.int64), torch.arange(1, leaves + 1)], 1)
    pairwise = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    told = (unary[1:, None].double() + pairwise.double()).logsumexp(-1).sum(0)
    found = belief_propagation(*(each.to(backend.device) for each in (unary, edges, pairwise)))
    assert found.converged is True
    assert abs(float(found.bethe_free_energy / -told.logsumexp(0)) - 1) <= 1e-7
    # The hub's states differ by some hundreds: what its belief is of is a difference of sums of 1e5.
    torch.testing.assert_close(found.beliefs[0].cpu().double(), told.softmax(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_ties_that_do_not_go_together_are_warned_of(dtype: torch.dtype, backend: Place) -> None:
    """Two spins that want to differ, without a field: the first states of both are not a best assignment."""

    def run(coupling: float, field: tuple[float, float] = (0.0, 0.0)) -> fe.graph.BeliefPropagation:
        spins = torch.tensor([-1.0, 1.0], dtype=dtype)
        unary = torch.tensor(field, dtype=dtype)[:, None] * spins
        operands = unary, torch.tensor([[0, 1]]), coupling * torch.outer(spins, spins)
        return belief_propagation(*(each.to(backend.device) for each in operands), product="max")

    with pytest.warns(UserWarning, match=r"several .* equally good.* variables \[0, 1\] do not go together"):
        assert run(-1.0).converged is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(1.0).bethe_free_energy == -1  # ties, whose first states go together
        assert run(0.0).bethe_free_energy == 0
        assert float(run(-1.0, (0.1, 0.0)).bethe_free_energy) == pytest.approx(-1.1)
