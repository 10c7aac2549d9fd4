"""The optimizers on sharded parameters: steps under FSDP2, beside the same step on plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import Parameter

from fekernels.bench import processes
from fekernels.bench.case import Case, Row, Shape, product, short
from fekernels.bench.optimizers import parameters, values
from fekernels.bench.peers import ADAM, LR, TEMPERATURE, adam
from fekernels.bench.timing import Contestant
from fekernels.optim import LangevinAdam

__all__ = ["CASES"]

WORLD = 2
SHARDED, SHARDED_HOT = "LangevinAdam on shards, T = 0", "LangevinAdam on shards, T > 0"
PLAIN, AT_ONCE = "plain parameters, one process", "plain parameters, a process each"


def sharded(shape: Shape) -> list[Parameter]:
    """[tensors, elements of each on each rank] as FSDP2 shards them, with their gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    count, numel = shape
    module = torch.nn.ParameterList(values(count, WORLD * numel, 0))
    fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    for param, local in zip(module, values(count, numel, 1), strict=True):
        param.grad = DTensor.from_local(local, param.device_mesh, param.placements)
    return list(module)


def _step(shape: Shape) -> Sequence[Contestant]:
    """In each process, as many elements each: what the unsharded step does in one, alone or beside the other's."""
    count, numel = shape
    plain = parameters(values(count, numel, 0), values(count, numel, 1))
    optimizer = LangevinAdam(plain, lr=LR, seed=1)
    contestants = [
        Contestant(AT_ONCE, optimizer.step),
        Contestant(SHARDED, LangevinAdam(sharded(shape), lr=LR, seed=1).step),
    ]
    if torch.distributed.get_rank() == 0:
        contestants.append(Contestant(PLAIN, optimizer.step))
    return contestants


def _many(shape: Shape) -> Sequence[Contestant]:
    """Each contestant steps shards of its own."""
    hot = LangevinAdam(sharded(shape), lr=LR, temperature=TEMPERATURE, seed=1)
    return [
        adam(sharded(shape))[0],
        Contestant(SHARDED, LangevinAdam(sharded(shape), lr=LR, seed=1).step),
        Contestant(SHARDED_HOT, hot.step),
    ]


CASES = (
    Case(
        "distributed/step",
        lambda shape: f"FSDP2, {WORLD} processes of {short(product(shape))} float32",
        ((1, 12_800_000), (1, 1_280_000), (1, 4096)),
        partial(processes.group, WORLD, _step, (SHARDED, PLAIN, AT_ONCE)),
        (Row(SHARDED, PLAIN, 1.05), Row(SHARDED, AT_ONCE)),
        product,
        seconds=7.0,
    ),
    Case(
        "distributed/many",
        lambda shape: f"FSDP2, {WORLD} processes, {shape[0]:,} parameters of {WORLD * shape[1]:,}",
        ((400, 5_000), (50, 5_000), (3, 16)),
        partial(processes.group, WORLD, _many, (SHARDED, SHARDED_HOT, ADAM)),
        (Row(SHARDED, ADAM, 0.5, "T = 0"), Row(SHARDED_HOT, ADAM, None, "T > 0")),
        product,
        cached=True,
        seconds=7.0,
    ),
)
