"""The particles of a sampler on several ranks: what `fekernels.stein.population` says, by collectives."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels.distributed._rows_of_ranks import Rows
from fekernels.distributed._sharded_particles import ShardedParticles
from fekernels.ops.stein.svgd_direction import check_settings
from fekernels.stein.particle_groups import group_medians, mean_bandwidth, part_direction
from fekernels.stein.population import Population
from fekernels.stein.svgd_run import measure
from fekernels.stein.target import ScoreFunction, Target

__all__ = ["ShardedPopulation"]


class ShardedPopulation(Population):
    """Own particles and those of the other ranks of ``group``."""

    def __init__(self, function: str, group: Any, exchange: str, counts: Sequence[int], x: Tensor) -> None:
        self.rows = Rows(function, group, counts)
        super().__init__(function, self.rows.n)
        self.group, self.begin, self.first, self._exchange = (
            group,
            self.rows.begin,
            self.rows.rank == 0,
            exchange,
        )
        self._now: ShardedParticles | None = None
        self._by_element = self.rows.world == 1  # whether the optimizer has been seen to be

    def _particles(self, x: Tensor) -> ShardedParticles:
        """As they are in this step, in which they do not move: what was made of them once is kept."""
        if self._now is None or self._now.own is not x:
            self._now = ShardedParticles(self.rows, x, self._exchange)
        return self._now

    def forget(self) -> None:
        self._now = None

    def evaluate(
        self, target: Target, x: Tensor, batch: tuple[Any, ...], step: int
    ) -> tuple[Tensor, Tensor | None]:
        if len(x):
            return super().evaluate(target, x, batch, step)
        return torch.empty_like(x), None if isinstance(target, ScoreFunction) else x.new_empty(0)

    def move(self, optimizer: Optimizer, x: Tensor) -> None:
        """The first step shows the states, and is taken back where they are not of single elements."""
        if self._by_element:
            optimizer.step()
            return
        before, state = x.clone(), copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        try:
            with self.together() as agreement:
                self._check_states(self.function, optimizer, optimizer.state.values(), x.shape)
                agreement.tell(len(x))
        except Exception:
            x.copy_(before)
            optimizer.load_state_dict(state)
            raise
        self._by_element = True

    def check_loaded(self, function: str, optimizer: Optimizer, state: Any, shape: Sequence[int]) -> None:
        if self.rows.world > 1 and isinstance(state.get("state"), dict):
            self._check_states(function, optimizer, state["state"].values(), shape)

    @staticmethod
    def _check_states(function: str, optimizer: Any, states: Iterable[Any], shape: Sequence[int]) -> None:
        of_matrices = tuple(filter(None, [getattr(torch.optim, "Muon", None)]))
        shown = "which takes matrices for one" if isinstance(optimizer, of_matrices) else ""
        for each in filter(None, states):
            for key, value in each.items():
                if isinstance(value, Tensor) and value.numel() != 1 and value.shape != shape:
                    shown = f"whose state {key} has shape {tuple(value.shape)}"
        if shown:
            raise ValueError(
                f"{function}: optimizer must work element by element where particles are split over ranks, with states "
                f"of the particles' shape {tuple(shape)} or of one number, as Adam's; got {type(optimizer).__name__}, "
                f"{shown}"
            )

    def median(self, x: Tensor, hint: Tensor | None) -> Tensor:
        return self._particles(x).bandwidth("liu_wang")[0]

    def direction(self, x: Tensor, scores: Tensor, kernel: object, **settings: Any) -> Tensor:
        call = check_settings("svgd_direction", kernel, settings["temperature"], settings["precision"])
        return self._particles(x).direction(scores, settings["bandwidth"].reshape(1), call)

    def group_bandwidth(self, x: Tensor, groups: list[Tensor]) -> Tensor:
        whole, medians = self._particles(x).whole, []
        for index in groups:
            counts, own = self._deal(len(index))
            medians.append(self.rows.gather(group_medians(whole, index[own]), counts))
        return mean_bandwidth(medians, self.n)

    def group_direction(
        self, x: Tensor, scores: Tensor, groups: list[Tensor], kernel: object, **settings: Any
    ) -> Tensor:
        """Groups are dealt to the ranks, whose members move them and tell all."""
        whole, all_scores = self._particles(x).whole, self.rows.gather(scores)
        phi = torch.empty_like(whole)
        for index in groups:
            counts, own = self._deal(len(index))
            moved = part_direction(whole, all_scores, index[own], kernel, **settings)
            phi[index] = self.rows.gather(moved, counts)
        return self.part(phi).clone()

    def _deal(self, groups: int) -> tuple[list[int], slice]:
        bounds = [rank * groups // self.rows.world for rank in range(self.rows.world + 1)]
        counts = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
        return counts, slice(bounds[self.rows.rank], bounds[self.rows.rank + 1])

    def measure(
        self, kernel: object, x: Tensor, scores: Tensor, h: Tensor, log_prob: Tensor | None
    ) -> Tensor:
        whole = None if log_prob is None else self.rows.gather(log_prob.double())
        return measure(kernel, self._particles(x).whole, self.rows.gather(scores), h, whole)

    def gather(self, rows: Tensor) -> Tensor:
        whole = self.rows.gather(rows)
        return whole.clone() if whole is rows else whole

    def mean(self, rows: Tensor) -> Tensor:
        return self.rows.sum(rows.sum(0)) / self.n

    def part(self, rows: Tensor) -> Tensor:
        return rows[self.rows.own]
