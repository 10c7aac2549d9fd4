"""Which optimizers make noise, and whether two of them make the same."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["is_hot", "may_make_noise", "warn_of_shared_noise"]

_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def is_hot(group: dict[str, Any], unknown: bool = False) -> bool:
    """Whether a group's temperature is above 0; ``unknown`` for one on a GPU, reading which would stop the host."""
    temperature = group["temperature"]
    if isinstance(temperature, Tensor):
        return unknown if temperature.device.type != "cpu" else float(temperature) > 0
    return bool(temperature > 0)


def may_make_noise(group: dict[str, Any]) -> bool:
    """Whether a step of this group draws; a temperature on a GPU, which nobody may read, is taken for one that does."""
    return is_hot(group, unknown=True) or bool(group.get("stochastic_rounding", False))


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
