"""Cycles of exploration and sampling: a temperature schedule that drives lr too."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
from torch.optim import Optimizer

from fekernels._checks import boolean, integer, number
from fekernels.optim._temperature_base import TemperatureScheduler, Value, assign

# Of the least that a schedule should collect, and of what posterior: its standard deviation in learning rates.
ENOUGH, LR_OVER_SIGMA = 0.9, 0.1
FLOOR = 0.1  # of lr where no lr_min is given


class CyclicalTemperature(TemperatureScheduler):
    """Cyclical sampling (Zhang et al. 2020, "Cyclical stochastic gradient MCMC", arXiv:1902.03932).

    With r = (k mod cycle_length) / cycle_length: T = 0 while r < proportion_exploration, the initial
    temperature afterwards; and, with anneal_lr, lr = lr_min + (lr_0 - lr_min) (1 + cos(pi r)) / 2 in the same
    cycle. The large steps at T = 0 look for a new mode, the small ones that follow sample it.

    A cycle's noise starts from an optimum, where there is none of the posterior's variance, and a weight takes up
    1 - exp(-2 sum_k lr_k / sigma) of it in the steps k since (sigma: its posterior standard deviation). So the
    first part of the sampling phase is a burn-in: hot, but `.sampling` says not to collect yet. At lr = sigma / 10 and
    800 steps per cycle the defaults collect all of the variance; proportion_exploration=0.8, lr_min=0 and no burn-in,
    as in the paper, half of it. The constructor warns below .9.

        schedule = CyclicalTemperature(optimizer, cycle_length=1000)
        for x, y in batches:
            ...; optimizer.step()
            if schedule.sampling:
                samples.update()
            schedule.step()

    Args:
        optimizer, last_epoch, burn_in: as for `TemperatureScheduler`; during burn_in lr keeps its initial
            value.
        cycle_length: steps of one cycle, >= 1: a run of K steps in M cycles has ceil(K / M).
        proportion_exploration: the paper's beta, in [0, 1). Half a cycle by default: its last fifth, the paper's usual
            choice, has nothing but the small steps of the cosine's end.
        anneal_lr: also drive `lr`, by the paper's cosine. Switch it off where an lr scheduler of torch owns
            `lr`.
        lr_min: where the cosine ends, >= 0; None is a tenth of each group's initial lr. At 0, the paper's, the last
            steps of a cycle stand still.
        proportion_burn_in: the share of the sampling phase, in [0, 1), that is hot and not collected.

    Warns:
        UserWarning: the phase is too short: what it collects would show less than .9 of the variance even of a weight
            whose posterior standard deviation is only 10 lr. See `collected_variance`.
    """

    _checks = {
        **TemperatureScheduler._checks,
        "cycle_length": partial(integer, low=1),
        "proportion_exploration": partial(number, below=1.0),
        "proportion_burn_in": partial(number, below=1.0),
        "anneal_lr": boolean,
        "lr_min": lambda owner, name, value: None if value is None else number(owner, name, value),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_length: int,
        proportion_exploration: float = 0.5,
        anneal_lr: bool = True,
        lr_min: float | None = None,
        last_epoch: int = -1,
        *,
        burn_in: int = 0,
        proportion_burn_in: float = 0.5,
    ) -> None:
        owner = "CyclicalTemperature"
        self.cycle_length: int = self._checked("cycle_length", cycle_length)
        self.proportion_exploration: float = self._checked("proportion_exploration", proportion_exploration)
        self.proportion_burn_in: float = self._checked("proportion_burn_in", proportion_burn_in)
        self.anneal_lr: bool = self._checked("anneal_lr", anneal_lr)
        self.lr_min: float | None = self._checked("lr_min", lr_min)
        super().__init__(optimizer, last_epoch, burn_in=burn_in)
        collected = self.collected_variance(LR_OVER_SIGMA)
        cold = all(isinstance(base, float) and base == 0 for base in self.base_temperatures)
        if collected < ENOUGH and not cold:
            warnings.warn(
                f"{owner}: the sampling phase of {cycle_length} steps is too short to mix: of a weight whose posterior "
                f"standard deviation is 10 lr its samples would show {collected:.2g} of the variance, less of a wider "
                "one. Lengthen cycle_length, lower proportion_exploration, or raise lr_min or proportion_burn_in",
                stacklevel=2,
            )

    def collected_variance(self, lr_over_sigma: float) -> float:
        """The share of the posterior's variance that the collected steps of a cycle show, for the first group's lr.

        The mean over the collected steps of 1 - exp(-2 sum_k lr_k / sigma), k from the first hot step on, since each
        cycle is taken to start from an optimum. Left out: the lag of the momentum, some 1/(1 - beta1) steps, that the
        preconditioner adapts, and that gradients have noise of their own.

        Args:
            lr_over_sigma: the group's initial lr over the posterior's standard deviation of a weight, > 0.
        """
        ratio = number("CyclicalTemperature.collected_variance", "lr_over_sigma", lr_over_sigma, above=0.0)
        position = np.arange(self.cycle_length) / self.cycle_length
        rates = np.ones(self.cycle_length)
        if self.anneal_lr:
            base = float(self.base_lrs[0]) if self.lr_min else 1.0
            floor = FLOOR if self.lr_min is None else self.lr_min / base if base else 1.0
            rates = floor + (1 - floor) * (1 + np.cos(np.pi * position)) / 2
        relaxed = np.cumsum(np.where(position >= self.proportion_exploration, ratio * rates, 0.0))
        collected = -np.expm1(-2 * relaxed[position >= self._collects_from])
        return float(collected.mean()) if collected.size else 0.0

    @property
    def cycle(self) -> int:
        """Number of the current cycle, from 0; -1 during burn_in."""
        return (
            (self.last_epoch - self.burn_in) // self.cycle_length if self.last_epoch >= self.burn_in else -1
        )

    @property
    def position(self) -> float:
        """r in [0, 1): how far the current step is into its cycle; 0 during burn_in."""
        return self._position(max(self.last_epoch - self.burn_in, 0))

    @property
    def sampling(self) -> bool:
        """Whether to collect: the optimizer step of the current count is past the burn-in of its sampling phase."""
        return super().sampling and self.position >= self._collects_from

    @property
    def _collects_from(self) -> float:
        explored = self.proportion_exploration
        return explored + self.proportion_burn_in * (1 - explored)

    def _position(self, step: int) -> float:
        return (step % self.cycle_length) / self.cycle_length

    def _share(self, step: int) -> float:
        return (1 + math.cos(math.pi * self._position(step))) / 2

    def _floor(self, base: Value) -> Value:
        return FLOOR * base if self.lr_min is None else self.lr_min

    def temperature_at(self, step: int, initial: Value, group: int) -> Value:
        return initial if self._position(step) >= self.proportion_exploration else 0.0 * initial

    def get_lr(self, step: int | None = None) -> list[Value]:
        """Learning rate of every group at `step` (default: the current one), without applying it."""
        at = self.last_epoch if step is None else integer("CyclicalTemperature", "step", step, 0)
        share = self._share(max(at - self.burn_in, 0))
        floors = [self._floor(base) for base in self.base_lrs]
        return [floor + (base - floor) * share for floor, base in zip(floors, self.base_lrs, strict=True)]

    def _go_to(self, following: int, first: int = 0) -> None:
        super()._go_to(following, first)
        if self.anneal_lr:
            rates = zip(self.optimizer.param_groups, self.get_lr(), strict=True)
            for group, lr in list(rates)[first:]:
                assign(group, "lr", lr)
            self._last_lr = self.get_last_lr()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if isinstance(state_dict, dict):  # of releases up to 0.1, whose phases had no burn-in
            state_dict = {"proportion_burn_in": 0.0, **state_dict}
        super().load_state_dict(state_dict)
