"""VariationalAdam's cases: a draw of the weights and a step, beside ivon-opt and PyTorch's fused Adam; and its KL."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn import Parameter

from fekernels.bench import peers
from fekernels.bench.case import Case, Cost, Group, Row, Shape, product, short
from fekernels.bench.optimizers import LARGE, parameters, values
from fekernels.bench.peers import ADAM, LR
from fekernels.bench.timing import Contestant
from fekernels.optim import VariationalAdam

__all__ = ["CASES", "DRAW_COST", "IVON", "KL", "OURS", "READING", "STEP_COST"]

OURS, IVON, KL, READING = "VariationalAdam", "ivon-opt", "kl()", "sums of its inputs"
ESS = 1e4

# A parameter's share. The draw reads mean and curvature, writes the sample and keeps the mean; leaving the context
# copies that back; the step reads gradient, mean, both averages, and writes the last three.
DRAW_COST = Cost(16, {"root": 1, "normal": 1})
STEP_COST = Cost(28, {"root": 1, "normal": 1})
BOTH_COST = Cost.of_passes(DRAW_COST, Cost(8), STEP_COST)
KL_COST = Cost(8)


def _turn(optimizer: Any) -> Callable[[], None]:
    """A context, whose gradients are there already, and the step: user code but for forward and backward."""

    def run() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return run


def ivon(params: list[Parameter]) -> Contestant:
    """The authors' own code (pip install ivon-opt)."""
    module: Any = importlib.import_module("ivon")
    return Contestant(IVON, _turn(module.IVON(params, lr=LR, ess=ESS)))


def _draw_and_step(shape: Shape) -> Group:
    count, numel = shape
    make = partial(parameters, values(count, numel, 0), values(count, numel, 1))
    contestants = [
        Contestant(ADAM, peers.adam(make()).step),
        Contestant(OURS, _turn(VariationalAdam(make(), LR, ESS, seed=1))),
    ]
    if importlib.util.find_spec("ivon") is None:
        return Group(contestants, {IVON: "pip install ivon-opt"})
    return Group([*contestants, ivon(make())])


def _kl(shape: Shape) -> Group:
    count, numel = shape
    params = [Parameter(value) for value in values(count, numel, 0)]
    optimizer = VariationalAdam(params, LR, ESS, seed=1)
    optimizer.kl()  # makes the states

    def reading() -> None:
        for param in params:
            param.detach().sum()
            optimizer.state[param]["hessian"].sum()

    return Group([Contestant(KL, optimizer.kl), Contestant(READING, reading)])


def _costs(cost: Cost, name: str, shape: Shape) -> dict[str, Cost]:
    return {name: cost * product(shape)}


def _label(what: str, shape: Shape) -> str:
    count, numel = shape
    size = f"{short(numel)} float32" if count == 1 else f"{count:,} tensors of {numel:,}"
    return f"{what} {size}"


CASES = (
    Case(
        "optimizers/variational",
        partial(_label, "VariationalAdam"),
        LARGE,
        _draw_and_step,
        (Row(OURS, IVON, 0.03), Row(OURS, ADAM, 1.9)),
        product,
        partial(_costs, BOTH_COST, OURS),
        seconds=7.0,
    ),
    Case(
        "optimizers/variational_many",
        partial(_label, "VariationalAdam"),
        ((200, 10_000), (50, 10_000), (2, 300)),
        _draw_and_step,
        (Row(OURS, IVON, 0.1), Row(OURS, ADAM, None)),
        product,
        partial(_costs, BOTH_COST, OURS),
        cached=True,
        seconds=7.0,
    ),
    Case(
        "optimizers/variational_kl",
        partial(_label, "VariationalAdam.kl"),
        LARGE,
        _kl,
        (Row(KL, READING, 1.2),),
        product,
        partial(_costs, KL_COST, KL),
        seconds=7.0,
    ),
)
