"""All particles of a sampler: those of one process, and what several have to do in place of it.

`fe.SVGD` asks a population for what needs all particles, and does the rest with those it holds itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels._runtime.agreement import Agreement
from fekernels._runtime.ranks import group_of
from fekernels.ops.stein.svgd_direction import svgd_direction
from fekernels.stein.checks import first_non_finite
from fekernels.stein.median import median_bandwidth
from fekernels.stein.particle_groups import group_bandwidth, group_direction
from fekernels.stein.svgd_run import measure
from fekernels.stein.target import Target

__all__ = ["EXCHANGES", "Population", "population"]

EXCHANGES = ("auto", "all_gather", "ring")


def population(
    function: str, process_group: Any, exchange: str, agreement: Agreement, x: Tensor
) -> Population:
    """Of a sampler whose ranks have agreed, each of its own particles x."""
    group = group_of(function, process_group)
    if group is None:
        return Population(function, len(x))
    from fekernels.distributed.population import ShardedPopulation

    return ShardedPopulation(function, group, exchange, agreement.counts, x)


class Population:
    """One process, which holds all particles.

    Attributes:
        n: how many there are.
        begin: the number of this process's first one.
        first: whether this process is rank 0.
        group: None.
    """

    begin = 0
    first = True
    group: Any = None

    def __init__(self, function: str, n: int) -> None:
        self.function, self.n = function, n

    def together(self, names: Sequence[str] = (), digests: Sequence[str] = ()) -> Agreement:
        """A block in which one rank may fail, after which all go on or none."""
        return Agreement(self.function, self.group, names, digests)

    def evaluate(
        self, target: Target, x: Tensor, batch: tuple[Any, ...], step: int
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and log_prob of own particles, which are finite."""
        scores, log_prob = target.evaluate(x, batch)
        self.check_finite("scores", scores, step)
        if log_prob is not None:
            # Beyond the support a gradient may well be finite: of a Gamma's x log at x < 0, say.
            self.check_finite("log_prob", log_prob.unsqueeze(1), step)
        return scores, log_prob

    def check_finite(self, what: str, rows: Tensor, step: int) -> None:
        bad = first_non_finite(rows)
        if bad is not None:
            raise ValueError(
                f"{self.function}: {what} must be finite; got {bad[1]} for particle {self.begin + bad[0]} at step "
                f"{step} (particles, optimizer and step count are as before this step)"
            )

    def forget(self) -> None:
        """A step is over: particles will have moved."""

    def move(self, optimizer: Optimizer, x: Tensor) -> None:
        """A step of the optimizer, of own particles alone."""
        optimizer.step()

    def median(self, x: Tensor, hint: Tensor | None) -> Tensor:
        return median_bandwidth(x, hint=hint)

    def direction(self, x: Tensor, scores: Tensor, kernel: object, **settings: Any) -> Tensor:
        return svgd_direction(x, scores, kernel=kernel, **settings)

    def group_bandwidth(self, x: Tensor, groups: list[Tensor]) -> Tensor:
        return group_bandwidth(x, groups)

    def group_direction(
        self, x: Tensor, scores: Tensor, groups: list[Tensor], kernel: object, **settings: Any
    ) -> Tensor:
        return group_direction(x, scores, groups, kernel, **settings)

    def measure(
        self, kernel: object, x: Tensor, scores: Tensor, h: Tensor, log_prob: Tensor | None
    ) -> Tensor:
        return measure(kernel, x, scores, h, log_prob)

    def gather(self, rows: Tensor) -> Tensor:
        """Those of all processes, of what has a row for each own particle; a copy."""
        return rows.clone()

    def mean(self, rows: Tensor) -> Tensor:
        """Over the particles of all processes, of what has a row for each own one."""
        return rows.mean(0)

    def part(self, rows: Tensor) -> Tensor:
        """Own rows of what has one for each particle."""
        return rows

    def check_loaded(self, function: str, optimizer: Optimizer, state: Any, shape: Sequence[int]) -> None:
        """ValueError for a state of all particles that cannot be taken apart."""

    def whole_state(self, state: Any, like: Tensor) -> Any:
        """An optimizer's `state_dict` with the states of all particles, where those are of the shape of own ones."""
        return self._each_state(state, like.shape, self.gather)

    def own_state(self, state: Any, like: Tensor) -> Any:
        """The inverse."""
        return self._each_state(state, torch.Size((self.n, *like.shape[1:])), self.part)

    def _each_state(self, state: Any, shape: torch.Size, change: Any) -> Any:
        states = {
            index: {
                key: change(value) if isinstance(value, Tensor) and value.shape == shape else value
                for key, value in each.items()
            }
            for index, each in state["state"].items()
        }
        return {**state, "state": states}
