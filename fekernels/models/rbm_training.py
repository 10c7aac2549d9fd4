"""The training loop of `BernoulliRBM.fit`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fekernels import random
from fekernels._catalogue.random import LATENT_SAMPLE
from fekernels._checks import boolean, integer, number
from fekernels._loader_batches import check_batches
from fekernels.models.rbm_doubts import Kept, doubt_fit, log_odds
from fekernels.models.training import FiniteLosses
from fekernels.optim import LangevinAdam

if TYPE_CHECKING:
    from fekernels.models.rbm import BernoulliRBM

__all__ = ["train"]

OWNER = "fit"


def train(
    rbm: BernoulliRBM,
    data: Tensor | Iterable[Any],
    epochs: int,
    lr: float,
    batch_size: int,
    k: int,
    persistent: bool,
    optimizer: torch.optim.Optimizer | None,
    progress: bool,
    callback: Callable[[BernoulliRBM, int], Any] | None,
    stream: int,
    doubts: int,
) -> list[float]:
    epochs = integer(OWNER, "epochs", epochs, 0, 1 << 32)
    lr, size = number(OWNER, "lr", lr), integer(OWNER, "batch_size", batch_size, 1, 1 << 40)
    k, persistent = integer(OWNER, "k", k, 1, 1 << 24), boolean(OWNER, "persistent", persistent)
    progress = boolean(OWNER, "progress", progress)
    if not isinstance(data, (Tensor, Iterable)):
        raise TypeError(
            f"{OWNER}: data must be a tensor or an iterable of batches; got {type(data).__name__}"
        )
    if not isinstance(data, Tensor):
        check_batches(OWNER, data, "data")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{OWNER}: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    if isinstance(data, Tensor):
        data = _flat(rbm, data)
        if not len(data):
            raise ValueError(f"{OWNER}: data must hold a row; got shape {tuple(data.shape)}")
        rbm.check_domain(OWNER, data, name="data")
    if epochs and not any(p.requires_grad for p in rbm.parameters()):
        raise ValueError(
            f"{OWNER}: a parameter of the machine must require a gradient; none does: all are frozen"
        )

    def batches() -> Iterator[Tensor]:
        if isinstance(data, Tensor):
            words = random.bits(
                (len(data),),
                seed=rbm.seed,
                step=rbm.draws,
                stream=stream,
                purpose=LATENT_SAMPLE,
                device=data.device,
            )
            for rows in words.argsort(stable=True).split(size):
                yield data[rows]
        else:
            for item in data:
                flat = _flat(rbm, item[0] if isinstance(item, (tuple, list)) else item)
                if len(flat):  # nothing has no mean
                    yield flat

    if not bool(rbm.visible_bias.detach().any()) and epochs:
        first = data if isinstance(data, Tensor) else next(batches(), None)
        if first is not None:
            # The means are read here in any case, wherever the data lie.
            where = f"{OWNER}: epoch 1, step 1" if first is not data else OWNER
            rbm.check_domain(where, first, True, name="v" if first is not data else "data")
            rbm.set_base_rates(first)
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    if optimizer is None:
        optimizer = LangevinAdam(rbm.parameters(), lr, seed=rbm.seed)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / max(epochs, 1))
    from tqdm import tqdm

    found: list[float] = []
    losses = FiniteLosses("BernoulliRBM.fit")
    bar = tqdm(range(epochs), desc="BernoulliRBM", unit="epoch", disable=not progress)
    for epoch in bar:
        losses.begin_epoch()
        kept, total, rows = Kept(), torch.zeros_like(rbm.visible_bias, dtype=torch.float64), 0
        for step, v in enumerate(batches()):
            rbm.check_domain(f"{OWNER}: epoch {epoch + 1}, step {step + 1}", v)
            optimizer.zero_grad()
            gap = rbm.contrastive_divergence(v, k, persistent, validate=False)
            losses.add(gap)
            gap.backward()
            optimizer.step()
            if not epoch:
                total, rows = total + v.sum(0), rows + len(v)
            if epoch == epochs - 1:
                kept.add(v)
        mean = losses.mean()
        if mean is None:
            raise ValueError(f"{OWNER}: data must yield a batch in every epoch; got none in epoch {epoch}")
        if not epoch:
            rbm.base_odds = log_odds(total / rows, rows).to(rbm.weight)
        if schedule is not None:
            schedule.step()
        found.append(mean)
        bar.set_postfix({"F(data) - F(samples)": f"{found[-1]:.3f}"}, refresh=False)
        if callback is not None:
            callback(rbm, epoch + 1)
    if epochs and (doubt := doubt_fit(rbm, kept.rows(), doubts)):
        warnings.warn(doubt, stacklevel=3)
    return found


def _flat(rbm: BernoulliRBM, v: Any) -> Tensor:
    """[n, n_visible] of whatever shape behind the first dimension, on the machine's device and in its dtype."""
    if not isinstance(v, Tensor):
        raise TypeError(
            f"{OWNER}: data must yield tensors, or tuples with one in front; got {type(v).__name__}"
        )
    flat = v.detach().flatten(1) if v.dim() > 1 else v.detach()
    if flat.dim() != 2 or flat.shape[1] != rbm.n_visible:
        raise ValueError(
            f"{OWNER}: data must have shape (n, {rbm.n_visible}) once flattened; got {tuple(v.shape)}"
        )
    return flat.to(rbm.weight)
