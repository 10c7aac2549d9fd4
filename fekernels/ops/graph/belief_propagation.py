"""Belief propagation as an operator: checks of its operands, and gradients at the fixed point."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fekernels._checks import floating, integer, number
from fekernels._runtime import backends
from fekernels.ops._library import define_functional
from fekernels.ops.plain_memory import has_plain_memory, in_plain_memory
from fekernels.reference.graph.belief_propagation import Incidence, local_beliefs, sweep

__all__ = ["FixedPoint", "NotConverged", "Settings", "fixed_point"]

MOST_STATES = 64  # of the kernel
MOST_EDGES, MOST_VARIABLES = 1 << 29, (1 << 31) - 1


class NotConverged(UserWarning):
    """Messages, or their derivatives, have not settled: what was returned is no fixed point."""


class Settings(NamedTuple):
    max_product: bool
    by_residual: bool
    damping: float
    tol: float
    max_iters: int


class FixedPoint(NamedTuple):
    """What the operator returns, of N problems."""

    messages: Tensor  # [N, E, 2, S]
    beliefs: Tensor  # [N, V, S]
    pair_beliefs: Tensor  # [N, E, S, S]
    free_energy: Tensor  # [N], float64
    residual: Tensor  # [N]
    iterations: Tensor  # [N]


def _check(
    unary: Tensor,
    edges: Tensor,
    pairwise: Tensor,
    messages: Tensor | None,
    max_product: bool,
    by_residual: bool,
    damping: float,
    tol: float,
    max_iters: int,
) -> None:
    name = "belief_propagation"
    for argument, tensor in (("unary", unary), ("pairwise", pairwise), ("messages", messages)):
        if tensor is None:
            continue
        floating(name, argument, tensor)
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != unary.dtype:
            raise TypeError(
                f"{name}: {argument} must be float32 or float64, all of them one; got {tensor.dtype}"
            )
    if edges.dtype != torch.int64:
        raise TypeError(f"{name}: edges must be int64; got {edges.dtype}")
    if unary.dim() != 3:
        raise ValueError(f"{name}: unary must have shape (N, V, S); got {tuple(unary.shape)}")
    if edges.dim() != 2 or edges.shape[1] != 2:
        raise ValueError(f"{name}: edges must have shape (E, 2); got {tuple(edges.shape)}")
    count, _, states = unary.shape
    tables = (edges.shape[0], states, states)
    if pairwise.dim() != 4 or pairwise.shape[1:] != tables or pairwise.shape[0] not in (1, count):
        raise ValueError(
            f"{name}: pairwise must have shape {(count, *tables)} or 1 for N; got {tuple(pairwise.shape)}"
        )
    wanted = (count, edges.shape[0], 2, states)
    if messages is not None and messages.shape != wanted:
        raise ValueError(f"{name}: messages must have shape {wanted}; got {tuple(messages.shape)}")
    number(name, "damping", damping, below=1.0)
    number(name, "tol", tol)
    integer(name, "max_iters", max_iters, 0)


def _run(
    unary: Tensor,
    edges: Tensor,
    pairwise: Tensor,
    messages: Tensor | None,
    max_product: bool,
    by_residual: bool,
    damping: float,
    tol: float,
    max_iters: int,
) -> tuple[Tensor, ...]:
    _check(unary, edges, pairwise, messages, max_product, by_residual, damping, tol, max_iters)
    _, variables, states = unary.shape
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < variables:
        raise ValueError(f"belief_propagation: edges must be in [0, {variables})")
    native = (
        unary.dtype == torch.float32
        and 1 <= states <= MOST_STATES
        and edges.shape[0] < MOST_EDGES
        and variables < MOST_VARIABLES
    )
    backend = backends.choose(unary.device.type, kernel="belief_propagation") if native else "reference"
    kernel = backends.implementation("belief_propagation", backend)
    if backends.is_compiled(backend):
        # One table for all edges stays one, which the caches then hold.
        shared = has_plain_memory(pairwise) and pairwise.shape[1] > 0 and pairwise.stride(1) == 0
        tables = (
            pairwise[:, :1].contiguous().expand_as(pairwise)
            if shared
            else in_plain_memory(pairwise).contiguous()
        )
        operands = (in_plain_memory(each).contiguous() for each in (unary, edges))
        unary, edges = operands
        pairwise = tables
        messages = None if messages is None else in_plain_memory(messages).contiguous()
    return tuple(kernel(unary, edges, pairwise, messages, max_product, by_residual, damping, tol, max_iters))


def _fake(
    unary: Tensor, edges: Tensor, pairwise: Tensor, messages: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    _check(unary, edges, pairwise, messages, *settings)
    count, variables, states = unary.shape
    return (
        unary.new_empty(count, edges.shape[0], 2, states),
        unary.new_empty(count, variables, states),
        unary.new_empty(count, edges.shape[0], states, states),
        unary.new_empty(count, dtype=torch.float64),
        unary.new_empty(count),
        unary.new_empty(count, dtype=torch.int64),
    )


define_functional(
    "belief_propagation(Tensor unary, Tensor edges, Tensor pairwise, Tensor? messages, bool max_product,"
    " bool by_residual, float damping, float tol, int max_iters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)


def fixed_point(
    unary: Tensor, edges: Tensor, pairwise: Tensor, messages: Tensor | None, settings: Settings
) -> FixedPoint:
    """The operator with gradients: of the free energy exactly minus the beliefs, of beliefs by the adjoint equation."""
    return FixedPoint(*_FixedPoint.apply(unary, edges, pairwise, messages, settings))


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unary: Tensor, edges: Tensor, pairwise: Tensor, messages: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        found = torch.ops.fekernels.belief_propagation(unary, edges, pairwise, messages, *settings)
        ctx.save_for_backward(unary, edges, pairwise, *found[:3])
        ctx.settings = settings
        ctx.mark_non_differentiable(found[0], *found[4:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unary, edges, pairwise, messages, beliefs, pair_beliefs = ctx.saved_tensors
        _, of_beliefs, of_pairs, of_energy, _, _ = grads
        to_unary = to_pairwise = None
        if of_energy is not None:
            scale = -of_energy.to(unary.dtype)
            to_unary = scale[:, None, None] * beliefs
            to_pairwise = scale[:, None, None, None] * pair_beliefs
            if pairwise.shape[0] != pair_beliefs.shape[0]:
                to_pairwise = to_pairwise.sum(0, keepdim=True)
        if of_beliefs is not None or of_pairs is not None:
            of_beliefs = torch.zeros_like(beliefs) if of_beliefs is None else of_beliefs
            of_pairs = torch.zeros_like(pair_beliefs) if of_pairs is None else of_pairs
            through = _Adjoint.apply(unary, edges, pairwise, messages, of_beliefs, of_pairs, ctx.settings)
            to_unary = through[0] if to_unary is None else to_unary + through[0]
            to_pairwise = through[1] if to_pairwise is None else to_pairwise + through[1]
        return to_unary, None, to_pairwise, None, None


class _Adjoint(torch.autograd.Function):
    """Gradients of beliefs, whose messages m = T(m, potentials) are a fixed point: lambda = T_m' lambda + g_m.

    The equation is solved as the messages were, by iteration, which converges as fast as theirs did.
    """

    @staticmethod
    def forward(
        ctx: Any,
        unary: Tensor,
        edges: Tensor,
        pairwise: Tensor,
        messages: Tensor,
        of_beliefs: Tensor,
        of_pairs: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        graph = Incidence.of(edges, unary.shape[1])
        with torch.enable_grad():
            u, p, m = (each.detach().requires_grad_() for each in (unary, pairwise, messages))
            values = local_beliefs(u, p, m, graph)[:2]
            *found, source = torch.autograd.grad(values, (u, p, m), (of_beliefs, of_pairs))
            fresh = sweep(u, p, m, graph, settings.max_product)
        adjoint, tol = source, settings.tol * float(source.abs().amax()) if source.numel() else 0.0
        change = torch.inf if source.numel() and source.any() else 0.0
        for _ in range(settings.max_iters):
            if change <= tol:
                break
            (onward,) = torch.autograd.grad(fresh, m, adjoint, retain_graph=True)
            following = torch.lerp(source + onward, adjoint, settings.damping)
            change = float((following - adjoint).abs().amax()) / (1 - settings.damping)
            adjoint = following
        if not change <= tol:
            warnings.warn(
                f"belief_propagation: the gradients of beliefs have not converged in {settings.max_iters} iterations:"
                f" they still change by {change:.1e}. More damping, or a larger max_iters or tol, may help",
                NotConverged,
                stacklevel=2,
            )
        through = torch.autograd.grad(fresh, (u, p), adjoint)
        return found[0] + through[0], found[1] + through[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "belief_propagation: beliefs can be differentiated once, the Bethe free energy twice"
        )
