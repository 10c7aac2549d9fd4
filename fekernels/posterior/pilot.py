"""What a posterior run measures before it samples: curvature, Fisher information, and the noise of its gradients.

Everything is for each chain at its own position: a list of stacked tensors [n, *shape], as `Chains.parameters` gives
them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fekernels._loader_batches import concatenated, endless, layout, parts_of_a_row, rows, split, tensors
from fekernels._runtime.agreement import WORD, bits_of, word
from fekernels.diagnostics.mean_check import few_rows
from fekernels.posterior.chains import Chains, LossFunction
from fekernels.posterior.control_variate import gradients

if TYPE_CHECKING:
    from fekernels.posterior.chain_ranks import ChainRanks

__all__ = ["Data", "Energy", "batch_noise", "curvature", "flat", "information"]

PARTS = 64  # of the data, whose gradients give the Fisher information: its error is sqrt(2 / 64) of it
ITERATIONS = 8  # of the power method; the largest curvature is then known to some percent
WHOLE_POINTS, WHOLE_NUMBERS = 1 << 13, 1 << 22
PROBED = 4  # batches that it looks at


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """[n, weights]."""
    return torch.cat([t.detach().flatten(1) for t in tensors], 1)


class Data:
    """A loader's batches without end, and how often their points were looked at.

    Args:
        joins: whether data that are small are kept as one batch, ``whole``.
        prints: whether to take ``fingerprints``, one of each of the first two passes over the data: two that are
            equal are of data that come again, in whatever order.

    Attributes:
        comes_again: whether a second pass gives the same rows, as far as ``fingerprints`` tell.
        fits: whether data_size is the number of these points, or of what each of them holds, as sequences do tokens.
        terms: what one of them counts for in data_size.
    """

    def __init__(
        self,
        owner: str,
        loader: Iterable[Any],
        data_size: int,
        seed: int,
        joins: bool = True,
        prints: bool = False,
    ) -> None:
        self.owner, self.loader, self.data_size = owner, loader, data_size
        self.fingerprints: list[int] = []
        self.sample: Any = None  # a few rows, of the first batch that has them
        held = {1}
        sizes: list[int] = []
        for batch in self._pass(prints):
            held = held if sizes else {1, *parts_of_a_row(batch)}
            sizes.append(rows(owner, batch))
        if not sizes:
            raise ValueError(f"{owner}: loader must hold a batch; got none")
        self.batches, self.points = len(sizes), sum(sizes)
        self.batch = self.points / self.batches
        # A loader that drops its last batch has another one the next time.
        left_out = int(self.batch) - 1 if getattr(loader, "drop_last", False) else 0
        terms = [
            data_size // points
            for points in range(max(1, self.points), self.points + left_out + 1)
            if data_size % points == 0 and data_size // points in held
        ]
        self.fits, self.terms = bool(terms), terms[0] if terms else 1
        joins = joins and self._may_join(prints)
        # Whoever drops the last of shuffled rows gives others each time, and means the same points.
        prints = prints and len(self.fingerprints) > 1 and not getattr(loader, "drop_last", False)
        self.comes_again = not prints or self.fingerprints[0] == self.fingerprints[1]
        self.whole = concatenated(loader) if joins and self.comes_again else None
        self.looked_at = 0
        self._random = random.Random(seed)
        self._stream = endless(owner, _Shuffled(loader, self._random) if isinstance(loader, list) else loader)

    def _pass(self, prints: bool) -> Iterator[Any]:
        """The batches once, and a fingerprint of them: the passes that are made anyway, as each may be long."""
        total = 0
        for batch in self.loader:
            if prints:
                total += sum(
                    word(f"{i} {t.dtype} {tuple(t.shape)}") + (i + 1) * bits_of(t)
                    for i, t in enumerate(tensors(batch))
                )
            if self.sample is None:
                self.sample = few_rows(batch)
            yield batch
        self.fingerprints.append(total % WORD)

    def _may_join(self, prints: bool) -> bool:
        """Whether one call of the model may take all the points: a call alone costs as much as thousands of them.

        Not where a batch has entries of its own, a factor say, or all would get the first one's.
        """
        numbers, form, same = 0, None, True
        for k, batch in enumerate(self._pass(prints)):
            numbers += sum(t.numel() for t in tensors(batch))
            own = layout(batch) if same else None
            form = own if k == 0 else form
            same = same and own is not None and own == form
        return (self.batches == 1 or same) and self.points <= WHOLE_POINTS and numbers <= WHOLE_NUMBERS

    def next(self, count: int) -> list[tuple[Any, float]]:
        """Batches and their weights: a short one counts less, so that every point counts the same.

        In an order of their own: of a loader that always gives the same order, each chain would see every
        ``count``-th batch and no other.
        """
        batches = [next(self._stream) for _ in range(count)]
        self._random.shuffle(batches)
        return [(batch, rows(self.owner, batch) / self.batch) for batch in batches]

    @property
    def epochs(self) -> float:
        return self.looked_at / self.points


class _Shuffled:
    """A list of batches in another order each time."""

    def __init__(self, batches: list[Any], order: random.Random) -> None:
        self._batches, self._order = batches, order

    def __iter__(self) -> Iterator[Any]:
        return iter(self._order.sample(self._batches, len(self._batches)))


class Energy:
    """The mean loss of every chain and its gradients, on one batch, on one for each chain, or on all the data."""

    def __init__(self, chains: Chains, loss_fn: LossFunction, data: Data) -> None:
        self.chains, self.loss_fn, self.data = chains, loss_fn, data

    def gradient(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Losses [n] of one batch, and their gradients."""
        return self._of(batch, False, rows(self.data.owner, batch) * self.chains.n)

    def gradients_of(self, batches: list[tuple[Any, float]]) -> tuple[Tensor, list[Tensor]]:
        """Of a batch for each chain, times its weight."""
        found = self._of([b for b, _ in batches], True, sum(rows(self.data.owner, b) for b, _ in batches))
        weights = [w for _, w in batches]
        if any(w != 1.0 for w in weights):
            for g in found[1]:
                scale = torch.tensor(weights, dtype=g.dtype, device=g.device)
                g.mul_(scale.view(-1, *(1 for _ in g.shape[1:])))
        return found

    def _of(self, batch: Any, each: bool, points: int) -> tuple[Tensor, list[Tensor]]:
        if not self.chains.n:  # of a rank that has none of them
            parameters = list(self.chains.parameters())
            return parameters[0].new_zeros(0), [torch.zeros_like(p) for p in parameters]
        with torch.enable_grad():
            losses = self.chains.losses(self.loss_fn, batch, each=each)
            found = gradients(losses.sum(), list(self.chains.parameters()))
        self.data.looked_at += points
        return losses.detach(), found

    @torch.no_grad()
    def some_losses(self) -> Tensor:
        """Losses [n] of the first batches, the same ones at every call."""
        batches = list(itertools.islice(self.data.loader, PROBED))
        if not self.chains.n:
            return next(self.chains.parameters()).new_zeros(0)
        self.data.looked_at += sum(rows(self.data.owner, batch) for batch in batches) * self.chains.n
        return torch.stack([self.chains.losses(self.loss_fn, batch) for batch in batches]).mean(0)

    def full_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """Of all the data, every point counting the same."""
        if self.data.whole is not None:
            return self.gradient(self.data.whole)
        total: list[Tensor] | None = None
        losses = torch.zeros(())
        for batch in self.data.loader:
            share = rows(self.data.owner, batch) / self.data.points
            loss, found = self.gradient(batch)
            losses = losses.to(loss.device) + loss * share
            if total is None:
                total = [g * share for g in found]
            else:
                for t, g in zip(total, found, strict=True):
                    t.add_(g, alpha=share)
        assert total is not None
        return losses, total


