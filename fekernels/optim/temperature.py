"""Temperature schedules: what `torch.optim.lr_scheduler` is to `lr`, for `group["temperature"]`.

Every schedule here is a closed form of the step count, never a recursion on the last value. A recursion
cannot leave T = 0 again (zero times anything is zero), and burn-in and exploration phases are exactly T = 0.
So one scheduler owns the temperature of its optimizer; `burn_in` covers the common chain "no noise first,
then this schedule".
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fekernels._checks import boolean, integer, number

__all__ = [
    "ConstantTemperature",
    "CosineTemperature",
    "CyclicalTemperature",
    "ExponentialTemperature",
    "LambdaTemperature",
    "TemperatureScheduler",
]

Value = float | Tensor


def _copied(value: Value) -> Value:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _assign(group: dict[str, Any], key: str, value: Value) -> None:
    """Write into an existing tensor in place, so a captured CUDA graph or a compiled step sees the change."""
    current = group[key]
    if not isinstance(current, Tensor):
        group[key] = float(value)
    elif isinstance(value, Tensor):
        current.copy_(value)
    else:
        current.fill_(value)


# What an LRScheduler keeps and no temperature depends on: states saved by earlier releases lack some of it.
BOOKKEEPING = {"_step_count", "_last_lr", "base_lrs"}


class TemperatureScheduler(LRScheduler):
    """Base of the schedules: a `torch.optim.lr_scheduler.LRScheduler` that moves `temperature` and leaves `lr` alone.

    So whatever steps, saves and loads torch's schedulers (Lightning, Accelerate, `SequentialLR`) does the same with
    these, beside a scheduler of `lr` or without one. `get_last_lr` and `get_lr` give the groups' `lr` as it is,
    `get_last_temperature` and `get_temperature` what this schedule makes.

    Call `step()` once after every `optimizer.step()`. The temperature of step k (k = 0 for the first) is a
    function of k and of the group's `initial_temperature`, which the constructor records as the temperature
    it finds. Constructing a scheduler applies its step 0 at once. A subclass gives `temperature_at`.

    Args:
        optimizer: an optimizer whose groups have a "temperature": `LangevinAdam`, `SGLD`. A one-element
            tensor is written in place and without a host sync; a float is replaced.
        last_epoch: -1 starts anew. Anything else resumes, and needs "initial_temperature" in every group, as
            an optimizer's loaded `state_dict` has it.
        burn_in: that many steps at T = 0 come first, then the schedule runs from its own beginning. From a
            cold start the preconditioner is one gradient old and the first kicks can be enormous; a few
            hundred steps without noise avoid that.

    A group that joins later by `add_param_group` joins the schedule, with the temperature it was added with
    as its initial one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; nothing is changed then.
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1, *, burn_in: int = 0) -> None:
        owner = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{owner}: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
            )
        last_epoch = integer(owner, "last_epoch", last_epoch, -1)
        for index, group in enumerate(optimizer.param_groups):
            if "temperature" not in group:
                raise ValueError(
                    f"{owner}: optimizer must have a 'temperature' in every parameter group, as "
                    f"fekernels.LangevinAdam has; got {type(optimizer).__name__} with none in group {index}"
                )
            if last_epoch != -1 and "initial_temperature" not in group:
                raise ValueError(
                    f"{owner}: last_epoch must be -1 unless the groups hold 'initial_temperature' (load the "
                    f"optimizer's state_dict first); got last_epoch={last_epoch} and none in group {index}"
                )
        # LRScheduler's own constructor would wrap optimizer.step, which no schedule of the temperature needs.
        self.burn_in = integer(owner, "burn_in", burn_in, 0)
        self.last_epoch = last_epoch
        self.optimizer = optimizer
        self.base_temperatures: list[Value] = []
        self.base_lrs: list[Value] = []
        self._last_temperature: list[Value] = []
        self._last_lr: list[Value] = []
        self._initial_step()

    def _initial_step(self) -> None:
        self._step_count = 0
        self.step()

    def temperature_at(self, step: int, initial: Value, group: int) -> Value:
        """Temperature of parameter group `group` at the schedule's own step, 0 the first after `burn_in`."""
        raise NotImplementedError(f"{type(self).__name__} must define temperature_at(step, initial, group)")

    def get_temperature(self, step: int | None = None) -> list[Value]:
        """Temperature of every group at `step` (default: the current one), without applying it."""
        at = self.last_epoch if step is None else integer(type(self).__name__, "step", step, 0)
        bases = self.base_temperatures
        if at < self.burn_in:
            return [0.0 * base for base in bases]
        return [self.temperature_at(at - self.burn_in, base, index) for index, base in enumerate(bases)]

    def get_last_temperature(self) -> list[Value]:
        """The temperatures last applied, one a group; tensors come as copies."""
        return [_copied(value) for value in self._last_temperature]

    def get_lr(self) -> list[Value]:
        """Learning rates of the groups, which this schedule leaves as they are; tensors come as copies."""
        return [_copied(group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Value]:
        """Learning rates of the groups as they are now, whoever set them; tensors come as copies."""
        return [_copied(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def sampling(self) -> bool:
        """Whether the optimizer step of the current count is past the T = 0 phase: collect then."""
        return self.last_epoch >= self.burn_in

    def step(self, epoch: int | None = None) -> None:
        """Go to the next step, or to step `epoch`, and write its temperature into every group."""
        self._go_to(self.last_epoch + 1 if epoch is None else integer(type(self).__name__, "epoch", epoch, 0))
        self._step_count += 1

    def _go_to(self, following: int) -> None:
        self._check_groups()
        for group in self.optimizer.param_groups[len(self.base_temperatures) :]:
            self.base_temperatures.append(_copied(group.get("initial_temperature", group["temperature"])))
        values = self.get_temperature(following)
        self.last_epoch = following
        for group, value, base in zip(
            self.optimizer.param_groups, values, self.base_temperatures, strict=True
        ):
            group.setdefault("initial_temperature", _copied(base))
            _assign(group, "temperature", value)
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(_copied(group.setdefault("initial_lr", _copied(group["lr"]))))
        self._last_temperature = [_copied(group["temperature"]) for group in self.optimizer.param_groups]
        self._last_lr = self.get_last_lr()

    def _check_groups(self) -> None:
        """Raise where the optimizer's groups do not suit this schedule (any longer)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        own = {key: value for key, value in self.__dict__.items() if key != "optimizer"}
        return {key: list(value) if isinstance(value, list) else value for key, value in own.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`, and write the temperature of that step into the groups.

        Unlike torch's schedulers, so that the order of loading scheduler and optimizer does not matter.
        """
        self._check_state(state_dict)
        self.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in state_dict.items()})
        self._go_to(max(self.last_epoch, 0))

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        owner = type(self).__name__
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"{owner}.load_state_dict: state_dict must be a dict; got {type(state_dict).__name__}"
            )
        if state_dict.keys() | BOOKKEEPING != self.state_dict().keys():
            raise ValueError(
                f"{owner}.load_state_dict: state_dict must have the keys {sorted(self.state_dict())}; "
                f"got {sorted(state_dict)}"
            )
        have, came = len(self.optimizer.param_groups), len(state_dict["base_temperatures"])
        if came > have:
            raise ValueError(
                f"{owner}.load_state_dict: state_dict must be of at most {have} parameter groups; got {came}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(last_epoch={self.last_epoch}, burn_in={self.burn_in})"


class ConstantTemperature(TemperatureScheduler):
    """The group's initial temperature after `burn_in` steps at T = 0.

    Args:
        optimizer, last_epoch, burn_in: as for `TemperatureScheduler`.
    """

    def temperature_at(self, step: int, initial: Value, group: int) -> Value:
        return initial


class ExponentialTemperature(TemperatureScheduler):
    """T_k = T_0 gamma^k: annealing for gamma < 1, heating for gamma > 1.

    Args:
        optimizer, last_epoch, burn_in: as for `TemperatureScheduler`.
        gamma: factor of one step, > 0.
    """

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1, *, burn_in: int = 0) -> None:
        self.gamma = number("ExponentialTemperature", "gamma", gamma, above=0.0)
        super().__init__(optimizer, last_epoch, burn_in=burn_in)

    def temperature_at(self, step: int, initial: Value, group: int) -> Value:
        return initial * self.gamma**step


