"""Parameter groups of the optimizers: their values, seeds and streams, anchors, and checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels._catalogue.random import LANGEVIN_NOISE
from fekernels._checks import FLOATS, INTEGERS, boolean, dense, number, one_of
from fekernels._runtime import backends
from fekernels._runtime.parts import local_tensor
from fekernels._runtime.pointer_table import check_dtype
from fekernels._runtime.ranks import draw_seed, has_ranks, seed_of_rank_0
from fekernels._runtime.torch_internals import never_traced
from fekernels.ops.noise_key import signed_seed
from fekernels.optim._anchors import Anchors, check_anchors, checked_anchor
from fekernels.optim._checkpoint import check_group, check_groups, check_kind, check_state, loaded_tensors
from fekernels.optim._rounding import lost_steps
from fekernels.optim._temperature_base import join_schedules
from fekernels.optim._zero import join_zero, zero_around
from fekernels.optim.noise_streams import Names, assign_streams, keep_names
from fekernels.optim.shared_noise import (
    COUNTS_ANEW,
    check_parts,
    decided_alone,
    have_decided,
    leave_undecided,
    may_make_noise,
    warn_of_shared_noise,
)

__all__ = ["LAST_SEED", "ParameterGroups"]

LAST_SEED = 1 << 63
CHOICES = ("auto", *backends.BACKENDS)


class ParameterGroups(Optimizer):
    """An optimizer without its step: parameter groups, seeds and streams, anchors and checkpoints."""

    _switches: tuple[str, ...] = ("maximize",)  # the group values that are bools
    _numbers: tuple[str, ...] = ("weight_decay", "prior_precision")  # those that are finite and not negative
    _kind: str  # whose groups a checkpoint has
    _purpose: int = LANGEVIN_NOISE  # of the noise
    _anchors: Anchors
    _drawn_seed: int | None  # until ranks have agreed on one
    _states: tuple[str, ...] = ("step",)  # that a parameter has from its first step on
    _optional_states: tuple[str, ...] = ("anchor",)
    _of_zero: bool = False  # made by ZeroRedundancyOptimizer, of one rank's part of the parameters
    _zero: Callable[[], Any] | None = None  # that one, whose groups are copied over these at every step
    _whole_streams: Mapping[Tensor, int] | None = None  # of all parameters, where these are a part of them
    _unfit_for_zero: str | None = COUNTS_ANEW
    _names: Names  # as they were given
    _warned: set[str]

    def __init__(self, params: Any, defaults: dict[str, Any], seed: int | None, anchor: Any) -> None:
        self._warned = set()
        zero = zero_around()
        if zero is not None:
            self._of_zero, self._zero = zero.world_size > 1, join_zero(self, zero)
        self._reset_caches()
        for key in ("foreach", "fused"):
            if defaults.get(key) is not None:
                defaults[key] = boolean(self._name, key, defaults[key])
        self._offer_unscaling(defaults)
        given, self._drawn_seed = seed, None
        if seed is None:
            seed = self._drawn_seed = draw_seed()
        defaults = {**defaults, "seed": signed_seed(self._name, seed), "anchor": None}
        self._anchors = Anchors()
        anchor = checked_anchor(self._name, anchor)
        if not isinstance(anchor, list):
            defaults["anchor"] = anchor
        self._check_group({**defaults, "params": []})
        super().__init__(self._checked_params(params), defaults)
        if isinstance(anchor, list):
            every = [param for group in self.param_groups for param in group["params"]]
            check_anchors(self._name, anchor, every)
            for group in self.param_groups:
                group["anchor"] = "given"
            for param, tensor in zip(every, anchor, strict=True):
                self._anchors.keep(param, tensor)
        if given is not None:
            warn_of_shared_noise(self, self._name)

    def _checked_params(self, params: Any) -> list[Any]:
        if isinstance(params, Tensor | dict | str) or not isinstance(params, Iterable):
            raise TypeError(
                f"{self._name}: params must be an iterable of tensors, of (name, tensor) pairs or of dicts of them; "
                f"got {type(params).__name__}"
            )
        entries = list(params)
        for entry in entries:
            if isinstance(entry, dict) and "params" in entry:
                entry["params"] = self._checked_entries(entry["params"])
        self._names = Names(entries)
        if not entries:
            raise ValueError(
                f"{self._name}: params must hold at least one parameter; got an empty parameter list"
            )
        return entries

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _reset_caches(self) -> None:
        """Forget what was kept of tensors and states that may be others now."""

    def _offer_unscaling(self, defaults: dict[str, Any]) -> None:
        """With fused=True, as in torch, GradScaler leaves the gradients scaled and hands grad_scale and found_inf over.

        Whoever clips in between then clips scaled gradients (Lightning refuses to), so it must be asked for.
        """
        self._step_supports_amp_scaling = defaults.get("fused") is True

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_anchors": self._anchors,
            "_drawn_seed": self._drawn_seed,
            "_names": self._names,
            "_of_zero": self._of_zero,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_anchors", Anchors())  # torch's load_state_dict comes by here too
        self.__dict__.setdefault("_drawn_seed", None)
        self.__dict__.setdefault("_names", Names(()))
        self.__dict__.setdefault("_warned", set())
        super().__setstate__(state)
        self._offer_unscaling(self.defaults)
        self._reset_caches()

    # Values.

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise where a group value is of a wrong type or out of its range; what only looks different is put right."""
        self._check_number(group, "lr", tensor=True)
        self._check_number(group, "temperature", tensor=True)
        for key in self._numbers:
            self._check_number(group, key)
        for key in self._switches:
            value = group[key]
            if value is not False and value is not True:  # 0 and 1 as torch.optim.Adam takes them
                group[key] = bool(value) if type(value) is int else boolean(self._name, key, value)
        for key in ("foreach", "fused"):
            if group.get(key) is not None:
                boolean(self._name, key, group[key])
        if group["backend"] is not None:
            one_of(self._name, "backend", group["backend"], CHOICES)
        check_parts(self._name, group, self._unfit_for_zero if self._of_zero else None)
        seed = group["seed"]
        if type(seed) is not int or not -LAST_SEED <= seed < LAST_SEED:
            group["seed"] = signed_seed(self._name, seed)

    def _check_number(self, group: dict[str, Any], key: str, tensor: bool = False) -> None:
        """A number (or, with ``tensor``, a one-element tensor) that is finite and not negative.

        NumPy's scalars become floats in the group: a checkpoint of them would not load with ``weights_only``.
        """
        value = group[key]
        if isinstance(value, Tensor) and tensor:
            self._check_scalar_tensor(group, key, value)
            return
        found = number(self._name, key, value)
        if type(value) is not float and type(value) is not int:
            group[key] = found

    def _check_scalar_tensor(
        self, group: dict[str, Any], key: str, value: Tensor, below: float = math.inf
    ) -> None:
        dense(self._name, key, value)
        if value.numel() != 1:
            raise ValueError(
                f"{self._name}: {key} must be a number or a tensor with one element; got shape {tuple(value.shape)}"
            )
        if value.dtype not in FLOATS and value.dtype not in INTEGERS:
            raise TypeError(
                f"{self._name}: {key} must be a number or a tensor of one, floating point or integer; got {value.dtype}"
            )
        if value.device.type != "cpu" and group["params"] and value.device != group["params"][0].device:
            raise ValueError(
                f"{self._name}: {key} must be on {group['params'][0].device} like its parameters; "
                f"got {value.device}"
            )
        if value.device.type == "cpu":  # reading another would stop the host
            number(self._name, key, value.item(), below=below)

    @staticmethod
    def _state_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
        """In float16 a square of a gradient below 2.4e-4 is 0 and steps are many times too long: float32 instead."""
        chosen: torch.dtype | None = group.get("state_dtype")
        return chosen or (torch.float32 if param.dtype == torch.float16 else param.dtype)

    # Groups.

    @never_traced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer.add_param_group``; its parameters take the next streams.

        Raises:
            TypeError: parameters that are not floating point.
            ValueError: parameters on several devices, or a hyperparameter out of its range.
        """
        if param_group.get("seed") is None:  # as ZeRO writes the arguments into its groups
            param_group.pop("seed", None)
        else:
            param_group["seed"] = signed_seed(self._name, param_group["seed"])
        given = checked_anchor(self._name, param_group.pop("anchor", self.defaults["anchor"]))
        param_group["params"] = self._checked_entries(param_group["params"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            self._check_params(group)
            self._assign_streams(group)
            group["anchor"] = "given" if isinstance(given, list) else given
            if isinstance(given, list):
                check_anchors(self._name, given, group["params"])
            self._warn_of_lost_steps(group, {param.dtype for param in group["params"]})
            join_schedules(self)
        except Exception:
            self.param_groups.pop()
            raise
        for i, param in enumerate(group["params"] if given is not None else ()):
            if isinstance(given, list):
                self._anchors.keep(param, given[i])
            else:
                self._anchors.keep_start(param)

    def _checked_entries(self, params: Any) -> Any:
        """What is given as a group's params, a list where torch's own messages would not say which of them is none."""
        if isinstance(params, Tensor | set | str) or not isinstance(params, Iterable):
            return params  # torch's add_param_group says so
        entries = list(params)
        for i, entry in enumerate(entries):
            if not isinstance(entry, Tensor | tuple):
                raise TypeError(
                    f"{self._name}: params[{i}] must be a tensor or a (name, tensor) pair; got {type(entry).__name__}"
                )
        return entries

    def _check_params(self, group: dict[str, Any]) -> None:
        for i, param in enumerate(group["params"]):
            dense(self._name, f"params[{i}]", param)
        devices = {param.device for param in group["params"]}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"{self._name}: params of one group must be on one device; got {names} (give each device a group)"
            )
        for i, param in enumerate(group["params"]):
            check_dtype(self._name, f"params[{i}]", param)

    def _assign_streams(self, group: dict[str, Any]) -> None:
        assign_streams(self._name, self.param_groups, group, self._names)

    def _add_streams(self, group: dict[str, Any]) -> None:
        """For parameters that were appended to a group's own list, which torch's optimizers step too."""
        if self._of_zero:  # whose checkpoint brought those of all parameters
            group["streams"] = list(range(len(group["params"])))
            return
        new = len(group["params"]) - len(group["streams"])
        if new < 0 or "param_names" in group:
            raise ValueError(
                f"{self._name}: streams must have {len(group['params'])} entries like params of the group; got "
                f"{len(group['streams'])} (parameters are added by add_param_group)"
            )
        self._check_params(group)
        first = 1 + max(stream for other in self.param_groups for stream in (-1, *other["streams"]))
        group["streams"] = [*group["streams"], *range(first, first + new)]

    def _anchor_of(self, group: dict[str, Any], i: int, state: dict[str, Any]) -> Tensor | None:
        kind, param = group["anchor"], group["params"][i]
        if kind is None:
            return None
        return local_tensor(self._anchors.of(self._name, f"params[{i}]", kind, param, state))

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """As every torch optimizer's; before the first step it holds the anchors and nothing else of a state."""
        saved = super().state_dict()
        self._anchors.save(self.param_groups, saved["state"])
        leave_undecided(saved["param_groups"], self._drawn_seed)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of one with fewer group values (``torch.optim.Adam``, ``AdamW``).

        What the checkpoint lacks (temperature, noise, seed, streams, anchors) stays as it was constructed, and so does
        a seed that is None in it: ranks had none in common yet. States keep the dtype that ``state_dtype`` asks for.

        Raises:
            TypeError, ValueError: a checkpoint of another kind of optimizer, of other groups or shapes, or with values
                that no step could use. Nothing has changed then.
        """
        function, checked = f"{self._name}.load_state_dict", list[dict[str, Any]]()

        def check(_: Optimizer, loading: dict[str, Any]) -> dict[str, Any]:
            check_groups(function, loading)
            checked.append(decided_alone(loading))
            self._check_checkpoint(checked[0])
            return checked[0]

        check_groups(function, state_dict)
        before = [dict(group) for group in self.param_groups]
        own = {param: dict(state) for param, state in self.state.items()}
        # After those of the user, which may change everything.
        last = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        (state_dict,) = checked
        saved = state_dict["state"]
        for group, old, saved_group in zip(
            self.param_groups, before, state_dict["param_groups"], strict=True
        ):
            for key, value in old.items():
                group.setdefault(key, value)
            keep_names(group, old, self._names)
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                state = self.state[param] if param in self.state else {}
                if "step" in state:
                    dtype = self._state_dtype(group, param)
                    state |= loaded_tensors(self._name, param, saved[index], own.get(param, {}), dtype)
                    self._restore_numbers(param, state, saved[index])
                self._anchors.load(param, state, saved.get(index, {}))
                if state.keys() == {"anchor"}:  # saved before the first step
                    del self.state[param]
            self._restore_group(group)
        if have_decided(self._drawn_seed, self.param_groups, state_dict):
            self.defaults["seed"], self._drawn_seed = self.param_groups[0]["seed"], None
        self._reset_caches()

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        function = f"{self._name}.load_state_dict"
        check_groups(function, state_dict)
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        counts = [[len(group["params"]) for group in each] for each in (groups, saved_groups)]
        if counts[0] != counts[1]:
            return  # torch says so
        check_kind(function, self._kind, saved_groups)
        taken = set()
        number_of = 0
        for group, saved_group in zip(groups, saved_groups, strict=True):
            merged = {**group, **saved_group, "params": []}
            self._check_group(merged)
            check_group(function, merged, len(group["params"]))
            for stream in merged["streams"]:
                if (merged["seed"], stream) in taken:
                    raise ValueError(
                        f"{function}: streams must be different for parameters of one seed; got {stream} twice"
                    )
                taken.add((merged["seed"], stream))
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                state = state_dict["state"].get(index, {})
                check_state(function, f"parameter {number_of}", param, state, self._states)
                number_of += 1

    def _restore_group(self, group: dict[str, Any]) -> None:
        """For what earlier releases kept in groups."""

    def _restore_numbers(self, param: Tensor, state: dict[str, Any], saved: dict[str, Any]) -> None:
        """States that are numbers of the optimizer's own, whatever dtype its tensors have."""

    # Seeds and warnings.

    def _agree_on_seed(self) -> None:
        """Before the first noise, ranks of a process group take the seed that rank 0 drew.

        Not at construction: that would make a collective of it, also for one that trains cold on a single rank, and the
        group may not exist yet. Groups that were given a seed, or loaded one, keep it.
        """
        if not has_ranks():
            return
        groups = [group for group in self.param_groups if group["seed"] == self._drawn_seed]
        if any(map(may_make_noise, groups)):
            seed, self._drawn_seed = seed_of_rank_0(groups[0]["seed"]), None
            for group in (self.defaults, *groups):
                group["seed"] = seed

    def _warn_of_lost_steps(self, group: dict[str, Any], dtypes: Set[torch.dtype]) -> None:
        for message in lost_steps(group, dtypes):
            self._warn_once(message)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            # Beyond add_param_group or step, and what torch wraps around both.
            warnings.warn(f"{self._name}: {message}", stacklevel=5)
