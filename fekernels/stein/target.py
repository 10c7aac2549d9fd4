"""Where scores come from: a log-density by autograd, batched over the particles or not, or a function of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LogDensity", "ScoreFunction", "Target", "make_target"]

State = dict[str, Tensor]


class Target:
    """Scores [n, d] of particles [n, d], and the log-density [n] where it is known."""

    def evaluate(self, particles: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError(f"{type(self).__name__} must define evaluate(particles, batch)")

    def state(self) -> State:
        """Copies of what an evaluation changes and a checkpoint needs."""
        return {}

    def check(self, function: str, state: object) -> None:
        """Raise where `state` is no state of this target."""
        mine = self.state()
        if not isinstance(state, dict):
            raise TypeError(f"{function}: target must be a dict; got {type(state).__name__}")
        if state.keys() != mine.keys():
            raise ValueError(f"{function}: target must hold {sorted(mine)}; got {sorted(map(str, state))}")
        for key, tensor in mine.items():
            came = state[key]
            if not isinstance(came, Tensor) or came.shape != tensor.shape or came.dtype != tensor.dtype:
                what = (
                    f"{came.dtype} {tuple(came.shape)}" if isinstance(came, Tensor) else type(came).__name__
                )
                raise ValueError(
                    f"{function}: target[{key!r}] must be {tensor.dtype} {tuple(tensor.shape)}; got {what}"
                )

    def load(self, state: State) -> None:
        """Put back what `state` returned."""


class ScoreFunction(Target):
    """The user's function, called once per step with all particles."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def evaluate(self, particles: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():  # it may differentiate within
            scores = self.function(particles, *batch)
        if not isinstance(scores, Tensor):
            raise TypeError(f"SVGD: scores must return a tensor; got {type(scores).__name__}")
        if scores.shape != particles.shape:
            raise ValueError(
                f"SVGD: scores must return shape {tuple(particles.shape)} like the particles; got {tuple(scores.shape)}"
            )
        if not scores.is_floating_point():
            raise TypeError(f"SVGD: scores must return floating-point numbers; got {scores.dtype}")
        if scores.device != particles.device:
            raise ValueError(f"SVGD: scores must return them on {particles.device}; got {scores.device}")
        return scores.detach().to(particles.dtype), None


