"""The optimizers on sharded parameters: steps under FSDP2, beside the same step on plain ones, and checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fekernels._runtime.parts import local_tensor
from fekernels.bench import processes
from fekernels.bench.case import Case, Cost, Row, Shape, product, short
from fekernels.bench.optimizers import ADAM_COST, HOT_COST, share_moments, values
from fekernels.bench.peers import ADAM, LR, TEMPERATURE, adam
from fekernels.bench.timing import Contestant
from fekernels.optim import LangevinAdam

__all__ = ["CASES"]

WORLD = 2
SHARDED, SHARDED_HOT = "LangevinAdam on shards, T = 0", "LangevinAdam on shards, T > 0"
SAVED, SAVED_HOT = "LangevinAdam, T = 0", "LangevinAdam, T > 0"
SAVED_ADAM = "torch.optim.Adam"
MEMORY = "/dev/shm"
PLAIN, AT_ONCE = "plain parameters, one process", "plain parameters, a process each"


def sharded(shape: Shape) -> torch.nn.ParameterList:
    """[tensors, elements of each on each rank] as FSDP2 shards them, with their gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    count, numel = shape
    module = torch.nn.ParameterList(values(count, WORLD * numel, 0))
    fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    for param, local in zip(module, values(count, numel, 1), strict=True):
        param.grad = DTensor.from_local(local, param.device_mesh, param.placements)
    return module


def _step(shape: Shape) -> Sequence[Contestant]:
    """In each process, as many elements each: what the unsharded step does in one, alone or beside the other's."""
    shards = sharded(shape)
    plain = torch.nn.ParameterList(local_tensor(shard.detach()) for shard in shards)
    for param, shard in zip(plain, shards, strict=True):
        param.grad = local_tensor(shard.grad)
    optimizer, distributed = (LangevinAdam(params, lr=LR, seed=1) for params in (plain, shards))
    share_moments([distributed, optimizer])
    contestants = [Contestant(AT_ONCE, optimizer.step), Contestant(SHARDED, distributed.step)]
    if torch.distributed.get_rank() == 0:
        contestants.append(Contestant(PLAIN, optimizer.step))
    return contestants


def _many(shape: Shape) -> Sequence[Contestant]:
    """Each contestant steps shards of its own."""
    hot = LangevinAdam(sharded(shape), lr=LR, temperature=TEMPERATURE, seed=1)
    return [
        Contestant(ADAM, adam(list(sharded(shape))).step),
        Contestant(SHARDED, LangevinAdam(sharded(shape), lr=LR, seed=1).step),
        Contestant(SHARDED_HOT, hot.step),
    ]


def _round_trip(module: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """What a training script does to save, and to go on from what it saved."""
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def states() -> dict[str, Any]:
        weights, of_optimizer = get_state_dict(module, optimizer)
        return {"model": weights, "optimizer": of_optimizer}

    state_dict_saver.save(states(), checkpoint_id=folder)
    loaded = states()
    state_dict_loader.load(loaded, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])


def _checkpoint(shape: Shape) -> Sequence[Contestant]:
    """Each into a folder that its turn leaves empty: of files in memory, where there are some.

    A disk writes what one turn has left to it while the next ones are timed. All save one memory.
    """
    where = MEMORY if os.path.isdir(MEMORY) else None
    box = [tempfile.mkdtemp(dir=where) if torch.distributed.get_rank() == 0 else ""]
    torch.distributed.broadcast_object_list(box)

    def remove() -> None:
        torch.distributed.barrier()  # the other may still be reading
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(box[0])

    module = sharded(shape)
    params = list(module.parameters())
    optimizers = {
        SAVED_ADAM: adam(params),
        SAVED: LangevinAdam(params, lr=LR, seed=1),
        SAVED_HOT: LangevinAdam(params, lr=LR, seed=2, temperature=TEMPERATURE),
    }
    share_moments(list(optimizers.values()))
    return [
        Contestant(name, partial(_round_trip, module, optimizer, box[0]), restore=remove)
        for name, optimizer in optimizers.items()
    ]


def _elements(shape: Shape) -> int:
    """Of all processes."""
    return WORLD * product(shape)


def _costs(shape: Shape) -> dict[str, Cost]:
    """Of all processes too: they share the memory, which a process alone has for itself."""
    return {SHARDED: ADAM_COST * _elements(shape), SHARDED_HOT: HOT_COST * _elements(shape)}


CASES = (
    Case(
        "distributed/step",
        lambda shape: f"FSDP2, {WORLD} processes of {short(product(shape))} float32",
        ((1, 12_800_000), (1, 1_280_000), (1, 4096)),
        partial(processes.group, WORLD, _step, (SHARDED, PLAIN, AT_ONCE)),
        (Row(SHARDED, PLAIN, 1.05), Row(SHARDED, AT_ONCE, 1.05)),
        _elements,
        _costs,
        seconds=7.0,
    ),
    Case(
        "distributed/many",
        lambda shape: f"FSDP2, {WORLD} ranks, {shape[0]:,} parameters of {WORLD * shape[1]:,}",
        ((400, 5_000), (50, 5_000), (3, 16)),
        partial(processes.group, WORLD, _many, (SHARDED, SHARDED_HOT, ADAM)),
        (Row(SHARDED, ADAM, 0.5, "T = 0"), Row(SHARDED_HOT, ADAM, None, "T > 0")),
        _elements,
        _costs,
        cached=True,
        seconds=7.0,
    ),
    Case(
        "distributed/checkpoint",
        lambda shape: f"DCP save + load, {short(_elements(shape))} and states",
        ((50, 250_000), (50, 10_000), (2, 64)),
        partial(processes.group, WORLD, _checkpoint, (SAVED, SAVED_HOT, SAVED_ADAM)),
        (Row(SAVED, SAVED_ADAM, 1.1, "T = 0"), Row(SAVED_HOT, SAVED_ADAM, 1.1, "T > 0")),
        _elements,
        rounds=15,
        seconds=0.0,
    ),
)
