"""Belief propagation in the log domain in plain PyTorch, on any device (Yedidia, Freeman & Weiss 2005).

Messages [N, E, 2, S] are logarithms whose largest is 0: [:, e, 0] arrives at ``edges[e, 0]`` from ``edges[e, 1]``, and
[:, e, 1] the other way. A problem's numbers do not depend on those that it is solved with.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Incidence", "belief_propagation", "local_beliefs", "sweep"]


class Incidence(NamedTuple):
    """Which messages arrive at each variable: rows ``order[offsets[i] : offsets[i + 1]]`` of the messages [2E, S]."""

    edges: Tensor  # [E, 2]
    order: Tensor  # [2E]
    offsets: Tensor  # [V + 1]

    @classmethod
    def of(cls, edges: Tensor, variables: int) -> Incidence:
        ends = edges.flatten()
        counts = torch.bincount(ends, minlength=variables)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(edges, ends.argsort(stable=True), offsets)

    @property
    def degrees(self) -> Tensor:
        return self.offsets.diff()

    def gathered(self, arriving: Tensor) -> Tensor:
        """Sums [N, V, S] of what arrives [N, E, 2, S], in one order, which an index_add_ on a GPU does not keep.

        In float64: of 1e5 messages to a hub a float32 keeps no digit behind the point.
        """
        rows = arriving.double().flatten(1, 2).movedim(1, 0)[self.order]
        return torch.segment_reduce(rows, "sum", offsets=self.offsets, unsafe=True, initial=0).movedim(0, 1)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """As torch's, but where all are -inf the gradient is 0."""
    most = x.detach().amax(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
    total = (x - most).exp().sum(dim, keepdim=True)
    none = total == 0
    found = torch.where(none, -torch.inf, torch.where(none, 1, total).log() + most)
    return found.squeeze(dim)


def told(unary: Tensor, messages: Tensor, graph: Incidence) -> tuple[Tensor, Tensor]:
    """What each variable [N, V, S] has been told, and each end of an edge [N, E, 2, S] by all but the other one.

    Both float64. Of -inf, which cannot be taken off again, the messages are counted.
    """
    forbids = messages == -torch.inf
    finite = torch.where(forbids, 0, messages)
    sums = unary + graph.gathered(finite)
    counts = graph.gathered(forbids)
    at_ends = counts[:, graph.edges] - forbids.double()
    others = torch.where(at_ends > 0, -torch.inf, sums[:, graph.edges] - finite)
    return torch.where(counts > 0, -torch.inf, sums), others


def _normalised(x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)


def _relative(told: Tensor, dtype: torch.dtype) -> Tensor:
    """For a message, which is normalised anyway: less its largest first, so that a hub's float32 keeps its digits."""
    return (told - told.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)).to(dtype)


def sweep(
    unary: Tensor, pairwise: Tensor, messages: Tensor, graph: Incidence, max_product: bool = False
) -> Tensor:
    """All messages anew [N, E, 2, S] from all old ones, normalised."""
    _, others = told(unary, messages, graph)
    others = _relative(others, unary.dtype)
    to_first = pairwise + others[:, :, 1, None, :]
    to_second = pairwise + others[:, :, 0, :, None]
    if max_product:
        fresh = torch.stack([to_first.amax(-1), to_second.amax(-2)], 2)
    else:
        fresh = torch.stack([_logsumexp(to_first, -1), _logsumexp(to_second, -2)], 2)
    return _normalised(fresh)


def local_beliefs(
    unary: Tensor, pairwise: Tensor, messages: Tensor, graph: Incidence
) -> tuple[Tensor, Tensor, Tensor]:
    """Beliefs [N, V, S], those of pairs [N, E, S, S], and the Bethe free energy [N] in float64 of these messages.

    F = sum_i (d_i - 1) log Z_i - sum_e log Z_e, in which the scales of messages cancel: at a fixed point the sum of
    energies and entropies of the beliefs, and off it right to second order. All in float64: at a hub float32 roundings
    would count once for each of its edges.
    """
    dtype = unary.dtype
    sums, others = told(unary, messages, graph)
    pairs = (pairwise + others[:, :, 0, :, None] + others[:, :, 1, None, :]).flatten(2)
    of_variables = _logsumexp(sums, -1) * (graph.degrees - 1)
    free_energy = of_variables.sum(1) - _logsumexp(pairs, -1).sum(1)
    impossible = sums.amax(-1, keepdim=True) == -torch.inf
    beliefs = torch.where(impossible, 0, sums).softmax(-1)
    no_pair = pairs.amax(-1, keepdim=True) == -torch.inf
    of_pairs = torch.where(no_pair, 0, pairs).softmax(-1).unflatten(2, pairwise.shape[2:])
    return beliefs.to(dtype), of_pairs.to(dtype), free_energy


def _change(fresh: Tensor, old: Tensor) -> Tensor:
    return torch.where(fresh == old, 0, (fresh - old).abs())


def _damped(fresh: Tensor, old: Tensor, damping: float) -> Tensor:
    mixed = fresh + damping * (old - fresh)
    return torch.where((fresh == -torch.inf) | (old == -torch.inf), fresh, mixed)


