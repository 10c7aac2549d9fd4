"""The restricted Boltzmann machine's cases: its free energy beside the matrix products that it cannot do without."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fekernels import random
from fekernels.bench.case import Case, Cost, Group, Row, Shape
from fekernels.bench.timing import Contestant
from fekernels.models import BernoulliRBM

__all__ = ["CASES", "PLAIN", "PRODUCTS"]

OURS, GIBBS = "free energy and gradients", "Gibbs sweep"
PRODUCTS, PLAIN = "its two matrix products alone", "plain torch, autograd"
PLAIN_GIBBS = "plain torch, torch.bernoulli"
TOLERANCE = 1e-4  # of the largest element, between two float32 results of different summation orders


def _machine(visible: int, hidden: int) -> BernoulliRBM:
    """With weights at which the hidden units are neither off nor on."""
    return BernoulliRBM(visible, hidden, std=1 / visible**0.5, seed=0)


def _data(rows: int, visible: int) -> Tensor:
    return (random.uniform((rows, visible), seed=1) <= 0.3).float()


def gradients(rbm: BernoulliRBM, v: Tensor, plain: bool) -> Tensor:
    """mean F(v) backwards, by ours or by plain torch: the gradients of all parameters are left in them."""
    rbm.zero_grad()
    if plain:
        inputs = F.linear(v, rbm.weight.t(), rbm.hidden_bias)
        loss = (-(v @ rbm.visible_bias) - F.softplus(inputs).sum(1)).mean()
    else:
        loss = rbm.free_energy(v, reduction="mean")
    loss.backward()
    assert rbm.weight.grad is not None
    return rbm.weight.grad


def _free_energy(shape: Shape) -> Group:
    """[rows, visible units, hidden units]."""
    rows, visible, hidden = shape
    rbm, v = _machine(visible, hidden), _data(rows, visible)
    weight, upstream = rbm.weight.detach(), torch.rand(rows, hidden)

    def products() -> None:
        v @ weight
        v.t() @ upstream

    contestants = [
        Contestant(OURS, partial(gradients, rbm, v, False)),
        Contestant(PRODUCTS, products),
    ]
    own, other = gradients(rbm, v, False).clone(), gradients(rbm, v, True).clone()
    error = float((own - other).abs().max() / other.abs().max())
    if error > TOLERANCE:
        return Group(contestants, {PLAIN: f"computes something else: {error:.1e} off"})
    return Group([*contestants, Contestant(PLAIN, partial(gradients, rbm, v, True))])


def _gibbs(shape: Shape) -> Group:
    rbm, v = _machine(*shape[1:]), _data(*shape[:2])

    @torch.no_grad()
    def plain() -> Tensor:
        h = torch.bernoulli(torch.sigmoid(F.linear(v, rbm.weight.t(), rbm.hidden_bias)))
        return torch.bernoulli(torch.sigmoid(F.linear(h, rbm.weight, rbm.visible_bias)))

    return Group([Contestant(GIBBS, partial(rbm.gibbs, v, seed=2)), Contestant(PLAIN_GIBBS, plain)])


def _inputs(shape: Shape) -> int:
    return shape[0] * shape[1]


def _costs(shape: Shape) -> dict[str, Cost]:
    """Of each hidden unit an exponential and a logarithm: softplus, and its derivative from the same exponential."""
    rows, visible, hidden = shape
    units = rows * hidden
    operations = {"multiply-add": 2.0 * units * visible, "exponential": 1.0 * units, "logarithm": 1.0 * units}
    return {OURS: Cost(8.0 * rows * visible + 16.0 * units, operations)}


def _sweep_costs(shape: Shape) -> dict[str, Cost]:
    rows, visible, hidden = shape
    units = rows * (visible + hidden)
    operations = {
        "multiply-add": 2.0 * rows * visible * hidden, "exponential": 1.0 * units, "random word": 1.0 * units
    }  # fmt: skip
    return {GIBBS: Cost(8.0 * units, operations)}


SHAPES = ((8192, 1024, 512), (1024, 512, 256), (40, 17, 9))

CASES = (
    Case(
        "rbm/free_energy",
        lambda shape: "RBM free energy, {} x {} x {}".format(*shape),
        SHAPES,
        _free_energy,
        (Row(OURS, PRODUCTS, 1.25), Row(OURS, PLAIN)),
        _inputs,
        _costs,
    ),
    Case(
        "rbm/gibbs",
        lambda shape: "RBM Gibbs sweep, {} x {} x {}".format(*shape),
        SHAPES,
        _gibbs,
        (Row(GIBBS, PLAIN_GIBBS),),
        _inputs,
        _sweep_costs,
    ),
)
