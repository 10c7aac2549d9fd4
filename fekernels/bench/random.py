"""The noise's cases: fills of one large tensor beside the generators of torch and numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fekernels._catalogue.random import USER
from fekernels.bench.case import Case, Cost, Group, Row, Shape, product, short
from fekernels.bench.timing import Contestant

__all__ = ["CASES"]

SEED = 20260
OURS, NUMPY = "fekernels", "numpy, Philox"

Fill = Callable[[Tensor], object]


def _ours(operator: str, out: Tensor) -> None:
    getattr(torch.ops.fekernels, operator)(out, SEED, 0, 1, 0, USER)


def _words(out: Tensor) -> Tensor:
    return out.view(torch.int32)


def _group(fills: Mapping[str, Fill], shape: Shape) -> Group:
    out = torch.empty(shape)
    return Group([Contestant(name, partial(fill, out)) for name, fill in fills.items()])


def _label(kind: str, shape: Shape) -> str:
    return f"{short(product(shape))} {kind}"


def _cost(operations: Mapping[str, float], shape: Shape) -> dict[str, Cost]:
    return {OURS: Cost(4, operations) * product(shape)}


def _case(kind: str, fill: Fill, peers: Mapping[str, Fill], operations: Mapping[str, float]) -> Case:
    return Case(
        f"random/{kind}",
        partial(_label, kind),
        ((25_600_000,), (2_560_000,), (4096,)),
        partial(_group, {OURS: fill, **peers}),
        tuple(Row(OURS, peer) for peer in peers),
        product,
        partial(_cost, operations),
    )


_numpy = np.random.Generator(np.random.Philox(SEED))

CASES = (
    _case(
        "normals",
        partial(_ours, "philox_normal"),
        {
            "torch normal_": lambda out: out.normal_(),
            NUMPY: lambda out: _numpy.standard_normal(out=out.numpy(), dtype=np.float32),
        },
        {"normal": 1},
    ),
    _case(
        "uniforms",
        partial(_ours, "philox_uniform"),
        {
            "torch uniform_": lambda out: out.uniform_(),
            NUMPY: lambda out: _numpy.random(out=out.numpy(), dtype=np.float32),
        },
        {"random word": 1},
    ),
    _case(
        "words",
        lambda out: _ours("philox_bits", _words(out)),
        {"torch random_": lambda out: _words(out).random_(-(1 << 31), (1 << 31) - 1)},
        {"random word": 1},
    ),
)
