"""Belief propagation: marginals, most probable states and the Bethe free energy of a discrete pairwise model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fekernels._checks import dense, floating, integer, number, one_of, same_device
from fekernels.graph.stability import MOVE, SWEEPS, departure, repeated
from fekernels.ops.graph.belief_propagation import FixedPoint, NotConverged, Settings, fixed_point
from fekernels.ops.plain_memory import check_storage

__all__ = ["BeliefPropagation", "belief_propagation"]

NAME = "belief_propagation"
TOL = {torch.float32: 1e-5, torch.float64: 1e-10}
SCHEDULES, PRODUCTS = ("flooding", "residual"), ("sum", "max")


@dataclass(frozen=True)
class BeliefPropagation:
    """What the messages say once they have settled; see :func:`belief_propagation`.

    Attributes:
        beliefs: [..., V, S], each variable's marginal; of the max-product, its max-marginal, normalised to sum 1.
        pair_beliefs: [..., E, S, S], those of the pairs of ends, in the order of ``edges[e]``.
        bethe_free_energy: [...], float64: minus log Z on trees; of the max-product, the energy of ``assignment``.
        converged: a bool, [...] of a batch. Where False, nothing here is a fixed point.
        iterations: an int, [...] of a batch: sweeps over all messages.
        residual: [...], the largest change of a log message in the last sweep, before damping.
        messages: [..., E, 2, S], logarithms whose largest is 0 (less by the damping's remainder): [e, 0] arrives at
            ``edges[e, 0]``, [e, 1] at ``edges[e, 1]``. To start from another time.
    """

    beliefs: Tensor
    pair_beliefs: Tensor
    bethe_free_energy: Tensor
    converged: bool | Tensor
    iterations: int | Tensor
    residual: Tensor
    messages: Tensor

    @property
    def assignment(self) -> Tensor:
        """[..., V]: the most probable state of each variable by its belief, the first of several.

        Of the max-product on a tree whose best state is unique, that state; a warning (UserWarning) comes where several
        are as good and the first of each variable do not go together. Of the sum-product, each variable's own.
        """
        return self.beliefs.argmax(-1)


def belief_propagation(
    unary: Tensor,
    edges: Tensor,
    pairwise: Tensor,
    *,
    damping: float = 0.0,
    max_iters: int = 1000,
    tol: float | None = None,
    product: Literal["sum", "max"] = "sum",
    schedule: Literal["flooding", "residual"] = "flooding",
    messages: Tensor | None = None,
) -> BeliefPropagation:
    """Messages between the variables of ``p(x) = 1/Z exp(sum_i unary[i, x_i] + sum_e pairwise[e, x_i, x_j])``.

    ``m_ij(x_j) = log sum_{x_i} exp(pairwise[e, x_i, x_j] + unary[i, x_i] + sum_{k != j} m_ki(x_i))``, until they settle
    (Pearl 1988; Yedidia, Freeman & Weiss 2005, "Constructing free-energy approximations", eq. 14 to 18 of pairwise
    models). On a tree beliefs are the exact marginals and the Bethe free energy is -log Z. On graphs with loops both
    approximate: a fixed point is a stationary point of the Bethe free energy, which is no bound.

    Differentiable at a fixed point, for learning: the gradients of the Bethe free energy are exactly minus the beliefs
    and pair beliefs, without a backward pass; those of beliefs solve the adjoint equation by iteration. Neither is
    right before convergence. The free energy can be differentiated twice.

    Args:
        unary: [..., V, S], log potentials; -inf forbids a state. float32 or float64; bfloat16 and float16 are computed
            and returned in float32. Leading dimensions are problems of their own over the same edges: results do not
            depend on their neighbours, and each stops when it has converged. Graphs that differ are joined to one of
            all their variables, their edges shifted: the free energy is then their sum.
        edges: [E, 2], integers: each pair of variables once, in any order. Two edges of one pair are two factors, and a
            loop: an undirected `edge_index`, which holds both directions, doubles every coupling.
        pairwise: [..., E, S, S] log potentials at [x_i, x_j] of ``edges[e] = (i, j)``, of unary's dtype, or what
            broadcasts to it: [S, S] is one table for all edges, which the caches then hold.
        damping: in [0, 1), the part of the old log message that stays; .5 often settles what oscillates. It moves no
            fixed point.
        max_iters: sweeps at most; 1000 since lattices near a phase transition need hundreds.
        tol: converged when no log message would change by more in a sweep. Default 1e-5 in float32, whose messages
            carry rounding errors of 1e-6 at sums of ten, and 1e-10 in float64.
        product: "sum" for marginals, "max" for the most probable state.
        schedule: "flooding" changes all messages at once; "residual" the one that would change most (Elidan, McGraw &
            Koller 2006), which settles some graphs that flooding does not. It goes one message after the other: on a
            GPU or in float64, in Python.
        messages: [..., E, 2, S] to start from, those of another result. Default: 0, uniform; where states can be
            exchanged, that symmetry is then kept.

    Returns:
        BeliefPropagation.

    Warns:
        NotConverged: with ``converged=False``. UserWarning: states that tie, by the sum-product on a graph with more
        than one loop, from the default start, at a fixed point that messages leave once they are moved by .01; an
        edge that joins a pair once more; of the max-product, ties (see ``assignment``).

    Raises:
        TypeError: tensors of a wrong dtype, or what is no tensor. ValueError: shapes that do not fit, an end of an edge
            that is no variable or twice the same, NaN or +inf among potentials, numbers out of their range, and
            potentials that contradict each other so that no state is possible.

    Source: Yedidia, Freeman & Weiss 2005, IEEE Trans. Inf. Theory 51(7).
    """
    operands = _Operands(unary, edges, pairwise, messages)
    dtype = operands.unary.dtype
    settings = Settings(
        max_product=one_of(NAME, "product", product, PRODUCTS) == "max",
        by_residual=one_of(NAME, "schedule", schedule, SCHEDULES) == "residual",
        damping=number(NAME, "damping", damping, below=1.0),
        tol=TOL[dtype] if tol is None else number(NAME, "tol", tol),
        max_iters=integer(NAME, "max_iters", max_iters, 1),
    )
    operands.check_values()
    _warn_of_repeats(operands)
    found = fixed_point(operands.unary, operands.edges, operands.pairwise, operands.messages, settings)
    operands.check_possible(found.free_energy)
    energy = operands.energy(found.beliefs.argmax(-1)) if settings.max_product else found.free_energy
    converged = found.residual <= settings.tol
    if settings.max_product:
        _warn_of_ties(found, operands.edges, converged, settings.tol)
    elif messages is None:
        _warn_if_unstable(operands, found, converged)
    if not bool(converged.all()):
        _warn(found.residual, converged, settings)
    batch = operands.batch
    shaped = [
        each.reshape((*batch, *each.shape[1:]))
        for each in (found.beliefs, found.pair_beliefs, energy, found.residual, found.messages)
    ]
    return BeliefPropagation(
        beliefs=shaped[0],
        pair_beliefs=shaped[1],
        bethe_free_energy=shaped[2],
        converged=converged.reshape(batch) if batch else bool(converged),
        iterations=found.iterations.reshape(batch) if batch else int(found.iterations),
        residual=shaped[3],
        messages=shaped[4],
    )


@torch.no_grad()
def _warn_of_ties(found: FixedPoint, edges: Tensor, converged: Tensor, tol: float) -> None:
    """Where the states of both ends of an edge tie, and those chosen are not the edge's best: the energy is not least.

    Only neighbours that both tie can disagree, so that the pairs' beliefs are read where there are some.
    """
    beliefs = found.beliefs
    tol = max(tol, 8 * torch.finfo(beliefs.dtype).eps)  # what messages carry of rounding
    tied = (beliefs >= (1 - tol) * beliefs.amax(-1, keepdim=True)).sum(-1) > 1
    both = tied[:, edges].all(-1) & converged[:, None]
    if not bool(both.any()):
        return
    problem, edge = both.nonzero(as_tuple=True)
    pairs, chosen = found.pair_beliefs[problem, edge], beliefs.argmax(-1)[problem[:, None], edges[edge]]
    at = torch.arange(len(pairs), device=pairs.device)
    apart = pairs[at, chosen[:, 0], chosen[:, 1]] < (1 - 10 * tol) * pairs.amax((-2, -1))
    if bool(apart.any()):
        first = edges[edge[apart][0]].tolist()
        warnings.warn(
            f"{NAME}: several assignments are equally good, and the states chosen for variables {first} do not go"
            " together: bethe_free_energy, the energy of assignment, is not the least. A small difference between the"
            " unary potentials of the states breaks ties",
            UserWarning,
            stacklevel=3,
        )


def _warn_if_unstable(operands: _Operands, found: FixedPoint, converged: Tensor) -> None:
    left = departure(operands.unary, operands.edges, operands.pairwise, found, converged)
    if left is None:
        return
    which = f" of {left.problems} problems, {left.first} the first," if operands.batch else ""
    warnings.warn(
        f"{NAME}: the fixed point{which} is unstable, and only the symmetry of its states keeps messages at it: log"
        f" messages moved by up to {MOVE:g} do not return, and bethe_free_energy is"
        f" {float(found.free_energy[left.first]):.6g} at it and {left.free_energy:.6g} after"
        f" {2 * SWEEPS} damped sweeps from there. Break the symmetry: add a small field to unary (1e-4 at one state),"
        " or start from messages that lean towards a state",
        UserWarning,
        stacklevel=3,
    )


def _warn_of_repeats(operands: _Operands) -> None:
    if not (again := repeated(operands.edges, operands.unary.shape[1])):
        return
    warnings.warn(
        f"{NAME}: {again[0]} of {len(operands.edges)} edges join a pair of variables once more, {again[1]} among"
        " them: each counts as a factor of its own, so that a pair given in both directions has twice its coupling,"
        " and is a loop. Give each pair once, as edges[edges[:, 0] < edges[:, 1]] does of an undirected edge_index;"
        " add up tables that are meant to be two factors",
        UserWarning,
        stacklevel=3,
    )


def _warn(residual: Tensor, converged: Tensor, settings: Settings) -> None:
    count = (
        f"{int((~converged).sum())} of {converged.numel()} problems have"
        if converged.numel() > 1
        else "messages have"
    )
    warnings.warn(
        f"{NAME}: {count} not converged in {settings.max_iters} iterations: a log message still changes by"
        f" {float(residual.max()):.1e}, tol {settings.tol:g}. The beliefs and the free energy are no fixed point, their"
        " gradients are not right; damping=0.5 or schedule='residual' may help",
        NotConverged,
        stacklevel=3,
    )


class _Operands:
    """The arguments, checked and brought to [N, V, S], [E, 2], [N or 1, E, S, S], [N, E, 2, S]."""

    def __init__(self, unary: Any, edges: Any, pairwise: Any, messages: Any) -> None:
        unary, pairwise = floating(NAME, "unary", unary), floating(NAME, "pairwise", pairwise)
        edges = dense(NAME, "edges", edges)
        if unary.dim() < 2 or unary.shape[-1] == 0:
            raise ValueError(
                f"{NAME}: unary must have shape (..., V, S) with S >= 1; got {tuple(unary.shape)}"
            )
        if edges.dtype == torch.bool or edges.is_floating_point() or edges.is_complex():
            raise TypeError(f"{NAME}: edges must be integers; got {str(edges.dtype)[6:]}")
        if edges.dim() != 2 or edges.shape[1] != 2:
            raise ValueError(f"{NAME}: edges must have shape (E, 2); got {tuple(edges.shape)}")
        same_device(NAME, "edges", edges, unary.device)
        same_device(NAME, "pairwise", pairwise, unary.device)
        if pairwise.dtype != unary.dtype:
            raise TypeError(
                f"{NAME}: pairwise must be {str(unary.dtype)[6:]} like unary; got {str(pairwise.dtype)[6:]}"
            )
        self.batch = unary.shape[:-2]
        variables, states = unary.shape[-2:]
        count, problems = edges.shape[0], self.batch.numel()
        wanted = (*self.batch, count, states, states)
        if pairwise.dim() < 2 or not _broadcasts(pairwise.shape, wanted):
            raise ValueError(
                f"{NAME}: pairwise must have shape {wanted} or broadcast to it; got {tuple(pairwise.shape)}"
            )
        one_for_all = all(size == 1 for size in pairwise.shape[:-3])
        dtype = unary.dtype if unary.dtype in TOL else torch.float32
        self.unary = unary.to(dtype).reshape(problems, variables, states)
        tables = pairwise.to(dtype)
        tables = tables[None] if tables.dim() == 2 else tables
        if one_for_all:
            self.pairwise = tables.reshape(1, *tables.shape[-3:]).expand(1, count, states, states)
        else:
            tables = tables.expand(*self.batch, *tables.shape[-3:]).reshape(problems, *tables.shape[-3:])
            self.pairwise = tables.expand(problems, count, states, states)
        self.edges = edges.to(torch.int64)
        self.messages = self._start(messages, (*self.batch, count, 2, states))

    def _start(self, messages: Any, wanted: tuple[int, ...]) -> Tensor | None:
        problems = self.unary.shape[0]
        if messages is None:
            return None
        messages = floating(NAME, "messages", messages).detach()
        same_device(NAME, "messages", messages, self.unary.device)
        if messages.shape != wanted:
            raise ValueError(f"{NAME}: messages must have shape {wanted}; got {tuple(messages.shape)}")
        return messages.to(self.unary.dtype).reshape(problems, *wanted[-3:])

    @torch.no_grad()
    def check_values(self) -> None:
        for name in ("unary", "edges", "pairwise", "messages"):
            if getattr(self, name) is not None:
                check_storage(f"{NAME}: {name}", getattr(self, name))
        variables = self.unary.shape[1]
        if self.edges.numel():
            first, second = self.edges.unbind(1)
            low, high = (int(value) for value in self.edges.aminmax())
            if low < 0 or high >= variables:
                at = int(((self.edges < 0) | (self.edges >= variables)).any(1).nonzero()[0])
                raise ValueError(
                    f"{NAME}: edges must be in [0, {variables}), the variables of unary; got"
                    f" {self.edges[at].tolist()} at {at}"
                )
            if bool((first == second).any()):
                at = int((first == second).nonzero()[0])
                raise ValueError(
                    f"{NAME}: edges must join two variables; got {self.edges[at].tolist()} at {at} (a factor of one"
                    " variable belongs to unary)"
                )
        tables = self.pairwise[:, :1] if self.pairwise.stride(1) == 0 else self.pairwise
        for name, tensor in (("unary", self.unary), ("pairwise", tables), ("messages", self.messages)):
            # The largest is NaN where one is: one read of the data.
            if tensor is not None and tensor.numel() and not float(tensor.amax()) < torch.inf:
                raise ValueError(f"{NAME}: {name} must be finite or -inf; got NaN or +inf")

    @torch.no_grad()
    def check_possible(self, free_energy: Tensor) -> None:
        if bool(free_energy.isfinite().all()):
            return
        problem = int((~free_energy.isfinite()).nonzero()[0])
        which = f" of problem {problem}" if self.batch else ""
        dead = (self.unary[problem] == -torch.inf).all(-1)
        named = f" (variable {int(dead.nonzero()[0])} has none by its unary potential)" if dead.any() else ""
        raise ValueError(
            f"{NAME}: the potentials{which} contradict each other, no state is possible: -log Z is infinite{named}"
        )

    def energy(self, assignment: Tensor) -> Tensor:
        """[N], float64: minus the log potentials of an assignment [N, V]. Differentiable."""
        of_variables = self.unary.gather(2, assignment[..., None])[..., 0].double().sum(1)
        first, second = assignment[:, self.edges[:, 0]], assignment[:, self.edges[:, 1]]
        problem = torch.arange(self.pairwise.shape[0], device=first.device)[:, None]
        edge = torch.arange(self.edges.shape[0], device=first.device)
        return -(of_variables + self.pairwise[problem, edge, first, second].double().sum(1))


def _broadcasts(shape: torch.Size, wanted: tuple[int, ...]) -> bool:
    if len(shape) > len(wanted):
        return False
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return all(size == want or (size == 1 and k >= 2) for k, (size, want) in enumerate(pairs))
