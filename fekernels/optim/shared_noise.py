"""Which optimizers make noise, from which streams, and whether two of them make the same."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fekernels._runtime.ranks import has_ranks
from fekernels._runtime.torch_internals import is_flat_shard

__all__ = [
    "COUNTS_ANEW",
    "check_parts",
    "decided_alone",
    "have_decided",
    "is_hot",
    "leave_undecided",
    "may_make_noise",
    "warn_of_shared_noise",
]

COUNTS_ANEW = (
    "optimizer_class must be fe.distributed.streams_of({0}, params) for ZeroRedundancyOptimizer where a step makes "
    "noise; got {0} itself, which counts the streams of each rank's part from 0, so that parameters of different ranks "
    "would get the same noise"
)

_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def leave_undecided(saved: list[dict[str, Any]], drawn: int | None) -> None:
    """Make None of seeds in a checkpoint's groups that ranks have not agreed on: each has drawn another, ``drawn``.

    As numbers they would be taken as given, of every rank its own where each rank loads a file of its own.
    """
    if drawn is None or not has_ranks():
        return
    for group in saved:
        if group["seed"] == drawn:
            group["seed"] = None


def decided_alone(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without the seeds that were not decided when it was saved: whoever loads it keeps its own."""
    groups = [
        {key: value for key, value in group.items() if key != "seed" or value is not None}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def have_decided(drawn: int | None, groups: list[dict[str, Any]], loaded: dict[str, Any]) -> bool:
    """Whether no group is left with the seed that this rank has drawn, as all ranks have loaded other ones.

    A rank whose own draw a loaded one happens to be must not ask the others for theirs.
    """
    given = ["seed" in group for group in loaded["param_groups"]]
    left = [group["seed"] for group, seed in zip(groups, given, strict=False) if not seed]
    return any(given) and drawn is not None and drawn not in left


def is_hot(group: dict[str, Any], unknown: bool = False) -> bool:
    """Whether a group's temperature is above 0; ``unknown`` for one on a GPU, reading which would stop the host."""
    temperature = group["temperature"]
    if isinstance(temperature, Tensor):
        return unknown if temperature.device.type != "cpu" else float(temperature) > 0
    return bool(temperature > 0)


def may_make_noise(group: dict[str, Any]) -> bool:
    """Whether a step of this group draws; a temperature on a GPU, which nobody may read, is taken for one that does."""
    return is_hot(group, unknown=True) or bool(group.get("stochastic_rounding", False))


def check_parts(name: str, group: dict[str, Any], unfit_for_zero: str | None) -> None:
    """ValueError where a rank has a part of the parameters that does not tell which, and a step makes noise."""
    if not (has_ranks() and may_make_noise(group)):
        return
    if unfit_for_zero is not None:
        raise ValueError(f"{name}: {unfit_for_zero.format(f'fe.{name}')}")
    if any(map(is_flat_shard, group["params"])):
        raise ValueError(
            f"{name}: params must be plain tensors or DTensors where a step makes noise; got shards of "
            "FullyShardedDataParallel, which do not give the indices of their elements, so that those of different "
            "ranks would get the same noise (wrap by torch.distributed.fsdp.fully_shard, or, for NO_SHARD, by "
            "DistributedDataParallel)"
        )


def warn_of_shared_noise(optimizer: Optimizer, name: str) -> None:
    """Warn where another optimizer makes its noise from the same seed and stream: it is the same numbers.

    That is how one optimizer per parameter ends, each with the same seed. Optimizers of the same shapes are taken for
    two runs that somebody compares.
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
        seed, stream, _ = min(used & theirs)
        warnings.warn(
            f"{name}: another optimizer has seed {seed} and stream {stream} too, so parameters of both get the same "
            "noise. Give each optimizer a seed of its own, or all parameters to one, or pass them with their names.",
            stacklevel=4,
        )
        break
    _optimizers.add(optimizer)


def _streams(optimizer: Optimizer) -> set[tuple[int, int, int]]:
    """Seeds, streams and purposes: noise for another purpose is other noise."""
    purpose: int = optimizer._purpose  # type: ignore[attr-defined]  # every one here is a ParameterGroups
    return {
        (group["seed"], stream, purpose)
        for group in optimizer.param_groups
        if may_make_noise(group)
        for stream in group["streams"]
    }
