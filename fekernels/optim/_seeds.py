"""The key of an optimizer's noise: one for all processes, and none for two optimizers."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["draw_seed", "has_ranks", "may_make_noise", "seed_of_rank_0", "warn_of_shared_noise"]

_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def draw_seed() -> int:
    """63 bits from torch's default generator."""
    return int(torch.randint(0, (1 << 63) - 1, (), device="cpu"))


def may_make_noise(group: dict[str, Any]) -> bool:
    """Whether a step of this group draws; a temperature on a GPU, which nobody may read, is taken for one that does."""
    temperature = group["temperature"]
    if isinstance(temperature, Tensor):
        hot = temperature.device.type != "cpu" or float(temperature) > 0
    else:
        hot = temperature > 0
    return hot or bool(group.get("stochastic_rounding", False))


def has_ranks() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def seed_of_rank_0(seed: int) -> int:
    """Rank 0's ``seed``, on every rank of the default process group.

    A collective: every rank calls it. Ranks are often seeded apart, so that they see different data, and replicas whose
    noise differs drift apart without a word.
    """
    kinds = [entry.split(":")[0] for entry in dist.get_backend_config().split(",")]
    box = torch.tensor([seed], dtype=torch.int64, device="cpu" if "cpu" in kinds else kinds[0])
    dist.broadcast(box, src=0)
    return int(box.item())


def warn_of_shared_noise(optimizer: Optimizer, name: str) -> None:
    """Warn where another optimizer makes its noise from the same seed and stream: it is the same numbers.

    That is how one optimizer a parameter ends, each with the same seed. Optimizers of the same shapes are taken for two
    runs that somebody compares.
    """
    used = _streams(optimizer)
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for other in list(_optimizers):
        theirs = _streams(other)
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        params = [p for group in other.param_groups for p in group["params"]]
        if other is optimizer or not used & theirs or [p.shape for p in params] == shapes:
            continue
        if mine & {id(p) for p in params}:  # the optimizer that this one takes over from
            continue
        seed, stream = min(used & theirs)
        warnings.warn(
            f"{name}: another optimizer has seed {seed} and stream {stream} too, so parameters of both get the same "
            "noise. Give each optimizer a seed of its own, or all parameters to one, or pass them with their names.",
            stacklevel=4,
        )
        break
    _optimizers.add(optimizer)


def _streams(optimizer: Optimizer) -> set[tuple[int, int]]:
    return {
        (group["seed"], stream)
        for group in optimizer.param_groups
        if may_make_noise(group)
        for stream in group["streams"]
    }
