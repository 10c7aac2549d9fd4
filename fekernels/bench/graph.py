"""The graph cases: belief propagation beside plain PyTorch and PGMax, float32."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fekernels.bench.case import Case, Cost, Group, Row, Shape, short
from fekernels.bench.floors import COPY
from fekernels.bench.packages import reason
from fekernels.bench.timing import Contestant
from fekernels.graph import NotConverged, belief_propagation

__all__ = ["CASES"]

OURS, PLAIN, PGMAX = "belief_propagation", "plain torch, index_add_", "PGMax, jitted"
SWEEPS = 100  # in one call, which sets up and makes the beliefs once
TOLERANCE = 1e-3  # of beliefs, between ours and a peer's
DAMPING, TOL = 0.0, 1e-4


def _warm(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` without the warnings that so few iterations are not enough, and that random ends meet twice."""

    def quiet() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)
            warnings.filterwarnings("ignore", "belief_propagation: .* join a pair", UserWarning)
            return run()

    return quiet


def random_graph(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """[edges, states]: five edges a variable, ends drawn at random, every edge a table of its own."""
    count, states = shape
    generator = torch.Generator().manual_seed(0)
    variables = max(2, count // 5)
    edges = torch.randint(variables, (count, 2), generator=generator)
    edges[:, 1] = torch.where(edges[:, 0] == edges[:, 1], (edges[:, 1] + 1) % variables, edges[:, 1])
    unary = torch.randn(variables, states, generator=generator)
    return unary, edges, 0.3 * torch.randn(count, states, states, generator=generator)


def plain_sweep(messages: Tensor, unary: Tensor, edges: Tensor, pairwise: Tensor) -> Tensor:
    told = unary.clone()
    for side in (0, 1):
        told.index_add_(0, edges[:, side], messages[:, side])
    first, second = (told[edges[:, side]] - messages[:, side] for side in (0, 1))
    to_first = torch.logsumexp(pairwise + second[:, None, :], 2)
    to_second = torch.logsumexp(pairwise + first[:, :, None], 1)
    fresh = torch.stack([to_first, to_second], 1)
    return fresh - fresh.amax(-1, keepdim=True)


def _plain(unary: Tensor, edges: Tensor, pairwise: Tensor, sweeps: int, tol: float = -1.0) -> Tensor:
    """Beliefs after so many sweeps, or when no message changes by more than ``tol``."""
    messages = unary.new_zeros(len(edges), 2, unary.shape[1])
    for _ in range(sweeps):
        fresh = plain_sweep(messages, unary, edges, pairwise)
        done = tol >= 0 and bool((fresh - messages).abs().amax() <= tol)
        messages = fresh
        if done:
            break
    told = unary.clone()
    for side in (0, 1):
        told.index_add_(0, edges[:, side], messages[:, side])
    return told.softmax(-1)


def _ours(unary: Tensor, edges: Tensor, pairwise: Tensor, sweeps: int, tol: float = 0.0) -> Tensor:
    return belief_propagation(unary, edges, pairwise, max_iters=sweeps, tol=tol).beliefs


def _differs(peer: Tensor, own: Tensor) -> str:
    error = float((peer - own).abs().max())
    return "" if error <= TOLERANCE else f"computes something else: beliefs {error:.1e} off"


def _sweep(shape: Shape) -> Group:
    operands = random_graph(shape)
    if why := _differs(_plain(*operands, 2), _warm(partial(_ours, *operands, 2))()):  # type: ignore[arg-type]
        return Group([Contestant(OURS, _warm(partial(_ours, *operands, SWEEPS)), steps=SWEEPS)], {PLAIN: why})
    start = operands[0].new_zeros(len(operands[1]), 2, shape[1])
    return Group([
        Contestant(OURS, _warm(partial(_ours, *operands, SWEEPS)), steps=SWEEPS),
        Contestant(PLAIN, partial(plain_sweep, start, *operands)),
    ])  # fmt: skip


def _sweep_cost(shape: Shape) -> dict[str, Cost]:
    """Of an edge: its two messages read and written, its table read, and both ends' sums; as many of both functions."""
    count, states = shape
    moved = 4 * (4 * states + states * states)
    each = Cost(moved, {"exponential": 2.0 * states, "logarithm": 2.0 * states})
    return {OURS: each * count}


def ising_grid(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, columns]: spins with fields of their own and couplings of both signs."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    at = torch.arange(rows * columns).view(rows, columns)
    edges = torch.cat([
        torch.stack([at[:, :-1], at[:, 1:]], -1).view(-1, 2), torch.stack([at[:-1], at[1:]], -1).view(-1, 2)
    ])  # fmt: skip
    spins = torch.tensor([-1.0, 1.0])
    unary = torch.randn(rows * columns, 1, generator=generator) * 0.5 * spins
    coupling = torch.rand(len(edges), 1, 1, generator=generator) * 1.4 - 0.7
    return unary, edges, coupling * torch.outer(spins, spins)


def pgmax(unary: Tensor, edges: Tensor, pairwise: Tensor, shape: Shape, sweeps: int) -> Callable[[], Tensor]:
    """Its flooding, sum-product, jitted: so many iterations, and the marginals."""
    np: Any = importlib.import_module("numpy")
    jax: Any = importlib.import_module("jax")
    if not hasattr(jax.lib, "xla_bridge"):  # PGMax 0.6.1 looks there for what JAX has moved
        jax.lib.xla_bridge = importlib.import_module("jax.extend.backend")
    module: Any = importlib.import_module("pgmax.infer")
    groups: Any = importlib.import_module("pgmax.vgroup")
    factors: Any = importlib.import_module("pgmax.fgroup")
    graphs: Any = importlib.import_module("pgmax.fgraph")
    variables = groups.NDVarArray(num_states=2, shape=shape)
    graph = graphs.FactorGraph(variable_groups=variables)
    columns = shape[1]
    names = [[variables[divmod(i, columns)] for i in edge] for edge in edges.tolist()]
    graph.add_factors(
        factors.PairwiseFactorGroup(variables_for_factors=names, log_potential_matrix=pairwise.numpy())
    )
    inferer = module.build_inferer(graph.bp_state, backend="bp")
    arrays = inferer.init(evidence_updates={variables: np.asarray(unary.view(*shape, 2).numpy())})

    @jax.jit
    def run(arrays: Any) -> Any:
        done = inferer.run(arrays, num_iters=sweeps, damping=DAMPING, temperature=1.0)
        return module.get_marginals(inferer.get_beliefs(done))

    def marginals() -> Tensor:
        (found,) = jax.block_until_ready(run(arrays)).values()
        return torch.from_numpy(np.array(found)).view(-1, 2)

    return marginals


def _converged(shape: Shape) -> Group:
    """To convergence. PGMax knows no such test: it is told how many iterations ours takes."""
    operands = ising_grid(shape)
    found = belief_propagation(*operands, tol=TOL)
    contestants = [Contestant(OURS, partial(_ours, *operands, 1000, TOL))]
    missing = {}
    plain = partial(_plain, *operands, 1000, TOL)
    if why := _differs(plain(), found.beliefs):
        missing[PLAIN] = why
    else:
        contestants.append(Contestant(PLAIN, plain))
    try:
        run = pgmax(*operands, shape, int(found.iterations))
        if why := _differs(run(), found.beliefs):
            missing[PGMAX] = why
        else:
            contestants.append(Contestant(PGMAX, run))
    except ImportError as error:
        missing[PGMAX] = f"pip install pgmax ({error})"
    except Exception as error:  # another version's interface
        missing[PGMAX] = reason(error)
    return Group(contestants, missing)


CASES = (
    Case(
        "graph/sweep",
        lambda shape: f"one sweep, {short(shape[0])} edges, {shape[1]} states",
        ((1_000_000, 4), (50_000, 4), (300, 4)),
        _sweep,
        (Row(OURS, PLAIN, 0.05), Row(OURS, COPY, None, "copied")),
        lambda shape: shape[0],
        _sweep_cost,
        rounds=5,
    ),
    Case(
        "graph/converged",
        lambda shape: "Ising grid {} x {}, to convergence".format(*shape),
        ((300, 300), (60, 60), (8, 8)),
        _converged,
        (Row(OURS, PLAIN), Row(OURS, PGMAX, 0.2)),
        lambda shape: 2 * shape[0] * shape[1] - shape[0] - shape[1],
        rounds=5,
    ),
)
