"""The training loop of a model whose loss is a free energy, and what it tells of its course."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fekernels._checks import integer, number
from fekernels._loader_batches import check_batches, tensors
from fekernels._runtime.ranks import has_ranks
from fekernels.models.inference import ACTIVE, VarianceOfMeans, evaluating
from fekernels.ops.free_energy.free_energy import FreeEnergyTerms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fekernels.models.latent import LatentModel

__all__ = ["FiniteLosses", "History", "check_trainable", "fit", "inputs", "warn_of_own_training"]

Loss = Callable[[Tensor, float], tuple[FreeEnergyTerms, Tensor]]

READ_EVERY = 25  # steps between looks at the loss: on a GPU each waits for it


class FiniteLosses:
    """A training run's losses, of which each must be finite.

    On a CPU a loss that is not raises before the optimizer's step, so that the weights are those of the step before. On
    a GPU reading each would wait for the GPU: there they are looked at every 25 steps and at an epoch's end.
    """

    def __init__(self, function: str) -> None:
        self._function, self._epoch, self._step = function, 0, 0
        self._losses: list[Tensor] = []

    def begin_epoch(self) -> None:
        self._epoch, self._step = self._epoch + 1, 0
        self._losses.clear()

    def add(self, loss: Tensor) -> None:
        """To be called between the loss and the step.

        Raises:
            FloatingPointError: naming function, epoch and step.
        """
        self._step += 1
        loss = loss.detach()
        self._losses.append(loss)
        if loss.is_cpu:
            self._check(loss.item(), f"at epoch {self._epoch}, step {self._step}; that step was not made")
        elif self._step % READ_EVERY == 0:
            self._check_many(torch.stack(self._losses[-READ_EVERY:]))

    def mean(self) -> float | None:
        """Of the epoch's losses; None without one."""
        if not self._losses:
            return None
        losses = torch.stack(self._losses)
        if not losses.is_cpu:
            self._check_many(losses)
        return float(losses.mean())

    def _check_many(self, losses: Tensor) -> None:
        self._check(losses.sum().item(), f"at epoch {self._epoch}, up to step {self._step}")

    def _check(self, value: float, where: str) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self._function}: the loss is {value} {where}: of data that are not finite, of too large an lr, or "
                "of a variance that has fallen to 0"
            )


@dataclass
class History:
    """The course of a ``fit``, a value per epoch; energies are means per data point, in nats.

    Attributes:
        free_energy: of the training batches, on the way.
        energy: likewise.
        kl: likewise, before beta.
        validation: the free energy of the validation data after each epoch; empty without them.
        active_units: latents that the training batches' posteriors use, of ``latents``; see ``VAE.active_units``. Few
            of them, at a KL near 0, are a posterior collapse: the decoder has learned to do without z.
    """

    latents: int
    free_energy: list[float] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    active_units: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.free_energy:
            return "no epoch"
        parts = [
            f"epoch {len(self.free_energy)}: free energy {self.free_energy[-1]:.3f} = energy {self.energy[-1]:.3f}"
            f" + KL {self.kl[-1]:.3f} nats per data point"
        ]
        parts += [f"validation {self.validation[-1]:.3f}"] if self.validation else []
        return ", ".join([*parts, f"{self.active_units[-1]} of {self.latents} latents active"])

    def plot(self) -> Figure:
        """The course of the free energy and its parts, and of the active units."""
        from fekernels import plots

        return plots.free_energy_history(self)


def inputs(batch: Any) -> Tensor:
    """The first tensor of a batch, which may be a tensor, a tuple, a list or a mapping."""
    found = tensors(batch)
    if not found:
        raise TypeError(f"VAE.fit: a batch of loader must hold a tensor; got {type(batch).__name__}")
    return found[0]


def warn_of_own_training(function: str, loss: str) -> None:
    """To be called by a ``fit``, which its user calls: nothing there makes the ranks' models one."""
    if has_ranks():
        warnings.warn(
            f"{function}: each rank of the process group trains a model of its own here, on the batches that it is "
            "given. To train one model on all, write the loop, with a module in DistributedDataParallel whose forward "
            f"is {loss} (docs/distributed.md, 'Free energy')",
            stacklevel=3,
        )


