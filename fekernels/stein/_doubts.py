"""What `fe.SVGD` says of particles that cannot come to the target: they coincide, or run away from it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Flight", "warn_of_coincidence", "warn_of_equality"]

FIRST = 64  # steps before the first look of three; at the last, Adam at .1 has gone 25 in each coordinate
FURTHER = 1.25  # by which the distance from the start grows from look to look, while the steps double
FORCE = 0.99  # of the look before: a force that falls on the way leads to a mode; uphill on a convex loss none does


class Look(NamedTuple):
    """At one step: mean of score . (particle - mean), distance from the start, size of the scores, mean log_prob."""

    virial: float
    distance: float
    force: float
    log_prob: float


class Flight:
    """Whether the particles run away for good, as under a log-density with the wrong sign.

    At the target Stein's identity says E[s . (x - E x)] = -T d. Of a log-concave density this mean is never above 0,
    wherever the particles are: it is half the mean over pairs of (s_i - s_j) . (x_i - x_j). Of minus such a density it
    is never below. Densities that are not log-concave have regions where it is above 0. Heavy tails are one, where it
    is small, so it has to be above +T d; between two modes is another, where the force falls on the way. So three looks
    in a row, the steps doubled from one to the next, have to find it there while particles go ever further, by a force
    that does not fall. That a mean loss was given for a sum nothing can tell: exp of it is a density too.
    """

    def __init__(self) -> None:
        self._start: Tensor | None = None
        self._looks: dict[int, Look] = {}
        self._told = False

    def due(self, iteration: int) -> bool:
        return not self._told and (
            iteration == 0 or (iteration >= FIRST and iteration & (iteration - 1) == 0)
        )

    def forget(self) -> None:
        """Particles have been put somewhere else."""
        self._start, self._looks = None, {}

    def look(
        self,
        function: str,
        iteration: int,
        x: Tensor,
        scores: Tensor,
        log_prob: Tensor | None,
        temperature: float,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        """Of own particles before step iteration + 1, with ``mean`` over the rows of all; warns once."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        x, scores = x.to(wide), scores.to(wide)
        centre = mean(x)
        if self._start is None:
            self._start = centre
        virial, distance, force, density = mean(
            torch.stack([
                ((x - centre) * scores).sum(1),
                (x - self._start).square().sum(1),
                scores.square().sum(1),
                scores.new_zeros(len(x)) if log_prob is None else log_prob.to(wide),
            ], 1)
        ).tolist()  # fmt: skip
        self._looks[iteration] = last = Look(virial, math.sqrt(distance), math.sqrt(force), density)
        first, second = self._looks.get(iteration // 4), self._looks.get(iteration // 2)
        least = temperature * x.shape[1]
        if first is None or second is None or not _flees((first, second, last), least):
            return
        self._told = True
        rose, given = "", "scores the gradient of a loss? It must be that of the log-density"
        if log_prob is not None:
            rose = f", and the mean log_prob went from {first.log_prob:.4g} to {last.log_prob:.4g}"
            given = "log_prob a loss? It must be the log-density"
        warnings.warn(
            f"{function}: particles run away: from step {iteration // 4} to {iteration} their distance from the start "
            f"grew from {first.distance:.3g} to {last.distance:.3g}{rose}. The mean of score . (particle - mean) is "
            f"{last.virial:+.3g}; at a target it is {-least:.3g}, minus the temperature times the dimensions. Is "
            f"{given}: minus the loss, summed over all data, plus the log of the prior. If the sign is right, "
            "the particles are still between modes that are far apart: begin nearer to them, or with a larger lr",
            stacklevel=6,
        )


def _flees(looks: tuple[Look, Look, Look], least: float) -> bool:
    return all(look.virial > least for look in looks) and all(
        now.distance > FURTHER * before.distance and now.force > FORCE * before.force
        for before, now in zip(looks, looks[1:], strict=False)
    )


def warn_of_coincidence(function: str, step: int) -> None:
    warnings.warn(
        f"{function}: the median bandwidth is 0 at step {step}: so many particles coincide, and "
        "those do not repel each other; begin from distinct particles, or give a bandwidth",
        stacklevel=6,
    )


def warn_of_equality(function: str) -> None:
    warnings.warn(
        f"{function}: particles are all equal: they do not repel each other and get the same scores, so that "
        "they stay together; begin from distinct particles",
        stacklevel=3,
    )
