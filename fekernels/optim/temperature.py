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
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fekernels._checks import boolean, integer, number
from fekernels.optim._cyclical_temperature import CyclicalTemperature
from fekernels.optim._temperature_base import TemperatureScheduler, Value

__all__ = [
    "ConstantTemperature",
    "CosineTemperature",
    "CyclicalTemperature",
    "ExponentialTemperature",
    "LambdaTemperature",
    "TemperatureScheduler",
]


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

    _checks = {**TemperatureScheduler._checks, "gamma": partial(number, above=0.0)}

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1, *, burn_in: int = 0) -> None:
        self.gamma: float = self._checked("gamma", gamma)
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

    _checks = {**TemperatureScheduler._checks, "T_max": partial(integer, low=1), "eta_min": number}

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int,
        eta_min: float = 0.0,
        last_epoch: int = -1,
        *,
        burn_in: int = 0,
    ) -> None:
        self.T_max: int = self._checked("T_max", T_max)
        self.eta_min: float = self._checked("eta_min", eta_min)
        super().__init__(optimizer, last_epoch, burn_in=burn_in)

    def temperature_at(self, step: int, initial: Value, group: int) -> Value:
        share = (1 + math.cos(math.pi * min(step, self.T_max) / self.T_max)) / 2
        return self.eta_min + (initial - self.eta_min) * share


def _attributes(function: str, name: str, given: Any) -> list[dict[str, Any] | None]:
    """What `LambdaTemperature` saves of each of its functions."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{function}: {name} must be a list; got {type(given).__name__}")
    for value in given:
        if value is not None and not isinstance(value, dict):
            raise TypeError(f"{function}: {name} must hold dicts or None; got {type(value).__name__}")
    return list(given)


class LambdaTemperature(TemperatureScheduler):
    """T_k = T_0 f(k), for any schedule.

    Args:
        optimizer, last_epoch, burn_in: as for `TemperatureScheduler`.
        temperature_lambda: f, from the schedule's step (an int, from 0) to a factor >= 0; or a list of them,
            one per group.

    Functions are not saved by `state_dict`; of a callable object its `__dict__` is, as torch's LambdaLR does.
    """

    _checks = {**TemperatureScheduler._checks, "_one_for_all": boolean}

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

    def check_groups(self) -> None:
        functions, groups = len(self.temperature_lambdas), len(self.optimizer.param_groups)
        if not self._one_for_all and functions != groups:
            raise ValueError(
                "LambdaTemperature: temperature_lambda must have one function per parameter group "
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
        saved = self._checked_state(state_dict)["temperature_lambdas"]
        saved = _attributes("LambdaTemperature.load_state_dict", "temperature_lambdas", saved)
        if len(saved) != len(self.temperature_lambdas):
            raise ValueError(
                "LambdaTemperature.load_state_dict: state_dict must hold "
                f"{len(self.temperature_lambdas)} functions; got {len(saved)}"
            )
        for function, attributes in zip(self.temperature_lambdas, saved, strict=True):
            if attributes:
                function.__dict__.update(attributes)
        super().load_state_dict({**state_dict, "temperature_lambdas": self.temperature_lambdas})
