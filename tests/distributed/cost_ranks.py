"""What each process of distributed/test_cost.py does, steps and Stein directions, and the bytes that it asks for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fekernels as fe
from tests.support.collectives import Collectives

LAYERS, WIDTH = 3, 16


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def mesh_of(sharding: str, world: int, node: int) -> Any:
    """Of the first ``world`` ranks, in nodes of so many. All ranks make it: a group is made by all."""
    from torch.distributed.device_mesh import DeviceMesh

    ranks = torch.arange(world)
    if sharding == "hsdp":
        return DeviceMesh("cpu", ranks.view(-1, node), mesh_dim_names=("replicate", "shard"))
    return DeviceMesh("cpu", ranks)


def wrapped(sharding: str, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = network()
    if sharding == "ddp":
        return nn.parallel.DistributedDataParallel(net, process_group=mesh.get_group())
    for layer in net:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(net, mesh=mesh)


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Of forward and backward pass, and of the optimizer's step."""
    with Collectives() as training:
        net(torch.ones(4, WIDTH)).square().mean().backward()
    with Collectives() as own:
        optimizer.step()
    optimizer.zero_grad()
    return training.seen, own.seen


def direction(exchange: str, world: int, n: int, d: int, mesh: Any) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(0)
    rows = slice(dist.get_rank() * n // world, (dist.get_rank() + 1) * n // world)
    x = torch.randn(n, d, generator=generator)[rows]
    with Collectives() as seen:
        fe.distributed.svgd_direction(x, -x, bandwidth=1.0, exchange=exchange, process_group=mesh)
    return seen.seen


def run(
    cases: list[tuple[str, int, int]], particles: list[tuple[str, int, int, int]]
) -> dict[tuple[Any, ...], Any]:
    results: dict[tuple[Any, ...], Any] = {}
    for exchange, world, n, d in particles:
        mesh = mesh_of("", world, 1)
        if dist.get_rank() < world:
            results[exchange, world, n, d] = direction(exchange, world, n, d, mesh)
    for sharding, world, node in cases:
        mesh = mesh_of(sharding, world, node)
        if dist.get_rank() < world:
            net = wrapped(sharding, mesh)
            optimizer = fe.LangevinAdam(net.parameters(), temperature=1e-3, prior_precision=1.0, seed=0)
            step(net, optimizer)  # the first, which makes buckets and states
            results[sharding, world, node] = step(net, optimizer)
    return results
