"""Paths of densities, and the moves that leave each of them as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, constraints

from fekernels import random
from fekernels._catalogue.random import LANGEVIN_NOISE
from fekernels._checks import floating

__all__ = ["LONGEST", "GeometricPath", "Path", "Transition"]

LogDensity = Callable[[Tensor], Tensor]
Transition = Callable[..., Tensor]  # (x, log_density, *, beta, seed, step) -> x
START = (0, 0)  # (step, stream) of the draws of the base; moves have steps from 1 on
STREAMS = 3  # of a trajectory: momenta, acceptance, lengths
SHORTEST = 0.3  # of the lengths of trajectories
# Of a trajectory in units of the scales: over a Gaussian half a turn, the far side; a whole one ends where it began.
LONGEST = math.pi


class Path:
    """Unnormalised densities p_b, 0 <= b <= 1, from a base that can be drawn from to the target.

    A subclass gives `start`, `log_ratio` and `move`. Noise is named by (seed, step): the same numbers give the same
    particles.

    Attributes:
        log_z_base: log of the integral of p_0; 0 where p_0 is normalised.
        acceptance: share of proposals taken so far; None of moves that propose nothing.
    """

    log_z_base: float = 0.0
    acceptance: float | None = None

    def start(self, n: int, *, seed: int) -> Tensor:
        """[n, d], independent exact draws of p_0."""
        raise NotImplementedError(f"{type(self).__name__} must define start(n, seed)")

    def log_ratio(self, x: Tensor, low: float, high: float) -> Tensor:
        """[n], log p_high(x) - log p_low(x)."""
        raise NotImplementedError(f"{type(self).__name__} must define log_ratio(x, low, high)")

    def move(self, x: Tensor, beta: float, *, seed: int, step: int) -> Tensor:
        """[n, d], every particle moved by a Markov kernel that leaves p_beta as it is."""
        raise NotImplementedError(f"{type(self).__name__} must define move(x, beta, seed, step)")


def normal(x: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """Noise like x."""
    shape, device = x.shape, x.device
    return random.normal(
        shape, seed=seed, step=step, stream=stream, purpose=LANGEVIN_NOISE, device=device
    ).to(x.dtype)


def uniform(x: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """[n], of each particle."""
    return random.uniform(
        (len(x),), seed=seed, step=step, stream=stream, purpose=LANGEVIN_NOISE, device=x.device
    ).to(x.dtype)


@dataclass(frozen=True)
class _Point:
    """Positions [n, d] with both log-densities [n] and, where they are wanted, their gradients [n, d]."""

    x: Tensor
    base: Tensor
    target: Tensor
    base_slope: Tensor | None = None
    target_slope: Tensor | None = None

    def log_density(self, beta: float) -> Tensor:
        return _mixed(self.base, self.target, beta)

    def slope(self, beta: float) -> Tensor:
        assert self.base_slope is not None and self.target_slope is not None
        return _mixed(self.base_slope, self.target_slope, beta)

    def where(self, taken: Tensor, other: _Point) -> _Point:
        """``other`` for the particles that are not taken."""
        column = taken[:, None]
        assert self.base_slope is not None and self.target_slope is not None
        assert other.base_slope is not None and other.target_slope is not None
        return _Point(
            torch.where(column, self.x, other.x),
            torch.where(taken, self.base, other.base),
            torch.where(taken, self.target, other.target),
            torch.where(column, self.base_slope, other.base_slope),
            torch.where(column, self.target_slope, other.target_slope),
        )


def _mixed(base: Tensor, target: Tensor, beta: float) -> Tensor:
    """At the ends the other one has no say, not even by 0 times infinity."""
    if beta in (0.0, 1.0):
        return target if beta else base
    return (1 - beta) * base + beta * target


class GeometricPath(Path):
    """log p_b = (1 - b) log p_0 + b log p_1, moved by Hamiltonian Monte Carlo with Metropolis' correction.

    Args:
        log_prob: unnormalised log-density of the target, [n, d] -> [n], differentiable.
        base: a `torch.distributions.Distribution` over [d] (further batch dimensions are taken for event dimensions),
            or an object with ``sample(n, seed=...)`` -> [n, d] and ``log_prob``, [n, d] -> [n], normalised unless
            it has a ``log_z``.
        transition: None, or a function (x, log_density, *, beta, seed, step) -> x that leaves exp(log_density) as it
            is; log_density is p_beta's, [n, d] -> [n].
        leapfrog_steps: of a trajectory; 1 is the Metropolis-adjusted Langevin algorithm.
        moves: trajectories at each beta.

    Attributes:
        scales: of the moves: (betas [m], step sizes [m], standard deviations [m, d]), linear in between.
    """

    def __init__(
        self,
        log_prob: LogDensity,
        base: Any,
        *,
        transition: Transition | None = None,
        leapfrog_steps: int = 5,
        moves: int = 1,
    ) -> None:
        self.log_prob, self.base = log_prob, _as_base(base)
        self.log_z_base = float(getattr(base, "log_z", 0.0))
        self.transition, self.leapfrog_steps, self.moves = transition, leapfrog_steps, moves
        self.scales: tuple[Tensor, Tensor, Tensor] | None = None
        self._at: _Point | None = None
        self._taken: list[Tensor] = []

    @property
    def acceptance(self) -> float | None:  # type: ignore[override]
        return float(torch.stack(self._taken).double().mean()) if self._taken else None

    @property
    def support_is_thin(self) -> bool:
        """Whether the base's support, as that of counts or of a simplex, has no volume: all proposals leave it."""
        support = self.base.support if isinstance(self.base, _TorchBase) else None
        return support is not None and (support.is_discrete or _core(support) is constraints.simplex)

    def outside(self, x: Tensor) -> Tensor:
        """[n], where the base has no density."""
        return self._point(x).base == -math.inf

    def start(self, n: int, *, seed: int) -> Tensor:
        self._taken = []
        return self.base.sample(n, seed=seed)

    def log_ratio(self, x: Tensor, low: float, high: float) -> Tensor:
        at = self._point(x)
        return (high - low) * (at.target.double() - at.base.double())

    def move(self, x: Tensor, beta: float, *, seed: int, step: int) -> Tensor:
        if self.transition is not None:

            def log_density(position: Tensor) -> Tensor:
                return _mixed(
                    self._checked("base", self.base.log_prob(position), position),
                    self._checked("log_prob", self.log_prob(position), position),
                    beta,
                )

            with torch.no_grad():
                moved = self.transition(x, log_density, beta=beta, seed=seed, step=step)
            if not isinstance(moved, Tensor) or moved.shape != x.shape:
                came = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
                raise ValueError(
                    f"importance_sampling: transition must return shape {tuple(x.shape)} like x; got {came}"
                )
            return moved
        size, std = self._scale(x, beta)
        for k in range(self.moves):
            x, _ = self.trajectory(x, beta, size, std, seed, step, k)
        return x

    def trajectory(
        self, x: Tensor, beta: float, size: float, std: Tensor, seed: int, step: int, k: int
    ) -> tuple[Tensor, float]:
        """One proposal for every particle at ``x``: where they are then, and the share of those that moved."""
        start = at = self._point(x)
        first = momentum = normal(x, seed, step, STREAMS * k)
        width = size * std
        if self.leapfrog_steps > 1:
            # Lengths of their own, or all particles would return where they came from together.
            length = uniform(x, seed, step, STREAMS * k + 2)[:, None]
            width = width * (SHORTEST + (1 - SHORTEST) * length)
        for _ in range(self.leapfrog_steps):
            momentum = momentum + width / 2 * at.slope(beta)
            at = self._evaluate(at.x + width * momentum)
            momentum = momentum + width / 2 * at.slope(beta)
        energy = momentum.square().sum(1) / 2 - first.square().sum(1) / 2
        gain = at.log_density(beta) - start.log_density(beta) - energy
        taken = uniform(x, seed, step, STREAMS * k + 1).log() < gain  # never where it is NaN
        self._at = at.where(taken, start)
        self._taken.append(taken.float().mean())
        return self._at.x, float(self._taken[-1])

    def _scale(self, x: Tensor, beta: float) -> tuple[float, Tensor]:
        assert self.scales is not None, "a path has scales before it is walked"
        betas, sizes, stds = self.scales
        right = int(torch.searchsorted(betas, beta).clamp(1, len(betas) - 1)) if len(betas) > 1 else 0
        left = max(right - 1, 0)
        gap = float(betas[right] - betas[left])
        share = min(max((beta - float(betas[left])) / gap, 0.0), 1.0) if gap > 0 else 1.0
        return float(sizes[left].lerp(sizes[right], share)), stds[left].lerp(stds[right], share).to(x)

    def _point(self, x: Tensor) -> _Point:
        if self._at is None or self._at.x is not x:
            self._at = self._evaluate(x)
        return self._at

    def _evaluate(self, x: Tensor) -> _Point:
        if self.transition is not None:
            with torch.no_grad():
                return _Point(
                    x,
                    self._checked("base", self.base.log_prob(x), x),
                    self._checked("log_prob", self.log_prob(x), x),
                )
        x = x.detach()
        known = self.base.value_and_slope(x) if isinstance(self.base, _TorchBase) else None
        base, base_slope = known or self._differentiated("base", self.base.log_prob, x)
        target, target_slope = self._differentiated("log_prob", self.log_prob, x)
        return _Point(x, base, target, base_slope, target_slope)

    def _differentiated(self, name: str, function: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n] and its slopes [n, d], 0 of a constant, as of a uniform base."""
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            value = self._checked(name, function(leaf), x)
            slope = None
            if value.requires_grad:
                slope = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]
        return value.detach(), torch.zeros_like(x) if slope is None else slope

    @staticmethod
    def _checked(name: str, value: Any, x: Tensor) -> Tensor:
        value = floating("importance_sampling", f"the result of {name}", value)
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"importance_sampling: {name} must map [n, d] to [n], here {tuple(x.shape)} to {(len(x),)}; "
                f"got {tuple(value.shape)}"
            )
        return value


class _TorchBase:
    """A distribution of torch with this package's noise where it is Gaussian, and torch's own, seeded, where not."""

    def __init__(self, distribution: Distribution) -> None:
        distribution = _lenient(distribution)
        extra = len(distribution.batch_shape)
        self.distribution = Independent(distribution, extra, False) if extra else distribution
        if len(self.distribution.event_shape) != 1:
            raise ValueError(
                f"importance_sampling: base must be a distribution over vectors (d,), such as Normal(zeros(d), 1); got "
                f"shape {tuple(self.distribution.event_shape)}"
            )
        inner = distribution
        while isinstance(inner, Independent):
            inner = inner.base_dist
        self.inner = inner
        try:
            self.support = self.distribution.support
        except NotImplementedError:  # of a distribution that says nothing about it
            self.support = None

    def log_prob(self, x: Tensor) -> Tensor:
        value = self.distribution.log_prob(x)
        if self.support is None:
            return value
        # What torch's formulas give outside may be any number: of an Exponential a larger density than inside.
        return torch.where(self.support.check(x), value, -torch.inf)

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of independent normals without autograd, which takes longer than all the rest of a step; None of others."""
        if not isinstance(self.inner, Normal):
            return None
        loc, scale = self.inner.loc, self.inner.scale
        z = (x - loc) / scale
        at_mean = -(scale.log() + math.log(2 * math.pi) / 2).sum()
        return at_mean - z.square().sum(1) / 2, -z / scale

    @torch.no_grad()
    def sample(self, n: int, *, seed: int) -> Tensor:
        inner, event = self.inner, self.distribution.event_shape
        if isinstance(inner, (Normal, MultivariateNormal)):
            noise = normal(inner.mean.new_empty((n, *event)), seed, *START)
            if isinstance(inner, Normal):
                return (inner.loc + inner.scale * noise).contiguous()
            return inner.loc + noise @ inner.scale_tril.mT
        with torch.random.fork_rng():
            torch.manual_seed(seed & ((1 << 63) - 1))
            return self.distribution.sample((n,))


def _core(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _lenient(distribution: Distribution) -> Distribution:
    """A copy that, with all that it is made of, takes values outside of its support: proposals may go there."""
    distribution = copy.copy(distribution)
    distribution._validate_args = False
    for name, part in list(vars(distribution).items()):
        if isinstance(part, Distribution):
            setattr(distribution, name, _lenient(part))
    return distribution


def _as_base(base: Any) -> Any:
    if isinstance(base, Distribution):
        return _TorchBase(base)
    for name in ("sample", "log_prob"):
        if not callable(getattr(base, name, None)):
            raise TypeError(
                "importance_sampling: base must be a torch.distributions.Distribution or have sample(n, seed=...) and "
                f"log_prob(x); got {type(base).__name__} without {name}"
            )
    return base
