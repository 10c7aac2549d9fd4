"""Chains on their way: which gradient moves them, how far, and what is remembered of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fekernels.optim import LangevinAdam
from fekernels.posterior.chain_ranks import ChainRanks
from fekernels.posterior.chains import Chains, LossFunction
from fekernels.posterior.convergence import smaller_size
from fekernels.posterior.measured_temperature import MeasuredTemperature, measured_temperature
from fekernels.posterior.pilot import Data, Energy, curvature, flat

__all__ = ["BETA1", "CONTROL_VARIATES", "FULL", "MINIBATCHES", "ChainSampler", "Course", "Plan"]

FULL, MINIBATCHES, CONTROL_VARIATES = "full gradients", "minibatches", "control variates"
BETA1 = 0.9
LONG_AGO = 1e5  # steps, after which neither bias correction nor start changes anything
EPS = 1e-6  # what LangevinAdam wants without a prior; D has it taken off
TRACKED = 1024  # weights whose course is kept, evenly spread over all
LENGTHS = 20  # autocorrelation times that a burn-in lasts
SELDOM = 2  # how many positions one virial is of, which costs a few passes over the weights, or a gradient
FIRST, LONGEST = 128, 4096  # steps of a burn-in


@dataclass(frozen=True)
class Plan:
    """How chains move.

    Attributes:
        way: the gradient that is used.
        denominators: D of every weight, [n, *shape] each.
        lr: h, the step size.
        noise: the variance of that gradient.
        ratio: the mean over the weights that the data inform of r = h noise / (2 T D).
        worst: of those weights, the largest r but for a hundredth of them.
        frozen: whether D stands still.
    """

    way: str
    denominators: list[Tensor]
    lr: float
    noise: list[Tensor]
    ratio: float
    worst: float
    frozen: bool


@dataclass(frozen=True)
class Course:
    """What is remembered of this rank's chains: positions of the tracked weights, and their virials.

    Attributes:
        origin: all weights where it began, from which virials are measured: about as far from any later position as
            that is from the mean, which nobody knows.
        positions: [n, weights] each.
        virials: [n] each, of one of ``SELDOM`` positions, a step before.
    """

    origin: list[Tensor]
    positions: list[Tensor] = field(default_factory=list)
    virials: list[Tensor] = field(default_factory=list)

    @property
    def later(self) -> Course:
        """Its second half."""
        return Course(
            self.origin, self.positions[len(self.positions) // 2 :], self.virials[len(self.virials) // 2 :]
        )


class ChainSampler:
    """n chains, the data they look at, and the steps they take.

    Stacked tensors are of this rank's chains; what decides anything is of all, by ``ranks``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Data,
        prior_precision: float,
        n: int,
        seed: int,
        tick: Callable[[str], None],
        ranks: ChainRanks,
    ) -> None:
        self.model, self.loss_fn, self.data = model, loss_fn, data
        self.n, self.seed, self.tick, self.ranks = n, seed, tick, ranks
        self.temperature = 1.0 / data.data_size
        self.prior = prior_precision / data.data_size
        self.chains = self._own_chains()
        self.parameters = list(self.chains.parameters())
        self._stepped = [ranks.as_part(p) for p in self.parameters]
        self._slots: list[Tensor] = []  # where ranks put gradients, whose DTensors cost more than a copy
        if ranks.group is not None:
            self._slots = [torch.empty_like(p) for p in self.parameters]
            for part, slot in zip(self._stepped, self._slots, strict=True):
                part.grad = ranks.as_part(slot)
        self.energy = Energy(self.chains, loss_fn, data)
        self._drawn: list[tuple[Any, float]] = []  # the batches of the last gradients
        self.steps = 0
        sizes = [p.shape[1:].numel() for p in self.parameters]
        self.weights = sum(sizes)
        places = torch.linspace(0, self.weights - 1, min(self.weights, TRACKED)).round().long()
        # Of each parameter, those of its elements that are tracked.
        self._tracked: list[Tensor] = []
        for p, size in zip(self.parameters, sizes, strict=True):
            self._tracked.append(places[(places >= 0) & (places < size)].to(p.device))
            places = places - size

    def _own_chains(self) -> Chains:
        own = self.ranks.own
        return Chains(self.model, own) if own else Chains(self.model, 1).first(0)

    def names(self) -> tuple[str, ...]:
        """Of the weights that are tracked."""
        named = zip(self.chains.named_parameters(), self._tracked, strict=True)
        return tuple(f"{name}[{i}]" for (name, _), places in named for i in places.tolist())

    def of_tracked(self, tensors: Iterable[Tensor]) -> Tensor:
        """[n, weights that are tracked], on the CPU, of tensors shaped like the parameters."""
        pairs = zip(tensors, self._tracked, strict=True)
        return torch.cat([t.detach().flatten(1)[:, places].cpu() for t, places in pairs], 1)

    def states_of_all(self, states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Of all chains, from those of this rank's as `Chains.states` has them."""
        if self.ranks.group is None:
            return states
        saved = self.model.state_dict()
        own = {name for name, _ in (*self.chains.named_parameters(), *self.model.named_buffers())}
        found = [dict(saved) for _ in range(self.n)]
        for name, value in saved.items():
            if name in own:
                mine = (
                    torch.stack([s[name] for s in states]) if states else value.new_empty((0, *value.shape))
                )
                for state, row in zip(found, self.ranks.gather(mine).unbind(0), strict=True):
                    state[name] = row
        return found

    def recentre(self) -> None:
        """Make each chain's position its centre; a pass over the data."""
        centres = self._own_chains()
        with torch.no_grad():
            for own, now in zip(centres.parameters(), self.parameters, strict=True):
                own.copy_(now)
        self.centre = Energy(centres, self.loss_fn, self.data)
        self.at_centre = self.centre.full_gradient()[1]

    @torch.no_grad()
    def to_centre(self, which: Tensor | slice = slice(None)) -> None:
        """This rank's chains, or some of them."""
        for p, c in zip(self.parameters, self.centre.chains.parameters(), strict=True):
            p[which] = c[which]

    @torch.no_grad()
    def to(self, states: list[dict[str, Tensor]]) -> None:
        """Put this rank's chains to ``states``, and to their centres those whose weights there are not finite."""
        self.to_centre()
        for k, state in enumerate(states):
            if all(bool(state[name].isfinite().all()) for name, _ in self.chains.named_parameters()):
                for name, p in self.chains.named_parameters():
                    p[k] = state[name]

    def potential(self, losses: Tensor) -> Tensor:
        """[n]: the negative logarithm of the posterior, but for a constant."""
        squares = flat(self.parameters).double().square().sum(1)
        return self.data.data_size * (losses.double() + self.prior / 2 * squares)

    def losses(self, batch: Any) -> Tensor:
        """Of this rank's chains."""
        return self.chains.losses(self.loss_fn, batch) if self.ranks.own else self.parameters[0].new_zeros(0)

    def stiffest(self, denominators: list[Tensor]) -> float:
        """The largest curvature of all chains (``curvature``)."""
        own = curvature(self.energy, denominators, self.temperature, self.ranks)
        return float(self.ranks.gather(own).max())

    def adam(self, **options: Any) -> LangevinAdam:
        """The optimizer of these chains, whose noise is that of their indices among all."""
        return LangevinAdam(self._stepped, stochastic_rounding=True, **options)

    def follow(self, plan: Plan) -> None:
        """Go on by ``plan``, with no memory of the steps before."""
        self.plan = plan
        self.optimizer = self.adam(
            lr=plan.lr, betas=(BETA1, 0.999), eps=EPS, temperature=self.temperature,
            prior_precision=self.prior, seed=self.seed + self.steps,
        )  # fmt: skip
        for part, p, d in zip(self._stepped, self.parameters, plan.denominators, strict=True):
            # At t = 0 a frozen D is taken as it stands; one that adapts has its bias correction behind it.
            self.optimizer.state[part].update(
                step=torch.full((), 0.0 if plan.frozen else LONG_AGO, device=p.device),
                exp_avg=self.ranks.as_part(torch.zeros_like(p)),
                exp_avg_sq=self.ranks.as_part((d - EPS).clamp_min(0.0).square().to(p.dtype)),
            )
        if plan.frozen:
            self.optimizer.freeze_preconditioner()

    def batches(self) -> list[tuple[Any, float]]:
        """One for each of this rank's chains, which are those they would have in one process: all ranks draw all."""
        return self.data.next(self.n)[self.ranks.mine]

    def gradients(self) -> list[Tensor]:
        """What a step takes: of a batch for each chain, so that their noises are independent, or of all the data."""
        if self.plan.way == FULL:
            return self.energy.full_gradient()[1]
        self._drawn = self.batches()
        found = self.energy.gradients_of(self._drawn)[1]
        return self._controlled(found) if self.plan.way == CONTROL_VARIATES else found

    def _controlled(self, gradients: list[Tensor]) -> list[Tensor]:
        """Those of the batches drawn last, without the noise that these have at the centre."""
        at_centre = self.centre.gradients_of(self._drawn)[1]
        pairs = zip(gradients, at_centre, self.at_centre, strict=True)
        return [batch.neg_().add_(g).add_(full) for g, batch, full in pairs]

    def step(self, optimizer: torch.optim.Optimizer, gradients: list[Tensor], what: str) -> None:
        if self._slots:
            for slot, g in zip(self._slots, gradients, strict=True):
                slot.copy_(g)
        else:
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = g
        optimizer.step()
        self.steps += 1
        self.tick(what)

    def go(self, steps: int, what: str, course: Course | None = None, stride: int = 1) -> None:
        """Take steps, and remember every ``stride``-th position in ``course``."""
        for k in range(steps):
            gradients = self.gradients()
            remembered = course is not None and (k + 1) % stride == 0
            if course is not None and remembered:
                self._measure(gradients, course)
            self.step(self.optimizer, gradients, what)
            if course is not None and remembered:
                course.positions.append(self.of_tracked(self.parameters))

    def course(self) -> Course:
        """One that begins here."""
        return Course([p.detach().clone() for p in self.parameters])

    @torch.no_grad()
    def _measure(self, gradients: list[Tensor], course: Course) -> None:
        """Remember the virials [n] of a position, from its gradients: see ``measured_temperature``.

        Batches of one pass leave out each other's points, so that their noise knows of the steps before: it is taken
        off, at the price of another gradient.
        """
        if len(course.positions) % SELDOM:
            return
        if self.plan.way == MINIBATCHES and self.data.batches > 1:
            gradients = self._controlled(gradients)
        total = torch.zeros(self.ranks.own, device=self.parameters[0].device)
        for p, at, g in zip(self.parameters, course.origin, gradients, strict=True):
            products = (p - at) * (g + self.prior * p)
            total += products.flatten(1).sum(1, dtype=torch.promote_types(p.dtype, total.dtype)).to(total)
        course.virials.append(total.cpu().double() / (self.weights * self.temperature))

    def burn_in(self, steps: int | None) -> tuple[float, Course]:
        """Step until the course is 20 autocorrelation times long. Returns that time, in steps, and its second half."""
        course = self.course()
        if steps is not None:
            self.go(steps, "burn-in", course)
            return (self._time_of(course.later) if steps >= 16 else 1.0), course.later
        length = FIRST
        while True:
            self.go(length - len(course.positions), "burn-in", course)
            flown = self.temperature_of(course.later).value == math.inf
            time = self._time_of(course.later)
            if flown or length >= LENGTHS * time or length >= LONGEST:
                return time, course.later
            length *= 2

    def positions_of(self, course: Course) -> Tensor:
        """[chains, positions, weights], of all ranks' chains."""
        return self.ranks.gather(torch.stack(course.positions, 1))

    def temperature_of(self, course: Course) -> MeasuredTemperature:
        """Of all ranks' chains, over the one asked for."""
        own = torch.stack(course.virials, 1) if course.virials else torch.zeros(self.ranks.own, 0)
        return measured_temperature(self.ranks.gather(own))

    def _time_of(self, course: Course) -> float:
        return autocorrelation_time(self.positions_of(course).transpose(0, 1).contiguous())


def autocorrelation_time(draws: Tensor) -> float:
    """In records of [records, chains, weights]: of the slowest weights but for the slowest twentieth.

    Of each chain by itself: those in different modes would never forget them, however far apart their draws are.
    """
    count, chains, weights = draws.shape
    sizes = smaller_size(draws.view(1, count, chains * weights)).nan_to_num(1.0).view(chains, weights).sum(0)
    return chains * count / max(float(sizes.quantile(0.05)), 1.0)
