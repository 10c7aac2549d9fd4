"""Which optimizers make noise, from which streams, and whether two of them make the same."""

from __future__ import annotations

import hashlib
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
    "is_hot",
    "keep_names",
    "may_make_noise",
    "stream_of_name",
    "warn_of_shared_noise",
]

COUNTS_ANEW = (
    "optimizer_class must be fe.distributed.streams_of({0}, params) for ZeroRedundancyOptimizer where a step makes "
    "noise; got {0} itself, which counts the streams of each rank's part from 0, so that parameters of different ranks "
    "would get the same noise"
)

_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def stream_of_name(name: str) -> int:
    """A parameter's Philox stream by its name: 31 bits (the top bit belongs to the rounding noise)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


def keep_names(group: dict[str, Any], before: dict[str, Any]) -> None:
    """Streams of names stay with them where a loaded group has the same names in another order.

    ``torch.distributed.checkpoint`` matches states by name, and lists in a group not at all. Other names are a rename,
    where position tells whose noise it was.
    """
    names = before.get("param_names")
    if names is None:
        return
    streams = [stream_of_name(name) for name in names]
    if sorted(streams) == sorted(group["streams"]):
        group["streams"], group["param_names"] = streams, names


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
            "FullyShardedDataParallel, which do not tell their elements' places, so that those of different ranks "
            "would get the same noise (wrap by torch.distributed.fsdp.fully_shard, or, for NO_SHARD, by "
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
