"""Inverse temperatures from 0 (the base) to 1 (the target)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._checks import integer, number
from fekernels.optim.temperature import TemperatureScheduler

__all__ = ["betas_from_temperature", "make_betas", "sigmoid_betas"]

MOST = 1 << 24


def sigmoid_betas(steps: int, sharpness: float = 4.0) -> Tensor:
    """[steps + 1], float64 from 0 to 1, denser at both ends, where densities change most: a logistic curve, rescaled.

    Args:
        steps: at least 1.
        sharpness: half the width of the curve's argument, above 0; towards 0 the betas are equally spaced.

    Source: Grosse, Ghahramani & Adams 2015, arXiv:1511.02543, appendix; their sharpness is 4.
    """
    steps = integer("sigmoid_betas", "steps", steps, 1, MOST)
    sharpness = number("sigmoid_betas", "sharpness", sharpness, above=0.0)
    x = torch.linspace(-sharpness, sharpness, steps + 1, dtype=torch.float64).sigmoid()
    x = (x - x[0]) / (x[-1] - x[0])
    x[-1] = 1.0
    return x


def betas_from_temperature(schedule: TemperatureScheduler | Callable[[int], float], steps: int) -> Tensor:
    """[steps + 1] betas of a cooling: 0, and then T_last / T_k for the temperatures of the steps.

    So the schedule that cools an optimizer cools these particles: at T_k they follow base^(1 - b) target^b with
    b = T_last / T_k, 1 where the cooling ends.

    Args:
        schedule: one of `fe.optim.temperature`, read without moving it (its first group), or a function of the step.
        steps: how many temperatures are taken, from step 0 on, >= 1.

    Raises:
        ValueError: a temperature that is not > 0 or is higher than the one before.
    """
    function = "betas_from_temperature"
    steps = integer(function, "steps", steps, 1, MOST)
    if isinstance(schedule, TemperatureScheduler):
        found: list[Any] = [schedule.get_temperature(k)[0] for k in range(steps)]
    elif callable(schedule):
        found = [schedule(k) for k in range(steps)]
    else:
        raise TypeError(
            f"{function}: schedule must be a TemperatureScheduler or a callable step -> temperature; "
            f"got {type(schedule).__name__}"
        )
    temperatures = [
        number(function, f"temperature of step {k}", float(t), above=0.0) for k, t in enumerate(found)
    ]
    for k in range(1, steps):
        if temperatures[k] > temperatures[k - 1]:
            raise ValueError(
                f"{function}: temperature of step {k} must be at most that of the step before, "
                f"{temperatures[k - 1]:g}; got {temperatures[k]:g}"
            )
    betas = [0.0, *(temperatures[-1] / t for t in temperatures)]
    return torch.tensor(betas, dtype=torch.float64)


def make_betas(function: str, betas: int | Sequence[float] | Tensor) -> Tensor:
    """What `betas` means: so many steps of the sigmoid, or the numbers themselves, checked."""
    if not isinstance(betas, (Tensor, Sequence)):
        return sigmoid_betas(integer(function, "betas", betas, 1, MOST))
    found = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach()
    if found.dim() != 1 or len(found) < 2:
        raise ValueError(
            f"{function}: betas must be a number of steps or shape (K + 1,); got {tuple(found.shape)}"
        )
    steps = found.diff()
    if (
        found[0] != 0
        or found[-1] != 1
        or not bool((steps >= 0).all())
        or not math.isfinite(float(steps.sum()))
    ):
        raise ValueError(
            f"{function}: betas must rise from 0 to 1; got {float(found[0]):g} to {float(found[-1]):g}"
            + ("" if bool((steps >= 0).all()) else ", falling in between")
        )
    return found