def _flooding(
    unary: Tensor,
    pairwise: Tensor,
    messages: Tensor,
    graph: Incidence,
    max_product: bool,
    damping: float,
    tol: float,
    max_iters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    count = unary.shape[0]
    edges = graph.edges.shape[0]
    residual = unary.new_full((count,), torch.inf if edges else 0.0)
    iterations = torch.zeros(count, dtype=torch.int64, device=unary.device)
    for _ in range(max_iters):
        going = ~(residual <= tol)
        if not going.any():
            break
        fresh = sweep(unary, pairwise, messages, graph, max_product)
        residual = torch.where(going, _change(fresh, messages).flatten(1).amax(1), residual)
        if damping:
            fresh = _damped(fresh, messages, damping)
        messages = torch.where(going[:, None, None, None], fresh, messages)
        iterations += going
    return messages, residual, iterations


class _Sequential:
    """One problem whose messages change one at a time, that of the largest residual first (Elidan et al. 2006)."""

    def __init__(
        self, unary: Tensor, pairwise: Tensor, messages: Tensor, graph: Incidence, max_product: bool
    ) -> None:
        self.unary, self.messages, self.max_product = unary, messages.flatten(0, 1).clone(), max_product
        # [2E, S of the target, S of the source]
        self.tables = torch.stack([pairwise, pairwise.mT], 1).flatten(0, 1)
        self.sources = graph.edges.flip(1).flatten().tolist()
        self.targets = graph.edges.flatten().tolist()
        self.arriving = [rows.tolist() for rows in graph.order.split(graph.degrees.tolist())]
        fresh = sweep(unary[None], pairwise[None], messages[None], graph, max_product)[0].flatten(0, 1)
        self.fresh = list(fresh)
        self.residuals = _change(fresh, self.messages).amax(-1).tolist()
        # Entries that a later residual has replaced stay in the heap, and are passed over.
        self.heap = [(-residual, row) for row, residual in enumerate(self.residuals)]
        heapq.heapify(self.heap)

    def largest(self) -> int:
        while -self.heap[0][0] != self.residuals[self.heap[0][1]]:
            heapq.heappop(self.heap)
        return self.heap[0][1]

    def _set_residual(self, row: int) -> None:
        self.residuals[row] = float(_change(self.fresh[row], self.messages[row]).max())
        heapq.heappush(self.heap, (-self.residuals[row], row))

    def update(self, row: int, damping: float) -> None:
        """This message, and what it makes of those that leave its target."""
        fresh = self.fresh[row]
        self.messages[row] = _damped(fresh, self.messages[row], damping) if damping else fresh
        self._set_residual(row)
        variable = self.targets[row]
        rows = self.arriving[variable]
        for at, arriving in enumerate(rows):
            back = arriving ^ 1  # the other direction of its edge
            if arriving == row:
                continue
            others = [*rows[:at], *rows[at + 1 :]]
            told = self.unary[variable] + self.messages[others].sum(0, dtype=torch.float64)
            pairs = self.tables[back] + _relative(told, self.messages.dtype)
            message = pairs.amax(-1) if self.max_product else _logsumexp(pairs, -1)
            self.fresh[back] = _normalised(message)
            self._set_residual(back)


def _by_residual(
    unary: Tensor,
    pairwise: Tensor,
    messages: Tensor,
    graph: Incidence,
    max_product: bool,
    damping: float,
    tol: float,
    max_iters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    size = 2 * graph.edges.shape[0]
    for k in range(unary.shape[0]):
        if not size:
            found.append((messages[k], 0.0, 0))
            continue
        one = _Sequential(unary[k], pairwise[min(k, pairwise.shape[0] - 1)], messages[k], graph, max_product)
        updates = 0
        while (residual := one.residuals[row := one.largest()]) > tol and updates < max_iters * size:
            one.update(row, damping)
            updates += 1
        found.append((one.messages.unflatten(0, (-1, 2)), residual, -(-updates // size)))
    return (
        torch.stack([each[0] for each in found]) if found else messages,
        unary.new_tensor([each[1] for each in found]),
        torch.tensor([each[2] for each in found], dtype=torch.int64, device=unary.device),
    )


def belief_propagation(
    unary: Tensor,
    edges: Tensor,
    pairwise: Tensor,
    messages: Tensor | None,
    max_product: bool,
    by_residual: bool,
    damping: float,
    tol: float,
    max_iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Messages [N, E, 2, S], beliefs [N, V, S], of pairs [N, E, S, S], free energy, residual and iterations [N].

    Args: unary [N, V, S], edges [E, 2], pairwise [N or 1, E, S, S], messages [N, E, 2, S] to start from, None: 0.
    """
    graph = Incidence.of(edges, unary.shape[1])
    run = _by_residual if by_residual else _flooding
    if messages is None:
        messages = unary.new_zeros(unary.shape[0], edges.shape[0], 2, unary.shape[2])
    start = _normalised(messages)
    messages, residual, iterations = run(unary, pairwise, start, graph, max_product, damping, tol, max_iters)
    beliefs, pair_beliefs, free_energy = local_beliefs(unary, pairwise, messages, graph)
    return messages, beliefs, pair_beliefs, free_energy, residual, iterations
