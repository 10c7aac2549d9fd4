"""Posteriors of single data points: the encoder's refined by gradient steps, and what a model's latents are used for.

Sources: Hoffman, Blei, Wang & Paisley 2013 (stochastic variational inference); Cremer, Li & Duvenaud 2018,
arXiv:1801.03558 (the amortisation gap); Burda, Grosse & Salakhutdinov 2016, arXiv:1509.00519, appendix C (active
units).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fekernels.ops.free_energy.free_energy import FreeEnergyTerms

__all__ = ["Posterior", "evaluating", "refine", "variances_of_means", "with_gradient_of_encoder"]


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


def variances_of_means(means: Iterable[Tensor]) -> Tensor:
    """The variance over the data of each latent's posterior mean, [latents], float64, from batches [B, latents]."""
    count, first, sums = 0, None, torch.zeros(2, 1, dtype=torch.float64)
    for mean in means:
        mean = mean.double().cpu()
        if first is None and len(mean):
            first = mean[:1]
        if first is not None:
            # Less a first mean: squares of what lies far from 0 would cancel.
            off = mean - first
            count, sums = count + len(mean), sums + torch.stack([off.sum(0), (off * off).sum(0)])
    if count == 0:
        raise ValueError("VAE.active_units: data must hold a data point; got none")
    return (sums[1] - sums[0] ** 2 / count) / count


def with_gradient_of_encoder(
    terms: FreeEnergyTerms, mean: Tensor, logvar: Tensor, of_mean: Tensor, of_logvar: Tensor
) -> FreeEnergyTerms:
    """``terms``, whose free energy also has these gradients in mean and logvar; its value stays the same."""
    along = (mean * of_mean).sum() + (logvar * of_logvar).sum()
    return terms._replace(free_energy=terms.free_energy + (along - along.detach()))
