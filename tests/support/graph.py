"""Pairwise models: the contract's table of cases, and their exact answers by enumeration in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fekernels.reference.graph import belief_propagation as reference

INF = float("inf")


@dataclass(frozen=True)
class Row:
    """One call of the operator: a random graph of so many variables, edges and states."""

    name: str
    variables: int
    edges: int
    states: int
    problems: int = 1
    product: str = "sum"
    damping: float = 0.0
    strength: float = 1.0  # standard deviation of the log potentials
    forbidden: float = 0.0  # part of the pair potentials that are -inf
    shared: str = ""  # "problems": one pairwise for all of them; "edges": one table for all edges
    warm: bool = False
    sweeps: int = 4
    by_residual: bool = False  # the messages one at a time

    def __str__(self) -> str:
        return self.name

    def operands(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """unary [N, V, S], edges, pairwise [N or 1, E, S, S], messages [N, E, 2, S]; the same for every dtype."""
        generator = torch.Generator().manual_seed(hash_of(self.name))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).mul_(self.strength)

        edges = torch.randint(self.variables, (self.edges, 2), generator=generator)
        edges[:, 1] = torch.where(edges[:, 0] == edges[:, 1], (edges[:, 1] + 1) % self.variables, edges[:, 1])
        tables = 1 if self.shared else self.problems
        pairwise = normal(tables, 1 if self.shared == "edges" else self.edges, self.states, self.states)
        if self.forbidden:
            at = torch.rand(pairwise.shape, generator=generator) < self.forbidden
            # The first states of all variables fit together: no contradiction.
            at[..., 0, 0] = False
            pairwise[at] = -INF
        messages = torch.zeros(self.problems, self.edges, 2, self.states)
        if self.warm:
            messages = normal(*messages.shape)
            messages[..., 1:].masked_fill_(
                torch.rand(messages[..., 1:].shape, generator=generator) < 0.2, -INF
            )
        unary = normal(self.problems, self.variables, self.states)
        return (
            unary.to(dtype),
            edges,
            pairwise.to(dtype).expand(tables, self.edges, self.states, self.states),
            messages.to(dtype),
        )

    @property
    def settings(self) -> tuple[bool, bool, float, float, int]:
        return self.product == "max", self.by_residual, self.damping, 0.0, self.sweeps


def hash_of(name: str) -> int:
    return sum(31**k * ord(letter) for k, letter in enumerate(name)) % (1 << 31)


# All ways through the kernels: numbers of states with and without code of their own, tiles that are not full, several
# chunks, variables without edges, both products and orders, damping, potentials that underflow as products, hard
# constraints.
ROWS = (
    *(Row(f"{states} states", 19, 45, states) for states in (1, 2, 3, 4, 5, 9)),
    *(Row(f"{states} states, max", 19, 45, states, product="max") for states in (1, 2, 3, 4, 5)),
    *(Row(f"{edges} edges", 11, edges, 4) for edges in (0, 1, 15, 16, 17, 33)),
    *(Row(f"{states} states, many", 3000, 9001, states, sweeps=2) for states in (2, 4)),
    *(Row(f"{states} states, strong", 19, 45, states, strength=60.0) for states in (2, 3, 4)),
    *(Row(f"{states} states, forbidden", 19, 30, states, forbidden=0.3) for states in (2, 3, 4)),
    Row("max, forbidden", 19, 30, 4, forbidden=0.3, product="max"),
    Row("warm", 19, 45, 4, warm=True),
    Row("warm, 2 states, forbidden", 19, 45, 2, warm=True, forbidden=0.2),
    Row("damped", 19, 45, 4, damping=0.3),
    Row("damped, max, forbidden", 19, 45, 4, damping=0.3, forbidden=0.2, product="max"),
    Row("damped, warm", 19, 45, 4, damping=0.3, warm=True),
    Row("damped, warm, max", 19, 45, 2, damping=0.3, warm=True, product="max", forbidden=0.3),
    Row("batch", 19, 45, 4, problems=5),
    Row("batch, 3 states, one pairwise", 19, 45, 3, problems=3, shared="problems"),
    Row("one table", 19, 45, 4, shared="edges"),
    Row("batch, one table, 2 states", 19, 45, 2, problems=3, shared="edges"),
    Row("no problem", 5, 4, 4, problems=0),
    Row("no sweep", 5, 4, 4, sweeps=0),
    Row("hub", 400, 399, 2, sweeps=3),
    *(Row(f"{states} states, by residual", 19, 30, states, by_residual=True) for states in (4, 9)),
    Row("by residual, max", 19, 30, 4, by_residual=True, product="max"),
    Row("by residual, damped", 19, 30, 4, by_residual=True, damping=0.3),
    Row("by residual, forbidden", 19, 30, 3, by_residual=True, damping=0.3, forbidden=0.2),
    Row("by residual, batch, one table", 19, 30, 2, by_residual=True, problems=3, shared="edges"),
    Row("by residual, no edge", 5, 0, 3, by_residual=True),
)  # fmt: skip


def in_float64(row: Row) -> tuple[Tensor, ...]:
    return reference.belief_propagation(*row.operands(torch.float64), *row.settings)


@dataclass(frozen=True)
class Exact:
    """By enumeration: -log Z, marginals, those of pairs, the most probable state and minus its log potential."""

    free_energy: Tensor
    beliefs: Tensor
    pair_beliefs: Tensor
    best: Tensor
    least_energy: Tensor


def enumerated(unary: Tensor, edges: Tensor, pairwise: Tensor) -> Exact:
    variables, states = unary.shape
    unary, pairwise = unary.double(), pairwise.double().expand(len(edges), states, states)
    x = torch.tensor(list(itertools.product(range(states), repeat=variables)))
    log_p = unary[torch.arange(variables), x].sum(1)
    log_p = log_p + pairwise[torch.arange(len(edges)), x[:, edges[:, 0]], x[:, edges[:, 1]]].sum(1)
    log_z = log_p.logsumexp(0)
    one_hot = torch.nn.functional.one_hot(x, states).double()
    weighted = one_hot * (log_p - log_z).exp()[:, None, None]
    pairs = torch.einsum("kes,ket->est", weighted[:, edges[:, 0]], one_hot[:, edges[:, 1]])
    best = int(log_p.argmax())
    return Exact(-log_z, weighted.sum(0), pairs, x[best], -log_p[best])


def random_tree(variables: int) -> Tensor:
    """[V - 1, 2], in a random order and random directions."""
    names = torch.randperm(variables)
    children = torch.arange(1, variables)
    parents = torch.tensor(
        [int(torch.randint(child, ())) for child in range(1, variables)], dtype=torch.int64
    )
    edges = names[torch.stack([children, parents], 1)]
    turned = torch.where(torch.rand(variables - 1, 1) < 0.5, edges.flip(1), edges)
    return turned[torch.randperm(variables - 1)]


def grid(rows: int, columns: int, periodic: bool = False) -> Tensor:
    """[E, 2]: neighbours of a square lattice, with its opposite sides joined where it is periodic."""
    at = torch.arange(rows * columns).view(rows, columns)
    pairs = []
    for dim, size in ((0, rows), (1, columns)):
        last = size if periodic else size - 1
        pairs.append(
            torch.stack([at.narrow(dim, 0, last), at.roll(-1, dim).narrow(dim, 0, last)], -1).reshape(-1, 2)
        )
    return torch.cat(pairs)