def _parts(data: Data, limit: int) -> Iterator[Any]:
    """The data in parts of some rows, ``limit`` of them or, where that is nearly all, a whole pass."""
    size = max(1, min(math.floor(data.batch), data.points // limit))
    total = math.ceil(data.points / size)
    most = total if total <= 2 * limit else limit
    # Parts of several batches, not the first rows of a sorted set.
    stride = max(1, total // most)
    for i, part in enumerate(p for batch in data.loader for p in split(data.owner, batch, size)):
        if i % stride == 0 and i // stride < most:
            yield part


def information(energy: Energy) -> list[Tensor]:
    """The Fisher information of one data point, by each weight: the variance of gradients of single points.

    From the gradients of parts of n rows, whose variance is 1/n of it, or less where a row is several points.
    """
    seen = list(_parts(energy.data, PARTS))
    mean: list[Tensor] = []
    squares: list[Tensor] = []
    for k, part in enumerate(seen):
        count = rows(energy.data.owner, part) * energy.data.terms
        _, found = energy.gradient(part)
        if not mean:
            mean, squares = [g.clone() for g in found], [torch.zeros_like(g) for g in found]
            continue
        for m, s, g in zip(mean, squares, found, strict=True):  # Welford's, weighted by the rows
            delta = g - m
            m.add_(delta, alpha=1 / (k + 1))
            s.add_(delta * (g - m), alpha=count)
    return [s / max(len(seen) - 1, 1) for s in squares]


@torch.no_grad()
def curvature(
    energy: Energy, denominators: list[Tensor], temperature: float, ranks: ChainRanks | None = None
) -> Tensor:
    """[n]: the largest eigenvalue of D^-1/2 H D^-1/2 at each chain's position, by differences of gradients.

    The differences are one standard deviation of the posterior apart, so that what counts is the curvature over the
    distances that a chain moves.
    """
    parameters = list(energy.chains.parameters())
    stream = iter(endless(energy.data.owner, energy.data.loader))
    batches = [next(stream) for _ in range(min(PROBED, energy.data.batches))]
    here = [p.clone() for p in parameters]
    generator = torch.Generator().manual_seed(0)
    direction = []
    for p in parameters:
        count, mine = (energy.chains.n, slice(None)) if ranks is None else (ranks.count, ranks.mine)
        direction.append(torch.randn((count, *p.shape[1:]), generator=generator)[mine].to(p))
    largest = torch.zeros(energy.chains.n, device=parameters[0].device)
    step = math.sqrt(temperature)

    def gradient_at(sign: float) -> list[Tensor]:
        for p, at, v in zip(parameters, here, direction, strict=True):
            p.copy_(at + v * (sign * step))
        total = [torch.zeros_like(p) for p in parameters]
        for batch in batches:
            for t, g in zip(total, energy.gradient(batch)[1], strict=True):
                t.add_(g, alpha=1 / len(batches))
        return total

    for _ in range(ITERATIONS):
        norm = sum((v * v * d).flatten(1).sum(1) for v, d in zip(direction, denominators, strict=True))
        assert isinstance(norm, Tensor)
        for v in direction:
            v.div_(norm.sqrt().clamp_min(1e-30).view(-1, *(1 for _ in v.shape[1:])))
        ahead = gradient_at(1.0)
        product = [(a - b) / (2 * step) for a, b in zip(ahead, gradient_at(-1.0), strict=True)]
        found = sum((v * p).flatten(1).sum(1) for v, p in zip(direction, product, strict=True))
        assert isinstance(found, Tensor)
        largest = torch.fmax(largest, found.abs())
        direction = [p / d for p, d in zip(product, denominators, strict=True)]
    for p, at in zip(parameters, here, strict=True):
        p.copy_(at)
    return largest


def batch_noise(energy: Energy, count: int, centre: Energy | None = None) -> list[Tensor]:
    """The variance over batches of their gradients, or of what is left of them when the centre's are taken off."""
    mean: list[Tensor] = []
    squares: list[Tensor] = []
    for k in range(count):
        batch, weight = energy.data.next(1)[0]
        found = energy.gradient(batch)[1]
        if centre is not None:
            found = [here - there for here, there in zip(found, centre.gradient(batch)[1], strict=True)]
        found = [g * weight for g in found]
        if not mean:
            mean, squares = [g.clone() for g in found], [torch.zeros_like(g) for g in found]
            continue
        for m, s, g in zip(mean, squares, found, strict=True):
            delta = g - m
            m.add_(delta, alpha=1 / (k + 1))
            s.add_(delta * (g - m))
    return [s / max(count - 1, 1) for s in squares]