class CosineTemperature(TemperatureScheduler):
    """T_k = eta_min + (T_0 - eta_min) (1 + cos(pi k / T_max)) / 2 for k <= T_max, then eta_min.

    torch's CosineAnnealingLR rises again after T_max. A cooled run that heats up by itself is never what was
    meant, so this one stays; `CyclicalTemperature` is the periodic schedule.

    Args:
        optimizer, last_epoch, burn_in: as for `TemperatureScheduler`.
        T_max: steps from the initial temperature to eta_min, >= 1.
        eta_min: the final temperature, >= 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int,
        eta_min: float = 0.0,
        last_epoch: int = -1,
        *,
        burn_in: int = 0,
    ) -> None:
        self.T_max = integer("CosineTemperature", "T_max", T_max, 1)
        self.eta_min = number("CosineTemperature", "eta_min", eta_min)
        super().__init__(optimizer, last_epoch, burn_in=burn_in)

    def temperature_at(self, step: int, initial: Value, group: int) -> Value:
        share = (1 + math.cos(math.pi * min(step, self.T_max) / self.T_max)) / 2
        return self.eta_min + (initial - self.eta_min) * share


class CyclicalTemperature(TemperatureScheduler):
    """Cyclical sampling (Zhang et al. 2020, "Cyclical stochastic gradient MCMC", arXiv:1902.03932).

    With r = (k mod cycle_length) / cycle_length: T = 0 while r < proportion_exploration, the initial
    temperature afterwards; and, with anneal_lr, lr = lr_min + (lr_0 - lr_min) (1 + cos(pi r)) / 2 in the same
    cycle. The large steps at T = 0 look for a new mode, the small ones that follow sample it.

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
        proportion_exploration: the paper's beta, in [0, 1). 0.8 is its usual choice.
        anneal_lr: also drive `lr`, by the paper's cosine. Turn it off where an lr scheduler of torch owns
            `lr`.
        lr_min: where the cosine ends, >= 0. The paper's 0 makes the last steps of a cycle stand nearly still.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_length: int,
        proportion_exploration: float = 0.8,
        anneal_lr: bool = True,
        lr_min: float = 0.0,
        last_epoch: int = -1,
        *,
        burn_in: int = 0,
    ) -> None:
        owner = "CyclicalTemperature"
        self.cycle_length = integer(owner, "cycle_length", cycle_length, 1)
        self.proportion_exploration = number(
            owner, "proportion_exploration", proportion_exploration, below=1.0
        )
        self.anneal_lr = boolean(owner, "anneal_lr", anneal_lr)
        self.lr_min = number(owner, "lr_min", lr_min)
        super().__init__(optimizer, last_epoch, burn_in=burn_in)

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
        return super().sampling and self.position >= self.proportion_exploration

    def _position(self, step: int) -> float:
        return (step % self.cycle_length) / self.cycle_length

    def temperature_at(self, step: int, initial: Value, group: int) -> Value:
        return initial if self._position(step) >= self.proportion_exploration else 0.0 * initial

    def get_lr(self, step: int | None = None) -> list[Value]:
        """Learning rate of every group at `step` (default: the current one), without applying it."""
        at = self.last_epoch if step is None else integer("CyclicalTemperature", "step", step, 0)
        share = (1 + math.cos(math.pi * self._position(max(at - self.burn_in, 0)))) / 2
        return [self.lr_min + (base - self.lr_min) * share for base in self.base_lrs]

    def _go_to(self, following: int) -> None:
        super()._go_to(following)
        if self.anneal_lr:
            for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                _assign(group, "lr", lr)
            self._last_lr = self.get_last_lr()