class LogDensity(Target):
    """The gradient of a log-density.

    Args:
        function: [n, d] -> [n], or [d] -> scalar.
        batched: which of the two; None finds out at the first step, by one call with all particles. It is batched if
            that gives [n] numbers, each of which depends on its own particle alone. (Shapes do not say it:
            `lambda x: -x[0]**2 - x[1]**2` gives [n] numbers where n = d.) [n] numbers that depend on other particles
            too are an error: as a function of one particle it would be another density.
    """

    def __init__(self, function: Callable[..., Tensor], batched: bool | None) -> None:
        self.function, self.batched = function, batched

    def evaluate(self, particles: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            x = particles.detach().requires_grad_(True)
            values = self._values(x, batch)
            if not values.requires_grad:
                raise ValueError(
                    "SVGD: log_prob must depend on the particles through differentiable operations; its result has no "
                    "gradient (give scores= for a density that autograd cannot differentiate)"
                )
            # Every number depends on its own particle alone, so the gradient of the sum is all scores at once.
            (scores,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
        if scores is None:
            raise ValueError("SVGD: log_prob must depend on the particles; its result does not")
        return scores, values.detach()

    def _values(self, x: Tensor, batch: tuple[Any, ...]) -> Tensor:
        if self.batched is None:
            return self._first(x, batch)
        return self._all(x, batch) if self.batched else self._each(x, batch)

    def _first(self, x: Tensor, batch: tuple[Any, ...]) -> Tensor:
        said: str
        cause: Exception | None = None
        try:
            values = self._all(x, batch)
        except Exception as error:  # whatever the user's function makes of a shape it does not expect
            said, cause = f"{type(error).__name__}: {error}", error
        else:
            if _rows_alone(values, x):
                self.batched = True
                return values
            if x.shape[0] != x.shape[1] or self._is_batched(x[:-1], batch):
                raise ValueError(
                    f"SVGD: log_prob must give each particle a log-density of its own; on all particles, of shape "
                    f"{tuple(x.shape)}, its numbers depend on other particles too (by a mean over the particles, or "
                    "batch normalisation?). batched=False takes it for a function of one particle, [d] -> scalar, and "
                    "batched=True takes the gradient of the sum"
                )
            said = "numbers that depend on more than one particle"
        try:
            values = self._each(x, batch)
        except Exception as error:
            raise ValueError(
                "SVGD: log_prob must map [n, d] to [n], or (vmapped) one particle [d] to a scalar; on all particles "
                f"it gave {said}; on each, {type(error).__name__}: {error}"
            ) from (cause or error)
        self.batched = False
        return values

    def _is_batched(self, x: Tensor, batch: tuple[Any, ...]) -> bool:
        """Where n = d [n] numbers may be one per coordinate; of fewer particles they are then not as many as those."""
        try:
            self._all(x, batch)
        except Exception:  # as in _first
            return False
        return True

    def _all(self, x: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return _checked(self.function(x, *batch), (len(x),), f"[n, d] = {tuple(x.shape)}")

    def _each(self, x: Tensor, batch: tuple[Any, ...]) -> Tensor:
        def one(particle: Tensor) -> Tensor:
            return _checked(self.function(particle, *batch), (), "one particle")

        # Dropout and the like: every particle its own draw.
        return torch.vmap(one, randomness="different")(x)


def _checked(values: Any, shape: tuple[int, ...], what: str) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"SVGD: log_prob must return a tensor; got {type(values).__name__}")
    if values.shape != shape:
        raise ValueError(f"SVGD: log_prob must return shape {shape} for {what}; got {tuple(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"SVGD: log_prob must return floating-point numbers; got {values.dtype}")
    return values


def _rows_alone(values: Tensor, x: Tensor) -> bool:
    """Whether each number depends on its own row alone, by two backward passes through one evaluation.

    So neither a random function nor rounding is mistaken for dependence: the first number's gradient by the other rows
    is exactly 0, and where the gradients of the numbers come in times powers of 2, each row's gradient goes out exactly
    as many times as large. The powers are dealt at random, from a generator of their own, and all different up to 8
    rows, so that no pattern of rows that depend on each other goes with them; higher ones would make rounding look like
    dependence. A row outside the support may make NaN of a zero gradient (0/0): it says nothing.
    """
    if not values.requires_grad or len(x) == 1:
        return True
    dealt = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    weights = 2.0 ** (dealt % 8).to(x.device)
    first, plain, weighted = (
        torch.autograd.grad(values, x, upstream.to(values.dtype), retain_graph=True, allow_unused=True)[0]
        for upstream in (torch.arange(len(x), device=x.device) == 0, torch.ones_like(weights), weights)
    )
    if first is None:
        return True
    if (first[1:].nan_to_num(0.0, 0.0, 0.0) != 0).any():
        return False
    expected = plain * weights.to(plain.dtype).unsqueeze(1)
    # Where a product was subnormal it is exact to its last digits only.
    off = (weighted - expected).abs() > 1e-3 * expected.abs().amax(1, keepdim=True)
    return not bool((off & weighted.isfinite() & expected.isfinite()).any())


def make_target(
    function: str, log_prob: Any, scores: Callable[..., Tensor] | None, batched: object
) -> Target:
    """What `log_prob`, `scores` and `batched` of a sampler mean; a `Target` in place of log_prob stays as it is."""
    if (log_prob is None) == (scores is None):
        came = "neither" if scores is None else "both"
        raise TypeError(f"{function}: one of log_prob and scores must be given; got {came}")
    if batched is not None and not isinstance(batched, bool):
        raise TypeError(f"{function}: batched must be None, True or False; got {type(batched).__name__}")
    if isinstance(log_prob, Target):
        return log_prob
    if log_prob is not None:
        if not callable(log_prob):
            raise TypeError(f"{function}: log_prob must be callable; got {type(log_prob).__name__}")
        return LogDensity(log_prob, batched)
    if not callable(scores):
        raise TypeError(f"{function}: scores must be callable; got {type(scores).__name__}")
    if batched is not None:
        raise ValueError(f"{function}: batched belongs to log_prob; got batched={batched} with scores")
    return ScoreFunction(scores)