def fit(
    model: LatentModel,
    loader: Iterable[Any],
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None,
    lr: float,
    beta: float | Callable[[int], float],
    loss: Loss,
    validation: Iterable[Any] | None,
    progress: bool,
) -> History:
    """``loss(x, beta)`` gives the terms of a batch and its posteriors' means. The others are those of ``VAE.fit``."""
    function = "VAE.fit"
    _check_batches(function, model, loader, "loader")
    if validation is not None:
        _check_batches(function, model, validation, "validation")
    epochs = integer(function, "epochs", epochs, 1)
    if optimizer is None:
        from fekernels.optim import LangevinAdam

        optimizer = LangevinAdam(model.parameters(), lr=number(function, "lr", lr))
    history, was_training, losses = History(model.latent_dim), model.training, FiniteLosses(function)
    try:
        for epoch in range(epochs):
            weight = number(function, "beta", beta(epoch) if callable(beta) else beta)
            model.train()
            losses.begin_epoch()
            name = f"epoch {epoch + 1}/{epochs}"
            _epoch(model, loader, optimizer, weight, loss, history, losses, name, progress)
            if validation is not None:
                with evaluating(model), torch.no_grad():
                    history.validation.append(_mean_free_energy(model, validation))
    finally:
        model.train(was_training)
    if not history.active_units[-1]:
        warnings.warn(
            f"{function}: posterior collapse: none of the {model.latent_dim} latents is active, KL {history.kl[-1]:.2g}"
            " nats; let beta rise from 0 over the first epochs, or give free_bits",
            stacklevel=3,
        )
    return history


def _check_batches(function: str, model: LatentModel, batches: Any, name: str) -> None:
    check_batches(function, batches, name)
    event = getattr(model, "event", None)
    # Whose rows would be taken for batches. A tensor of one dimension more is one of batches.
    if isinstance(batches, Tensor) and event is not None and batches.shape[1:] == event:
        raise TypeError(
            f"{function}: {name} must be an iterable of batches, such as x.split(100); got the data, a tensor of shape "
            f"{tuple(batches.shape)}"
        )


def check_trainable(function: str, loss: Tensor) -> None:
    """ValueError where no gradient flows, before the step that would find none."""
    if not loss.requires_grad:
        raise ValueError(
            f"{function}: a weight that the loss depends on must require grad; got none, as if all were frozen "
            "(requires_grad_(True), and no torch.no_grad around)"
        )


def _epoch(
    model: LatentModel,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    beta: float,
    loss: Loss,
    history: History,
    losses: FiniteLosses,
    name: str,
    progress: bool,
) -> None:
    from tqdm import tqdm

    device = next(model.parameters()).device
    totals, rows, used = None, 0, VarianceOfMeans()
    with tqdm(loader, desc=name, disable=not progress, leave=False, unit=" steps") as bar:
        for step, batch in enumerate(bar):
            x = inputs(batch).to(device)
            if not len(x):  # which has no mean
                continue
            terms, mean = loss(x, beta)
            check_trainable("VAE.fit", terms.free_energy)
            losses.add(terms.free_energy)
            used.add(mean)
            optimizer.zero_grad()
            terms.free_energy.backward()
            optimizer.step()
            # On the device: reading every loss would make a GPU wait.
            now = torch.stack([term.detach() for term in terms]).double() * len(x)
            totals, rows = now if totals is None else totals + now, rows + len(x)
            if step % READ_EVERY == 0:
                bar.set_postfix_str(f"free energy {float(totals[0]) / rows:.3f}", refresh=False)
    if totals is None:
        raise ValueError("VAE.fit: loader must hold a batch; got none")
    losses.mean()  # looks at them
    for values, total in zip((history.free_energy, history.energy, history.kl), totals.tolist(), strict=True):
        values.append(total / rows)
    history.active_units.append(used.active(ACTIVE))


def _mean_free_energy(model: LatentModel, batches: Iterable[Any]) -> float:
    device, total, rows = next(model.parameters()).device, 0.0, 0
    for batch in batches:
        x = inputs(batch).to(device)
        total, rows = total + float(model.free_energy(x, reduction="sum").free_energy), rows + len(x)
    return total / rows if rows else math.nan