class LambdaTemperature(TemperatureScheduler):
    """T_k = T_0 f(k), for any schedule.

    Args:
        optimizer, last_epoch, burn_in: as for `TemperatureScheduler`.
        temperature_lambda: f, from the schedule's step (an int, from 0) to a factor >= 0; or a list of them,
            one a group.

    Functions are not saved by `state_dict`; of a callable object its `__dict__` is, as torch's LambdaLR does.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        temperature_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
        *,
        burn_in: int = 0,
    ) -> None:
        given: Any = temperature_lambda
        functions: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        for function in functions:
            if not callable(function):
                raise TypeError(
                    "LambdaTemperature: temperature_lambda must be a callable or a list of them; "
                    f"got {type(function).__name__}"
                )
        self.temperature_lambdas: list[Callable[[int], float]] = functions
        self._one_for_all = not isinstance(given, (list, tuple))
        super().__init__(optimizer, last_epoch, burn_in=burn_in)

    def temperature_at(self, step: int, initial: Value, group: int) -> Value:
        function = self.temperature_lambdas[0 if self._one_for_all else group]
        factor = function(step)
        if isinstance(factor, Tensor) and factor.numel() == 1:
            factor = factor.item()
        return initial * number("LambdaTemperature", f"factor of step {step}", factor)

    def _check_groups(self) -> None:
        functions, groups = len(self.temperature_lambdas), len(self.optimizer.param_groups)
        if not self._one_for_all and functions != groups:
            raise ValueError(
                "LambdaTemperature: temperature_lambda must have one function a parameter group "
                f"({groups}); got {functions}"
            )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["temperature_lambdas"] = [
            None
            if isinstance(f, (types.FunctionType, types.BuiltinFunctionType))
            else dict(getattr(f, "__dict__", {}))
            for f in self.temperature_lambdas
        ]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._check_state(state_dict)
        saved = state_dict["temperature_lambdas"]
        if len(saved) != len(self.temperature_lambdas):
            raise ValueError(
                "LambdaTemperature.load_state_dict: state_dict must hold "
                f"{len(self.temperature_lambdas)} functions; got {len(saved)}"
            )
        for function, attributes in zip(self.temperature_lambdas, saved, strict=True):
            if attributes:
                function.__dict__.update(attributes)
        super().load_state_dict({**state_dict, "temperature_lambdas": self.temperature_lambdas})
