"""Posteriors of single data points: the encoder's refined by gradient steps, and what a model's latents are used for.

Sources: Hoffman, Blei, Wang & Paisley 2013 (stochastic variational inference); Cremer, Li & Duvenaud 2018,
arXiv:1801.03558 (the amortisation gap); Burda, Grosse & Salakhutdinov 2016, arXiv:1509.00519, appendix C (active
units).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fekernels.losses.importance_bounds import importance_weighted_bound
from fekernels.ops.free_energy.free_energy import FreeEnergyTerms

__all__ = [
    "ACTIVE",
    "Posterior",
    "VarianceOfMeans",
    "evaluating",
    "refine",
    "warn_of_few_effective",
    "with_gradient_of_encoder",
]

ACTIVE = 0.01  # the variance of a latent's posterior mean above which Burda et al. call it active
# Of importance weights: how many samples they must be worth, of K at most K / 20, and for what share of the data they
# may be worth less. Trained models leave 0 to 3% below; K / 20 tells nothing of fewer than 40 samples.
FEW, PART, LEAST, SHARE = 10.0, 1 / 20, 40, 0.05


class Posterior(NamedTuple):
    """q(z | x) of each data point: means and log-variances, [B, latents]."""

    mean: Tensor
    logvar: Tensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and with running statistics, whose modules get their own modes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def refine(
    start: Posterior,
    of_step: Callable[[Posterior, int], Tensor],
    compared: Callable[[Posterior], Tensor],
    steps: int,
    lr: float,
) -> Posterior:
    """``steps`` of Adam on every data point's own mean and log-variance, kept where they have lowered its free energy.

    Adam is elementwise and what is minimised is a sum, so that no data point depends on its batch. lr falls linearly to
    0, which averages out the noise of the last steps.

    Args:
        start: where it begins, and what it is compared with.
        of_step: the free energy's sum over the batch at a posterior, with the noise of a step.
        compared: the free energy of each data point, [B], with one noise for all calls.
    """
    mean, logvar = (part.detach().clone().requires_grad_() for part in start)
    optimizer = torch.optim.Adam([mean, logvar], lr=lr)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            total = of_step(Posterior(mean, logvar), step)
            mean.grad, logvar.grad = torch.autograd.grad(total, (mean, logvar))
            optimizer.step()
    found = Posterior(mean.detach(), logvar.detach())
    with torch.no_grad():
        better = (compared(found) < compared(start)).unsqueeze(-1)  # NaN is not
        return Posterior(*(torch.where(better, *pair) for pair in zip(found, start, strict=True)))


class VarianceOfMeans:
    """The variance over the data of each latent's posterior mean, from batches [B, latents], on their device."""

    def __init__(self) -> None:
        self._count = 0
        self._first: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, mean: Tensor) -> None:
        mean = mean.detach().double()
        if len(mean) == 0:
            return
        if self._first is None or self._sums is None:
            self._first, self._sums = mean[:1], mean.new_zeros(2, mean.shape[1])
        # Less a first mean: squares of what lies far from 0 would cancel.
        off = mean - self._first
        self._count += len(mean)
        self._sums = self._sums + torch.stack([off.sum(0), (off * off).sum(0)])

    def active(self, threshold: float) -> int:
        """How many are above ``threshold``."""
        if self._sums is None:
            raise ValueError("VAE.active_units: data must hold a data point; got none")
        variance = (self._sums[1] - self._sums[0] ** 2 / self._count) / self._count
        return int((variance > threshold).sum())


def with_gradient_of_encoder(
    terms: FreeEnergyTerms, mean: Tensor, logvar: Tensor, of_mean: Tensor, of_logvar: Tensor
) -> FreeEnergyTerms:
    """``terms``, whose free energy also has these gradients in mean and logvar; its value stays the same."""
    along = (mean * of_mean).sum() + (logvar * of_logvar).sum()
    return terms._replace(free_energy=terms.free_energy + (along - along.detach()))


@torch.no_grad()
def warn_of_few_effective(
    function: str, log_w: Tensor, bound: Tensor, count: int, given: bool, group: Any = None
) -> None:
    """UserWarning where the weights of a share of the data are worth few samples, (sum w)^2 / sum w^2 (Kong 1992).

    Such a bound is about the largest weight that happened to be drawn: it lies nats below log p(x), and says so to
    nobody. Fewer than 40 samples are not judged, nor what torch.compile traces.

    Args:
        log_w: [K, B], of ``count`` samples on all ranks of ``group``. bound: [B], their log mean.
        given: whether the caller gave a posterior in place of the encoder's.
    """
    if count < LEAST or not len(bound) or torch.compiler.is_compiling():
        return
    squares = importance_weighted_bound(2 * log_w.detach(), process_group=group)
    effective = count * (2 * bound.detach() - squares).exp()
    least, rows = min(FEW, PART * count), len(effective)
    share = float((effective < least).double().mean())
    # Of few data points one or two may be below by chance.
    if share <= SHARE + 2 * math.sqrt(SHARE * (1 - SHARE) / rows):
        return
    do = "refine longer" if given else "refine first, posterior=vae.infer(x, 100)"
    warnings.warn(
        f"{function}: for {share:.0%} of {rows} data points the weights of {count} samples are worth fewer than "
        f"{least:g} (median {float(effective.median()):.1f}, smallest {float(effective.min()):.1f}): their bounds are "
        f"noise, and far below log p(x); {do}, or take more samples",
        stacklevel=4,  # over no_grad's own
    )
