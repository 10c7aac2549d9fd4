"""The posterior's cases: chains side by side, control variates, and the diagnostics of draws."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fekernels.bench.case import Case, Group, Row, Shape, product, short
from fekernels.bench.timing import Contestant
from fekernels.diagnostics import chain_statistics
from fekernels.optim import SGLD
from fekernels.posterior import Chains, ControlVariate

__all__ = ["CASES"]

CHAINS, LOOP = "Chains, SGLD", "a plain loop over the models"
OUR_STEP, LOOP_STEP = "SGLD's step", "the loop's updates"
LOOP_GRADIENTS = "the loop's forward and backward"
CONTROL, TWICE = "ControlVariate", "two gradient steps"
OURS, ARVIZ = "fekernels", "ArviZ"
LR, TEMPERATURE = 1e-4, 1e-4
INPUTS, CLASSES = 64, 10


def _network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def _batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, INPUTS, generator=generator), torch.randint(
        CLASSES, (rows,), generator=generator
    )


def _loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _chains(shape: Shape) -> Group:
    """[chains, width of the hidden layers, rows of a batch]: a step of all chains."""
    count, width, rows = shape
    batch = _batch(rows)
    chains = Chains(_network(width), count)
    optimizer = SGLD(chains.parameters(), LR, temperature=TEMPERATURE, seed=0)
    models = [_network(width) for _ in range(count)]
    noise = math.sqrt(2 * TEMPERATURE * LR)

    def ours() -> None:
        optimizer.zero_grad()
        chains.losses(_loss, batch).sum().backward()
        optimizer.step()

    @torch.no_grad()
    def update() -> None:
        for model in models:
            for p in model.parameters():
                assert p.grad is not None
                p.add_(p.grad, alpha=-LR).add_(torch.randn_like(p), alpha=noise)

    def gradients() -> None:
        for model in models:
            model.zero_grad()
            _loss(model, batch).backward()

    def loop() -> None:
        gradients()
        update()

    ours()
    loop()
    return Group([
        Contestant(CHAINS, ours), Contestant(LOOP, loop), Contestant(OUR_STEP, optimizer.step),
        Contestant(LOOP_STEP, update), Contestant(LOOP_GRADIENTS, gradients),
    ])  # fmt: skip


def _control(shape: Shape) -> Group:
    """[width of the hidden layers, rows of a batch]: a gradient step."""
    width, rows = shape
    batches = [_batch(rows)]
    model, plain = _network(width), _network(width)
    control = ControlVariate(model, _loss, batches)
    optimizers = [
        SGLD(m.parameters(), LR, temperature=TEMPERATURE, seed=k) for k, m in enumerate((model, plain))
    ]

    def controlled() -> None:
        control.backward(batches[0])
        optimizers[0].step()

    def twice() -> None:
        for _ in range(2):
            optimizers[1].zero_grad()
            _loss(plain, batches[0]).backward()
            optimizers[1].step()

    return Group([Contestant(CONTROL, controlled), Contestant(TWICE, twice)])


def _arviz() -> Callable[[Tensor], None]:
    stats: Any = importlib.import_module("arviz_stats.base").array_stats

    def diagnose(draws: Tensor) -> None:
        weights = draws.movedim(-1, 0).numpy()
        axes = {"chain_axis": 1, "draw_axis": 2}
        stats.rhat(weights, method="rank", **axes)
        stats.ess(weights, method="bulk", **axes)
        stats.ess(weights, method="tail", prob=(0.05, 0.95), **axes)

    return diagnose


def _diagnostics(shape: Shape) -> Group:
    """[chains, draws, weights]: R-hat and both effective sample sizes of every weight."""
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(2))

    contestants = [Contestant(OURS, partial(chain_statistics, draws))]
    try:
        contestants.append(Contestant(ARVIZ, partial(_arviz(), draws)))
    except ImportError:
        return Group(contestants, {ARVIZ: "pip install arviz-stats"})
    return Group(contestants)


def _weights(width: int) -> int:
    return sum(p.numel() for p in _network(width).parameters())


CASES = (
    Case(
        "posterior/chains",
        lambda shape: f"{shape[0]} chains of {short(_weights(shape[1]))}, batch {shape[2]}",
        ((16, 960, 64), (4, 128, 64), (2, 16, 8)),
        _chains,
        (
            Row(CHAINS, LOOP, 0.65),
            Row(OUR_STEP, LOOP_STEP, 0.1, "updates"),
            Row(CHAINS, LOOP_GRADIENTS),
        ),
        lambda shape: shape[0] * _weights(shape[1]),
    ),
    Case(
        "posterior/control_variate",
        lambda shape: f"control variates, {short(_weights(shape[0]))}, batch {shape[1]}",
        ((960, 64), (128, 64), (16, 8)),
        _control,
        (Row(CONTROL, TWICE, 1.1),),
        lambda shape: _weights(shape[0]),
    ),
    Case(
        "posterior/diagnostics",
        lambda shape: "R-hat and effective sizes, {} x {} x {:,}".format(*shape),
        ((8, 500, 1000), (8, 100, 100), (4, 20, 8)),
        _diagnostics,
        (Row(OURS, ARVIZ, 0.02),),
        product,
        rounds=3,
    ),
)  # fmt: skip
