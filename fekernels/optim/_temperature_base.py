"""The base of the temperature schedules, and what they write with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fekernels._checks import FLOATS, INTEGERS, integer, number

Value = float | Tensor


def copied(value: Value) -> Value:
    if isinstance(value, (np.generic, np.ndarray)):
        # torch.load(weights_only=True) would not take NumPy's numbers from a state.
        return float(value.item())
    return value.detach().clone() if isinstance(value, Tensor) else value


def _values(function: str, name: str, given: Any) -> list[Value]:
    """Numbers or tensors of one element, one per group."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{function}: {name} must be a list; got {type(given).__name__}")
    for value in given:
        if isinstance(value, Tensor) and (value.numel() != 1 or value.dtype not in (*FLOATS, *INTEGERS)):
            raise ValueError(
                f"{function}: {name} must hold numbers or tensors of one; got {str(value.dtype)[6:]} of shape "
                f"{tuple(value.shape)}"
            )
    return [v if isinstance(v, Tensor) else number(function, name, v) for v in given]


def assign(group: dict[str, Any], key: str, value: Value) -> None:
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

# Those of each optimizer, in the order in which they were made: a group that joins asks them for its temperature.
_schedules: weakref.WeakKeyDictionary[Optimizer, list[weakref.ref[TemperatureScheduler]]] = (
    weakref.WeakKeyDictionary()
)


def join_schedules(optimizer: Optimizer) -> None:
    """Write into groups that are new what the schedules that have begun give the others."""
    made = [schedule() for schedule in _schedules.get(optimizer, ())]
    begun = [schedule for schedule in made if schedule is not None and schedule.last_epoch >= 0]
    for schedule in begun:
        schedule.check_groups()
    for schedule in begun:  # of a SequentialLR those that are over, and then the one whose turn it is
        schedule.join()


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
    as its initial one: of `LangevinAdam` and `SGLD` at once, of other optimizers at the next `step()`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; nothing is changed then.
    """

    # How the constructor and load_state_dict check a value: a function of (who asks, its name, the value).
    _checks: ClassVar[Mapping[str, Callable[[str, str, Any], Any]]] = {
        "burn_in": partial(integer, low=0),
        "last_epoch": partial(integer, low=-1),
        "_step_count": partial(integer, low=0),
        "base_temperatures": _values,
        "base_lrs": _values,
    }

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1, *, burn_in: int = 0) -> None:
        owner = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{owner}: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
            )
        zero = getattr(optimizer, "_zero", None)
        if zero is not None and zero() is not None:
            raise ValueError(
                f"{owner}: optimizer must be the ZeroRedundancyOptimizer itself, whose groups are copied over those of "
                "its optim at every step; got that one, in which no temperature would last"
            )
        last_epoch = self._checked("last_epoch", last_epoch)
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
        self.burn_in: int = self._checked("burn_in", burn_in)
        self.last_epoch = last_epoch
        self.optimizer = optimizer
        self.base_temperatures: list[Value] = []
        self.base_lrs: list[Value] = []
        self._last_temperature: list[Value] = []
        self._last_lr: list[Value] = []
        self._initial_step()
        self._register()

    def _register(self) -> None:
        living = [schedule for schedule in _schedules.get(self.optimizer, ()) if schedule() is not None]
        _schedules[self.optimizer] = [*living, weakref.ref(self)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def _checked(self, name: str, value: Any, method: str = "") -> Any:
        return self._checks[name](type(self).__name__ + method, name, value)

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
        """The temperatures last applied, one per group; tensors come as copies."""
        return [copied(value) for value in self._last_temperature]

    def get_lr(self) -> list[Value]:
        """Learning rates of the groups, which this schedule leaves as they are; tensors come as copies."""
        return [copied(group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Value]:
        """Learning rates of the groups as they are now, whoever set them; tensors come as copies."""
        return [copied(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def sampling(self) -> bool:
        """Whether the optimizer step of the current count is past the T = 0 phase: collect then."""
        return self.last_epoch >= self.burn_in

    def step(self, epoch: int | None = None) -> None:
        """Go to the next step, or to step `epoch`, and write its temperature into every group."""
        self._go_to(self.last_epoch + 1 if epoch is None else integer(type(self).__name__, "epoch", epoch, 0))
        self._step_count += 1

    def _update_lr(self, epoch: int | None = None) -> None:
        """What SequentialLR calls at a milestone, in place of a step."""
        self._go_to(self.last_epoch + 1 if epoch is None else epoch)

    def join(self) -> None:
        """Write the present temperature into the groups that have come since the last step."""
        self._go_to(self.last_epoch, first=len(self.base_temperatures))

    def _go_to(self, following: int, first: int = 0) -> None:
        """Write what step `following` has into the groups from number `first` on."""
        self.check_groups()
        for group in self.optimizer.param_groups[len(self.base_temperatures) :]:
            self.base_temperatures.append(self._base_of(group))
        values = self.get_temperature(following)
        self.last_epoch = following
        written = zip(self.optimizer.param_groups, values, self.base_temperatures, strict=True)
        for group, value, base in list(written)[first:]:
            group.setdefault("initial_temperature", copied(base))
            assign(group, "temperature", value)
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(copied(group.setdefault("initial_lr", copied(group["lr"]))))
        self._last_temperature = [copied(group["temperature"]) for group in self.optimizer.param_groups]
        self._last_lr = self.get_last_lr()

    def _base_of(self, group: dict[str, Any]) -> Value:
        """The initial temperature of a group that is new here."""
        given = group.get("initial_temperature", group["temperature"])
        for other, base in zip(self.optimizer.param_groups, self.base_temperatures, strict=False):
            if isinstance(given, Tensor) and other["temperature"] is given:  # what that one is at now
                return copied(base)
        return copied(given)

    def check_groups(self) -> None:
        """Raise where the optimizer's groups do not suit this schedule (any longer)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        own = {key: value for key, value in self.__dict__.items() if key != "optimizer"}
        return {key: list(value) if isinstance(value, list) else value for key, value in own.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`, and write the temperature of that step into the groups.

        Unlike torch's schedulers, so that the order of loading scheduler and optimizer does not matter.

        Raises:
            TypeError, ValueError: naming the key, what was expected and what came; nothing is changed then.
        """
        state, before = self._checked_state(state_dict), dict(self.__dict__)
        self.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in state.items()})
        try:
            if self.last_epoch >= 0:  # else it is a later part of a SequentialLR, and another's turn
                self._go_to(self.last_epoch)
        except Exception:  # of a schedule that cannot say its temperature at that step
            self.__dict__.update(before)
            raise

    def _checked_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state with every value checked as the constructor would; nothing of the schedule has changed yet."""
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
        checked = {
            key: self._checked(key, value, ".load_state_dict") if key in self._checks else value
            for key, value in state_dict.items()
        }
        have = len(self.optimizer.param_groups)
        came = max(len(checked[key]) for key in ("base_temperatures", "base_lrs") if key in checked)
        if came > have:
            raise ValueError(
                f"{owner}.load_state_dict: state_dict must be of at most {have} parameter groups; got {came}"
            )
        return checked

    def __repr__(self) -> str:
        return f"{type(self).__name__}(last_epoch={self.last_epoch}, burn_in={self.burn_in})"
