"""Whether a fixed point that a model's symmetry leads to is one that messages stay at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fekernels.ops.graph.belief_propagation import FixedPoint, Settings, fixed_point

__all__ = ["MOVE", "SWEEPS", "Departure", "departure", "repeated"]

MOVE = 0.01  # of log messages
SWEEPS = 100  # in each of two halves
LOOKED_AT = 64  # variables: where none of them has two states of one belief, no symmetry was kept


class Departure(NamedTuple):
    """Of the problems whose fixed point messages leave: how many, the first of them, and its free energy then."""

    problems: int
    first: int
    free_energy: float


@torch.no_grad()
def departure(
    unary: Tensor, edges: Tensor, pairwise: Tensor, found: FixedPoint, converged: Tensor
) -> Departure | None:
    """Move the messages of a symmetric fixed point by a little, and see whether they return; None where all do.

    Uniform messages are a fixed point of every model whose states can be exchanged, and a symmetric start stays
    symmetric, however unstable that is. Damping by one half leaves alone what merely oscillates: what it does not hold
    is no minimum of the Bethe free energy.
    """
    variables, states = unary.shape[1:]
    if states < 2 or not len(edges) or not variables:
        return None
    few = found.beliefs[:, :: -(-variables // LOOKED_AT)].sort(-1).values
    alike = few[..., 1:] - few[..., :-1] <= 4 * torch.finfo(few.dtype).eps * few[..., 1:]
    symmetric = ((alike & (few[..., 1:] > 0)).flatten(1).any(1) & converged).nonzero()[:, 0]
    if not len(symmetric):
        return None
    core = _core(edges, variables)
    # A tree forgets any move, and so does a single loop, whose messages go round and get smaller.
    if int(core.sum()) <= int(edges[core].unique().numel()):
        return None
    messages = found.messages[symmetric]
    moved = torch.where(core[:, None, None], messages + MOVE * _pattern(messages), messages)
    tables = pairwise if pairwise.shape[0] == 1 else pairwise[symmetric]
    settings = Settings(False, False, 0.5, 1e-3 * MOVE, SWEEPS)
    away = []
    for _ in range(2):
        after = fixed_point(unary[symmetric], edges, tables, moved, settings)
        moved = after.messages
        off = moved[:, core].log_softmax(-1) - messages[:, core].log_softmax(-1)
        away.append(off.nan_to_num(0.0).abs().flatten(1).amax(1))  # -inf less -inf: forbidden in both
    gone = ((away[1] > 3 * MOVE) & (away[1] > 0.98 * away[0])).nonzero()[:, 0]
    if not len(gone):
        return None
    return Departure(len(gone), int(symmetric[gone[0]]), float(after.free_energy[gone[0]]))


def _pattern(messages: Tensor) -> Tensor:
    """[E, 2, S] between 0 and 1: towards the first state, as ferromagnets go, and irregular, as all others."""
    shape = messages.shape[1:]
    at = torch.arange(shape.numel(), dtype=torch.float64, device=messages.device).view(shape)
    irregular = (at * 0.6180339887498949).frac()
    irregular[..., 0] += 1
    return (irregular / 2).to(messages.dtype)


def _core(edges: Tensor, variables: int) -> Tensor:
    """[E], bool: the edges on loops, or between loops: what is left when leaves are taken off until there are none."""
    kept = torch.ones(len(edges), dtype=torch.bool, device=edges.device)
    for _ in range(32):  # most trees are shallow; long chains are left to the walk
        degree = edges[kept].flatten().bincount(minlength=variables)
        onward = kept & (degree[edges] > 1).all(1)
        if bool((onward == kept).all()):
            return kept
        kept = onward
    left = kept.nonzero()[:, 0]
    pairs = edges[left].tolist()
    at: dict[int, set[int]] = {}
    for e, pair in enumerate(pairs):
        for end in pair:
            at.setdefault(end, set()).add(e)
    leaves = [end for end, its in at.items() if len(its) == 1]
    while leaves:
        its = at[leaves.pop()]
        if not its:
            continue
        e = its.pop()
        kept[left[e]] = False
        for end in pairs[e]:
            at[end].discard(e)
            if len(at[end]) == 1:
                leaves.append(end)
    return kept


@torch.no_grad()
def repeated(edges: Tensor, variables: int) -> tuple[int, list[int]] | None:
    """How many edges join a pair that another one has joined, in either direction, and one such pair."""
    first, second = edges.unbind(1)
    pairs = torch.minimum(first, second).mul_(variables).add_(torch.maximum(first, second)).sort().values
    again = pairs[1:] == pairs[:-1]
    count = int(again.sum())
    if not count:
        return None
    pair = int(pairs[1:][again][0])
    return count, [pair // variables, pair % variables]
