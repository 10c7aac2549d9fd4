"""The step of the optimizers: rows of tensors, cached pointer tables, and one kernel call per group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from fekernels._checks import integer
from fekernels._runtime import backends
from fekernels._runtime.host import host
from fekernels._runtime.parts import local_tensor
from fekernels._runtime.pointer_table import LAST_FLOAT32_STEP, Row, check_dtype, count_problem, step_numbers
from fekernels._runtime.torch_internals import has_step_hooks, profiles
from fekernels.ops.noise_key import COUNTERS
from fekernels.ops.optimizers.parameter_rows import check_row, check_unit
from fekernels.ops.optimizers.step import StepOperation, StepSettings
from fekernels.optim._shards import local_gradient, sharded_rows
from fekernels.optim._table_cache import KeptSettings, StateSnapshot, TableCache
from fekernels.optim.parameter_groups import LAST_SEED, ParameterGroups

__all__ = ["Loss", "TableOptimizer", "traced_number"]

Loss = TypeVar("Loss")  # what a closure returns, and a step with it
Counter = Callable[[dict[str, Any]], Tensor | None]  # a parameter's state -> what counts its steps


def _step_of(state: dict[str, Any]) -> Tensor | None:
    return state.get("step")


def traced_number(value: float, device: torch.device | str = "cpu") -> Tensor:
    """A number of a compiled step as a tensor of its graph: a schedule that moves it then compiles nothing again.

    A product with a tensor is what torch.compile takes a float into without fixing its value.
    """
    return torch.ones((), dtype=torch.float64, device=device) * value


class TableOptimizer(ParameterGroups):
    """An optimizer whose step is one kernel call per parameter group, over a cached table of pointers."""

    _operation: ClassVar[StepOperation]
    _caches: dict[int, TableCache]
    _kept: dict[int, KeptSettings]
    _snapshot: StateSnapshot | None
    _steps_bound: int

    def _reset_caches(self) -> None:
        self._caches, self._kept = {}, {}
        self._snapshot = None
        self._steps_bound = -1

    # Subclasses say what their states, rows and settings hold.

    def _init_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _row(self, group: dict[str, Any], row: dict[str, Any], state: dict[str, Any]) -> Row:
        return Row(**row)

    def _own_settings(self, group: dict[str, Any], moving: bool) -> dict[str, Any]:
        """What is not a group value of the setting's own name."""
        return {}

    def _numbers_move(self, group: dict[str, Any]) -> bool:
        """Whether numbers of a compiled step that kernels take as such are to be tensors of its graph."""
        return False

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's, with which it wraps a class's ``step``, for whoever looks: a profiler, hooks, torch.compile.

        Else the profiler's record, which nobody takes, is an eighth of the step of a small network: 28 us of 230.
        """
        shown = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: TableOptimizer, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or profiles() or has_step_hooks(self):
                return shown(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``, in 1 us in place of 10 where no profiler takes a record of it."""
        if not set_to_none or torch.compiler.is_compiling() or profiles():
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss, as for every torch optimizer.

        Raises:
            TypeError: a complex gradient.
            ValueError: a sparse gradient, or a group value out of its range. Nothing has changed then.
            RuntimeError: a parameter that has counted its steps to the end.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            for group in self.param_groups:
                self._step_lists(group)
            return loss
        for index, group, backend, cache, settings in self._ready():
            try:
                if cache.rows:
                    self._caches.pop(index, None)
                    if self._operation.seen():
                        self._step_lists(group)
                    else:
                        self._operation.step_rows(cache.rows, settings, backend)
                    continue
                self._keep(self._caches, index, cache)
                if cache.tables:
                    self._operation.step_tables(cache.tables, settings, backend)
            except RuntimeError:
                self._name_last_step(group, cache)
                raise
            cache.count_write()
            cache.copies.clear()
        return loss

    def _name_last_step(
        self, group: dict[str, Any], cache: TableCache, name: str = "step", counter: Counter = _step_of
    ) -> None:
        """A kernel that refuses a step too many knows neither optimizer nor parameter."""
        live = set(map(id, cache.live))
        for i, param in enumerate(group["params"]):
            step = counter(self.state[param]) if id(param) in live and param.device.type == "cpu" else None
            problem = None if step is None else count_problem(step)
            if problem is not None:
                raise RuntimeError(f"{self._name}: {name} of params[{i}] {problem}") from None

    @staticmethod
    def _keep(caches: dict[Any, Any], key: Any, cache: TableCache) -> None:
        """For the next step, where it can be that one's too."""
        if cache.lasting:
            caches[key] = cache
        else:
            caches.pop(key, None)

    def _ready(self) -> list[tuple[int, dict[str, Any], str, TableCache, StepSettings]]:
        """What each group's step takes. All checks are made here, before the first group moves."""
        if self._drawn_seed is not None:
            self._agree_on_seed()
        work = []
        snapshot = self._snapshot is not None and self._snapshot.holds(self.state)
        for index, group in enumerate(self.param_groups):
            kept = self._kept.get(index)
            if kept is None or not kept.hold(group):
                kept = None
                self._check_group(group)
            if not group["params"]:
                continue
            if len(group["streams"]) != len(group["params"]):
                self._add_streams(group)
            backend = backends.choose(group["params"][0].device.type, group["backend"])
            by_rows = backends.takes_rows(backend)
            cache = self._caches.get(index)
            if cache is not None and (by_rows or not self._has_states(group, cache)):
                cache = None
            if cache is None or not cache.point_to_gradients(group["params"], self.state, snapshot):
                self._check_gradients(group)
                cache = self._build(group, by_rows)
            self._warn_of_lost_steps(group, cache.dtypes)
            if kept is None:
                kept = self._kept[index] = KeptSettings(group, self.defaults, self._settings(group))
            else:
                kept.settings.grad_scale, kept.settings.found_inf = self._amp(group)
            work.append((index, group, backend, cache, kept.settings))
        if not snapshot:
            self._snapshot = StateSnapshot(self.state)
        if any(group["params"][0].device.type != "cpu" for _, group, *_ in work):
            self._count_step()
        if len(work) > 1:  # of one group, the kernel itself refuses a step too many before anything moves
            self._check_steps([(group, backend, cache) for _, group, backend, cache, _ in work])
        return work

    def _check_steps(
        self,
        work: Sequence[tuple[dict[str, Any], str, TableCache]],
        name: str = "step",
        counter: Counter = _step_of,
    ) -> None:
        """RuntimeError where any group's parameters have counted to the end; on a GPU the host counts."""
        for group, backend, cache in work:
            if group["params"][0].device.type != "cpu":
                continue
            try:
                if backend == backends.HOST and not cache.rows:
                    for table in cache.tables:
                        backends.native_op("check_steps")(table.table)
                else:
                    counted = (counter(self.state[param]) for param in cache.live)
                    step_numbers([step for step in counted if step is not None])
            except RuntimeError:
                self._name_last_step(group, cache, name, counter)
                raise

    def _has_states(self, group: dict[str, Any], cache: TableCache) -> bool:
        """Whether the rows of ``cache`` are those of these group values, and point at all states that a step takes."""
        return (
            cache.amsgrad == group.get("amsgrad", False)
            and cache.streams == group["streams"]
            and cache.anchor == group["anchor"]
        )

    def _check_gradients(self, group: dict[str, Any]) -> None:
        for i, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.is_complex():
                raise TypeError(f"{self._name}: the gradient of params[{i}] must be real; got {grad.dtype}")
            if grad.layout is not torch.strided:
                raise ValueError(
                    f"{self._name}: the gradient of params[{i}] must be dense; got layout {grad.layout} "
                    "(sparse gradients: torch.optim.SparseAdam)"
                )
            check_dtype(self._name, f"the gradient of params[{i}]", grad)
            if grad.device != param.device:
                raise ValueError(
                    f"{self._name}: the gradient of params[{i}] must be on {param.device}; got {grad.device}"
                )
        self._check_params(group)

    def _rows(self, group: dict[str, Any]) -> list[tuple[int, Row]]:
        """The tensors of what has a gradient, each with the number of its parameter."""
        rows = []
        for i, (param, stream) in enumerate(zip(group["params"], group["streams"], strict=True)):
            if param.grad is None:
                continue
            stream = integer(self._name, f"streams[{i}]", stream, 0, COUNTERS)
            state = self._state_of(group, param, i)
            if state["step"].device != param.device:
                state["step"] = state["step"].to(param.device)
            shared = {
                "param": local_tensor(param),
                "grad": local_gradient(self._name, param.grad, param),
                "step": state["step"],
                "stream": stream,
                "anchor": self._anchor_of(group, i, state),
            }
            rows.append((i, self._row(group, shared, state)))
        return rows

    def _build(self, group: dict[str, Any], by_rows: bool) -> TableCache:
        rows, states = [], []
        for i, row in self._rows(group):
            check_row(self._name, f"params[{i}]", row, self._operation.names)
            rows += sharded_rows(self._name, group["params"][i], row)
            states.append(self.state[group["params"][i]])
        self._anchors.prune(self.param_groups)
        return TableCache(group, states, rows, by_rows, None if by_rows else host())

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Fill the operator's lists and that of a seed. The name and the lists are what torch.compile looks for."""
        *tensors, streams, shards, seed = lists
        self._traced_seed(group, seed)
        if len(group["streams"]) != len(group["params"]):
            self._add_streams(group)
        self._check_gradients(group)
        self._warn_of_lost_steps(group, {param.dtype for param in group["params"]})
        rows = [
            (i, part)
            for i, row in self._rows(group)
            for part in sharded_rows(self._name, group["params"][i], row)
        ]
        for i, row in rows:
            for name, values in zip(self._operation.tensors, tensors, strict=True):
                tensor = getattr(row, name)
                if tensor is not None:
                    values.append(tensor)
            if row.noise_unit is not None:
                check_unit(self._name, f"params[{i}]", row.noise_unit)
            streams.append(row.stream)
            numel = row.param.numel()
            shards.extend(row.shard or (0, max(numel, 1), max(numel, 1)))
        return self._numbers_move(group)

    def _step_lists(self, group: dict[str, Any]) -> None:
        """The step as one call of the operator, for whoever is to see it: torch.compile, and modes of torch."""
        operation = self._operation
        lists: list[list[Any]] = [[] for _ in operation.lists]
        seed: list[int] = []
        moving = self._init_group(group, *lists, seed)
        settings = self._settings(group, moving)
        if seed:
            settings.seed = seed[0]
        given = [getattr(settings, name) for name in operation.arguments]
        late = [getattr(settings, name) for name in operation.late]
        getattr(torch.ops.fekernels, operation.name)(*lists, *given, group["backend"], *late)

    def _settings(self, group: dict[str, Any], moving: bool = False) -> StepSettings:
        operation = self._operation
        values: dict[str, Any] = {"seed": group["seed"]}
        values["grad_scale"], values["found_inf"] = self._amp(group)
        values["lr"], values["lr_tensor"] = self._scalar(group, "lr")
        values["temperature"], values["temperature_tensor"] = self._scalar(group, "temperature")
        for name in operation.numbers:
            if name in group:
                values[name] = float(group[name])
        for name in operation.switches:
            values[name] = bool(group[name])
        values.update(self._own_settings(group, moving))
        return operation.settings(**values)

    def _state_of(self, group: dict[str, Any], param: Tensor, i: int) -> dict[str, Any]:
        """The state of params[i], made now if it is the first step.

        Raises:
            TypeError: a state that is no tensor. ValueError: one that is missing. Somebody else has set it then.
        """
        state = self.state[param]
        if not any(key in state for key in self._states):
            self._init_state(group, param, state)
        for key in self._states:
            if key not in state:
                raise ValueError(
                    f"{self._name}: the state of params[{i}] must have {key}; got {', '.join(state)}"
                )
        for key, value in state.items():
            if key == "anchor" and value is None:  # which is as good as none, and put back
                continue
            if not isinstance(value, Tensor) and key in (*self._states, *self._optional_states):
                raise TypeError(
                    f"{self._name}: {key} of params[{i}] must be a tensor; got {type(value).__name__}"
                )
            if key == "step" and value.is_meta and not param.is_meta:
                raise ValueError(
                    f"{self._name}: step of params[{i}] must hold a value; got a tensor on the meta device"
                )
        return state

    def _count_step(self) -> None:
        """Nobody may read a GPU's step counter each time: count calls, from one reading after a load."""
        if self._steps_bound < 0:
            steps = [state["step"] for state in self.state.values() if "step" in state]
            capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            self._steps_bound = 0 if capturing or not steps else int(max(float(step) for step in steps))
        self._steps_bound += 1
        if self._steps_bound > LAST_FLOAT32_STEP:
            raise RuntimeError(f"{self._name}: step must stay below 2^24, where its float32 counter ends")

    def _scalar(self, group: dict[str, Any], key: str) -> tuple[float, Tensor | None]:
        """A group value that may be a tensor: (value, None) where the host has it, else (0, tensor)."""
        value, device = group[key], group["params"][0].device
        if not isinstance(value, Tensor):
            if not torch.compiler.is_compiling():
                return float(value), None
            # Cold and hot steps have different states. The graph does not know NumPy's numbers, which it takes as
            # tensors: they count as hot.
            if key == "temperature" and not isinstance(value, (np.generic, np.ndarray)) and value == 0:
                return 0.0, None
            return 0.0, traced_number(value, device)
        if value.device.type == "cpu" and device.type != "cpu":
            return float(value), None
        return 0.0, value if value.dtype in (torch.float32, torch.float64) else value.float()

    def _amp(self, group: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """GradScaler's grad_scale and found_inf, where it has set them."""
        device = group["params"][0].device
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return (
            scale.to(device, torch.float32) if isinstance(scale, Tensor) else None,
            found.to(device, torch.float32) if isinstance(found, Tensor) else None,
        )

    def _traced_seed(self, group: dict[str, Any], seed: list[int]) -> None:
        """For a step that may be compiled: fill ``seed`` where it is not to take the group's.

        Which torch.compile has taken already. Nor does it guard a number in ``seed``: one that may come from elsewhere
        at the next step is refused.
        """
        given = group["seed"]
        if type(given) is not int:
            raise TypeError(
                f"{self._name}: seed must be an int in a compiled step; got {type(given).__name__}"
            )
        if not -LAST_SEED <= given < LAST_SEED:
            raise ValueError(
                f"{self._name}: seed must be in [-2^63, 2^63) in a compiled step; got {given} (take 2^64 from it)"
            )
        if self._drawn_seed is not None:
            self._agree_on_seed()
            if self._drawn_seed is None:
                seed.append(group["seed"])
