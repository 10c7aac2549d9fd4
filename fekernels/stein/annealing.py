"""Annealing of the attraction: what `fe.SVGD` multiplies the scores by, gamma(step), 0 being the first step.

A small gamma lets the repulsion spread the particles before the density pulls them in, which finds modes that
plain SVGD does not reach. After the schedule gamma is 1, so the particles end where the target is the target.

Source: D'Angelo & Fortuin 2021, "Annealed Stein Variational Gradient Descent", arXiv:2101.09815.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fekernels._checks import integer
from fekernels.stein.checks import positive

__all__ = ["CyclicalAnnealing", "TanhAnnealing", "annealing"]


@dataclass(frozen=True)
class CyclicalAnnealing:
    """gamma = ((step mod L) / L)^power with L = steps / cycles, and 1 from `steps` on.

    Every cycle begins with pure repulsion (gamma = 0), so particles move between modes again and again.

    Args:
        steps: how many steps are annealed, >= 1; leave some of the run after them, at gamma = 1.
        cycles: at least 1.
        power: above 0; larger stays longer near 0.
    """

    steps: int
    cycles: int = 5
    power: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", integer("CyclicalAnnealing", "steps", self.steps, 1, 1 << 62))
        object.__setattr__(self, "cycles", integer("CyclicalAnnealing", "cycles", self.cycles, 1, 1 << 62))
        object.__setattr__(self, "power", positive("CyclicalAnnealing", "power", self.power))

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return 1.0
        # Whole numbers, so that a cycle begins at the same step whatever the rounding of steps / cycles.
        return float((step * self.cycles % self.steps / self.steps) ** self.power)


@dataclass(frozen=True)
class TanhAnnealing:
    """gamma = tanh((1.3 step / steps)^power), and 1 from `steps` on: one phase of exploration.

    Args:
        steps: how many steps are annealed, >= 1.
        power: above 0. The default leaves gamma below .1 for the first half of them and ends at .999; at power 1 it
            would jump from .86 to 1.
    """

    steps: int
    power: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", integer("TanhAnnealing", "steps", self.steps, 1, 1 << 62))
        object.__setattr__(self, "power", positive("TanhAnnealing", "power", self.power))

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return 1.0
        return math.tanh((1.3 * step / self.steps) ** self.power)


NAMED = {"cyclical": CyclicalAnnealing, "tanh": TanhAnnealing}


def annealing(function: str, anneal: object, steps: object) -> Callable[[int], float] | None:
    """The schedule that `anneal` (None, a name, a callable) and `anneal_steps` mean."""
    if isinstance(anneal, str):
        if anneal not in NAMED:
            raise ValueError(
                f"{function}: anneal must be None, a callable step -> gamma or one of {sorted(NAMED)}; got {anneal!r}"
            )
        if steps is None:
            raise ValueError(
                f"{function}: anneal_steps must be given with anneal={anneal!r}: the steps it takes; got None"
            )
        return NAMED[anneal](integer(function, "anneal_steps", steps, 1, 1 << 62))
    if steps is not None:
        raise ValueError(
            f"{function}: anneal_steps belongs to a named schedule, {sorted(NAMED)}; got anneal={anneal!r}"
        )
    if anneal is not None and not callable(anneal):
        raise TypeError(
            f"{function}: anneal must be None, a name or a callable step -> gamma; got {type(anneal).__name__}"
        )
    return anneal
