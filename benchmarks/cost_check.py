"""The model of `fekernels.distributed.cost` beside processes of this machine: ``python -m benchmarks.cost_check``.

A step of a network of eight equal layers under DDP and FSDP2, in 1, 2 and 4 single-threaded processes of gloo, and what
the model says of it for a machine with the speed of arithmetic, of memory and of an all-reduce that the same number of
processes reach here, at the same time. All take their turns in every round; a row has their medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

import fekernels as fe
from fekernels.bench import processes
from fekernels.bench.case import Shape
from fekernels.bench.timing import Contestant
from fekernels.distributed import cost

LAYERS, WIDTH, ROWS = 8, 1024, 512  # ROWS of each process
PARAMETERS = LAYERS * WIDTH**2
NAMES = ("arithmetic", "memory", "sending", "message", "ddp", "fsdp")


def network() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def step(net: nn.Module, x: torch.Tensor) -> Contestant:
    optimizer = fe.LangevinAdam(net.parameters(), temperature=1e-4, prior_precision=1e-3, seed=0)

    def run() -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant("", run)


def build(shape: Shape) -> Sequence[Contestant]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world, x, weights = dist.get_world_size(), torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    big, copy = torch.ones(PARAMETERS), torch.ones(PARAMETERS)
    small = torch.ones(8)
    replicated = nn.parallel.DistributedDataParallel(network()) if world > 1 else network()
    sharded = network()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in sharded:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(sharded, mesh=mesh)
    runs = {
        "arithmetic": lambda: x @ weights,
        "memory": lambda: copy.copy_(big),
        "sending": lambda: dist.all_reduce(big),
        "message": lambda: dist.all_reduce(small),
        "ddp": step(replicated, x).run,
        "fsdp": step(sharded, x).run,
    }
    return [Contestant(name, run) for name, run in runs.items()]


def machine(world: int, seconds: dict[str, float]) -> cost.Hardware:
    """What so many processes reach at the same time."""
    sent = 2 * (world - 1) / world * 4 * PARAMETERS
    link = sent / seconds["sending"] if world > 1 else 1.0
    return cost.Hardware(
        memory_bandwidth=8 * PARAMETERS / seconds["memory"],
        matrix_flops=2 * ROWS * WIDTH**2 / seconds["arithmetic"],
        attained=1.0,
        node_bandwidth=link,
        latency=seconds["message"] / (2 * (world - 1)) if world > 1 else 0.0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| processes | | arithmetic, ms | sending, ms | optimizer, ms | their sum | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for world in (1, 2, 4):
        made = processes.group(world, partial(build), NAMES, ())
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(options.rounds):
            for contestant in made.contestants:
                assert contestant.turn is not None
                times[contestant.name].append(contestant.turn(1, True))
        seconds = {name: statistics.median(values) for name, values in times.items()}
        hardware = machine(world, seconds)
        for sharding in ("ddp", "fsdp"):
            plan = cost.training(
                PARAMETERS, world, sharding=sharding, layers=LAYERS, tokens=ROWS, gathered_bytes=4, hardware=hardware
            )  # fmt: skip
            parts = [1e3 * value for value in (plan.compute, plan.communication, plan.optimizer)]
            measured = 1e3 * seconds[sharding]
            row = " | ".join(f"{value:.0f}" for value in (*parts, sum(parts), measured))
            print(f"| {world} | {sharding} | {row} | {measured / sum(parts):.2f} |")
        if world > 1:
            print(
                f"  ({world}: {hardware.matrix_flops / 1e9:.0f} Gflop/s and {hardware.memory_bandwidth / 1e9:.1f} "
                f"GB/s a process, {hardware.node_bandwidth / 1e9:.2f} GB/s sent by each)",
                file=sys.stderr,
            )
        processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
