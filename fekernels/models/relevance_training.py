"""The training loop of `RelevanceModel.fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from fekernels._checks import boolean, integer, number
from fekernels._loader_batches import check_batches
from fekernels.models.relevance_pairs import Negatives
from fekernels.models.training import FiniteLosses, check_trainable
from fekernels.optim import LangevinAdam, TemperatureScheduler

if TYPE_CHECKING:
    from fekernels.models.relevance import RelevanceModel

__all__ = ["Temperature", "train"]

Temperature = float | Callable[[int], float] | TemperatureScheduler


def train(
    model: RelevanceModel,
    loader: Iterable[Any],
    epochs: int,
    lr: float,
    optimizer: torch.optim.Optimizer | None,
    temperature: Temperature | None,
    progress: bool,
) -> list[float]:
    name = "RelevanceModel.fit"
    epochs, progress = integer(name, "epochs", epochs, 0), boolean(name, "progress", progress)
    check_batches(name, loader)
    at = _schedule(name, temperature)
    if optimizer is None:
        optimizer = LangevinAdam(model.parameters(), lr=number(name, "lr", lr), seed=model.seed)
    from tqdm import tqdm

    means: list[float] = []
    losses, was_training, negatives = FiniteLosses(name), model.training, Negatives(name, model)
    bar = tqdm(range(epochs), desc="RelevanceModel", unit="epoch", disable=not progress)
    try:
        for _ in bar:
            model.train()
            losses.begin_epoch()
            for batch in loader:
                queries, contexts = _pair(name, batch)
                if at is not None:
                    model.temperature = at(model.steps)
                optimizer.zero_grad()
                relevant = negatives.relevant(queries, contexts)
                if relevant is None:
                    loss = model.loss(queries, contexts)
                else:
                    loss = model.loss(queries, contexts, relevant=relevant)
                check_trainable(name, loss)
                losses.add(loss)
                loss.backward()
                optimizer.step()
            mean = losses.mean()
            if mean is None:
                raise ValueError(f"{name}: loader must hold a batch; got none")
            negatives.end_epoch()
            means.append(mean)
            bar.set_postfix_str(f"free energy {mean:.3g} nats, T {model.temperature:.2g}")
    finally:
        model.train(was_training)
    return means


def _pair(owner: str, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        came = f"{len(batch)} of them" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"{owner}: a batch of loader must be (queries, contexts); got {came}")
    return batch[0], batch[1]


def _schedule(owner: str, temperature: Temperature | None) -> Callable[[int], float] | None:
    if temperature is None:
        return None
    if isinstance(temperature, TemperatureScheduler):
        schedule = temperature
        return lambda step: float(schedule.get_temperature(step)[0])
    if callable(temperature):
        return temperature
    constant = number(owner, "temperature", temperature)
    return lambda step: constant
