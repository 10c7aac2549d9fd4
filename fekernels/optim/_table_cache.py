"""A parameter group's pointer tables, and how each step makes sure that they still point at the right tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, eq, is_
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fekernels._runtime.parts import is_sharded, local_tensor
from fekernels._runtime.pointer_table import PointerTable, Row
from fekernels._runtime.torch_internals import dtensor_parts
from fekernels.ops.optimizers.parameter_rows import group_rows, readable
from fekernels.ops.optimizers.step import StepSettings
from fekernels.ops.plain_memory import LOWEST, has_plain_memory
from fekernels.optim._shards import placed_alike

__all__ = ["KeptSettings", "StateSnapshot", "TableCache"]

ORDINARY = {Tensor, torch.nn.Parameter}
UNCHANGING = {float, int, bool, str, type(None), torch.dtype}
SCHEDULED = {"lr", "temperature"}
DTYPE = attrgetter("dtype")  # a third of the time that a comprehension takes, of hundreds of tensors a step
# The states whose shapes, strides and dtypes Python's check compares at a step: so many, or this share of them. All
# would double its time for 200 parameters and make it three times as long for 1,000. Only a change of a state where it
# lies (``.data`` of the same address, ``resize_`` to less) is noticed later for it, at the eighth step at the latest;
# until then the kernel takes the state for what it was, in memory that the table keeps. The native check compares all.
COMPARED, SHARE = 64, 8


def gaps(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor that is not contiguous; of one that is, those of dimensions of one element may be any."""
    return None if tensor.is_contiguous() else tensor.stride()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, gaps(tensor), tensor.dtype


def _have_sizes(tensors: list[Tensor], sizes: list[torch.Size]) -> bool:
    """(Lists of thousands of new sizes would set off the garbage collector at every step.)"""
    return len(tensors) == len(sizes) and all(map(eq, map(Tensor.size, tensors), sizes))


class KeptSettings:
    """A group's settings, for as long as its values are the very objects that they were checked and made from.

    Looking the values up costs 1 us, checking them and making the settings 10. Schedules set another lr or temperature
    at every step: a positive number after a positive one is taken over, because it is as right, and deserves no
    warning that the other did not.

    Args:
        keys: of the values that the settings or their checks depend on.
    """

    def __init__(self, group: dict[str, Any], keys: Iterable[str], settings: StepSettings) -> None:
        self.keys, self.settings = tuple(keys), settings
        self.values = list(map(group.get, self.keys))

    @functools.cached_property
    def lasting(self) -> bool:
        """Whether none of the values can change in place."""
        return all(map(_unchanging, self.values))

    def hold(self, group: dict[str, Any]) -> bool:
        """Whether the settings are those of the group's values, or now are."""
        values = list(map(group.get, self.keys))
        if not all(map(is_, values, self.values)):
            moved: dict[str, float] = {}
            for key, value, before in zip(self.keys, values, self.values, strict=True):
                if value is not before:
                    if not (key in SCHEDULED and _positive(value) and _positive(before)):
                        return False
                    moved[key] = value
            for key, value in moved.items():
                self.settings.schedule(key, value)
            self.values = values
        return self.lasting


def _positive(value: object) -> TypeGuard[float]:
    return type(value) is float and 0.0 < value < math.inf


def _unchanging(value: object) -> bool:
    """Whether the same object is the same value, unlike a tensor or a list."""
    return type(value) in UNCHANGING or (type(value) is tuple and all(map(_unchanging, value)))


class StateSnapshot:
    """An optimizer's states as they were, by identity: looking each parameter up costs its hash, a call of Python."""

    def __init__(self, states: dict[Tensor, Any]) -> None:
        self.params, self.states = list(states), list(states.values())

    def holds(self, states: dict[Tensor, Any]) -> bool:
        return (
            len(states) == len(self.params)
            and all(map(is_, states, self.params))
            and all(map(is_, states.values(), self.states))
        )


class TableCache:
    """The pointer tables of one group, and what must still hold of its tensors for the tables to be right.

    Everything is kept in parallel lists, over the parameters that had a gradient, because comparing whole lists is what
    makes the check cost less than the step for hundreds of small parameters.

    Attributes:
        dtypes: of the group's parameters.
        native: the check of ``csrc/torch/host`` over the same tensors, where it can be had; else Python's.
        rows: where the backend takes rows, or one cannot be read by its address. There are no tables then.
        takes_gradients: whether the rows are of the parameters that have a gradient. Draws take none: every parameter
            that is not frozen has a row, in which it stands for its gradient too.
        copies: gradients that had to be copied into plain memory, for this step alone.
        lasting: whether the next step can use it: not without tables, nor where a parameter is several rows, or its
            gradient was brought to its placements first.
    """

    takes_gradients = True

    def __init__(
        self,
        group: dict[str, Any],
        states: list[dict[str, Any]],
        rows: list[Row],
        by_rows: bool = False,
        host: ModuleType | None = None,
    ) -> None:
        params: list[Tensor] = group["params"]
        self.amsgrad = group.get("amsgrad", False)  # whether the rows point at a max_exp_avg_sq
        self.streams, self.anchor = list(group["streams"]), group["anchor"]
        self.dtypes = {param.dtype for param in params}
        self.noise_units = all(row.noise_unit is not None for row in rows)
        self.params, self.classes = list(params), list(map(type, params))
        grads = self.gradients(params)
        self.live = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        self.lasting = len(rows) == len(self.live) and self._placed_alike(params)
        self.tables: list[PointerTable] = []
        self.native: Any = None
        fitted = [None] if by_rows else [readable(row) for row in rows]
        self.rows = rows if None in fitted else []
        if self.rows:
            self.lasting = False
            return
        given, rows = rows, [row for row in fitted if row is not None]
        self.copies = [
            new.grad for row, new in zip(given, rows, strict=True) if new is not row or not self.lasting
        ]
        self.missing = [grad is None for grad in grads]
        self.sharded = any(map(is_sharded, self.live))
        self.all_sharded = self.sharded and all(map(is_sharded, self.live))
        self.states = states
        self.counts = list(map(len, states))
        self.keys = [key for state in states for key in state]
        self.values = [value for state in states for value in state.values()]
        self.tensors = [value for value in self.values if isinstance(value, Tensor) and not is_sharded(value)]
        self.sharded_states = [value for value in self.values if is_sharded(value)]
        tensors = self._state_tensors()
        self.state_pointers = list(map(Tensor.data_ptr, tensors))
        self.state_kinds = list(map(_kind, tensors))
        self.next_compared = 0
        self.pointers = [row.param.data_ptr() for row in rows]
        self.null_gradients = [row.grad.data_ptr() for row in rows].count(0)  # of tensors without elements
        self.contiguous = all(t.is_contiguous() for row in rows for t in (row.param, row.grad))
        self.sizes = [row.param.size() for row in rows]
        self.row_dtypes = [row.param.dtype for row in rows]
        self.strides = [gaps(row.param) for row in rows]
        self.grad_dtypes = [row.grad.dtype for row in rows]
        self.grad_strides = [gaps(row.grad) for row in rows]
        parts = group_rows(rows) if rows else []
        position = {id(row): i for i, row in enumerate(rows)}
        # Which of the gradients are a table's rows.
        self.parts = [[position[id(row)] for row in part] for part in parts]
        self.tables = [PointerTable(part) for part in parts]
        if host is not None and len(parts) == 1 and self._ordinary():
            checked = [row.grad for row in rows] if self.takes_gradients else None
            self.native = host.GroupCheck(
                self.params, self.live, checked, self.states, self.keys, self.values, self.tensors
            )

    def gradients(self, params: list[Tensor]) -> list[Tensor | None]:
        """What stands in the rows for the gradients; None of parameters that have no row."""
        if self.takes_gradients:
            return [param.grad for param in params]
        return [param if param.requires_grad else None for param in params]

    def _placed_alike(self, params: list[Tensor]) -> bool:
        grads = self.gradients(params)
        return all(
            grad is None or placed_alike(grad, param) for grad, param in zip(grads, params, strict=True)
        )

    def _ordinary(self) -> bool:
        """Whether the native check sees all: no shards, whose memory is another tensor's, no class's own ``grad``."""
        return not self.sharded and not self.sharded_states and set(self.classes) <= ORDINARY

    def point_to_gradients(self, params: list[Tensor], states: dict[Tensor, Any], snapshot: bool) -> bool:
        """Write this step's gradients into the tables; False when anything else has changed since they were made.

        ``snapshot``: whether each parameter is known to have the state that it had.
        """
        if self.native is not None:
            known = snapshot or all(map(is_, map(states.get, self.live), self.states))
            if not known or not self.native.holds(params):
                return False
            self.tables[0].point_to_checked(self.native)
            return True
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if list(map(type, params)) != self.classes:  # whose ``grad`` may be another
            return False
        grads = self.gradients(params)
        if [grad is None for grad in grads] != self.missing:
            return False
        live, local = [grad for grad in grads if grad is not None], self.live
        try:
            if self.all_sharded:
                live, places = dtensor_parts(live)
                local, own_places = dtensor_parts(local)
                if places != own_places:
                    return False
            elif self.sharded:
                if not all(map(placed_alike, live, local)):
                    return False
                live, local = list(map(local_tensor, live)), list(map(local_tensor, local))
            pointers = list(map(Tensor.data_ptr, live))
            unchanged = (
                self._plain(live, pointers)
                and list(map(Tensor.data_ptr, local)) == self.pointers
                and self._laid_out(local, live)
                and (snapshot or all(map(is_, map(states.get, self.live), self.states)))
                and list(map(len, self.states)) == self.counts
                and all(map(is_, chain.from_iterable(self.states), self.keys))
                and all(map(is_, chain.from_iterable(map(dict.values, self.states)), self.values))
                and self._states_as_they_were()
            )
        # A sparse gradient has no strides, one of a transform no memory, one that is no DTensor no placements.
        except (RuntimeError, AttributeError):
            return False
        if not unchanged:
            return False
        for table, part in zip(self.tables, self.parts, strict=True):
            table.point_to(pointers if len(self.tables) == 1 else [pointers[i] for i in part])
        return True

    def count_write(self) -> None:
        """Tell autograd, which checks that what it saved is as it was, of a kernel that wrote through pointers."""
        if self.native is not None:
            self.native.count_write()
        else:
            torch.autograd.graph.increment_version(self.live)

    def _plain(self, grads: list[Tensor], pointers: list[int]) -> bool:
        """``has_plain_memory`` of every gradient, as far as their types and addresses leave it open."""
        if pointers.count(0) != self.null_gradients:
            return False
        if set(map(type, grads)) <= ORDINARY and min(filter(None, pointers), default=LOWEST) >= LOWEST:
            return not any(map(Tensor.is_neg, grads))
        return all(map(has_plain_memory, grads))

    def _laid_out(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        if not (
            _have_sizes(params, self.sizes)
            and _have_sizes(grads, self.sizes)
            and list(map(DTYPE, params)) == self.row_dtypes
            and list(map(DTYPE, grads)) == self.grad_dtypes
        ):
            return False
        if self.contiguous:
            return all(map(Tensor.is_contiguous, params)) and all(map(Tensor.is_contiguous, grads))
        return list(map(gaps, params)) == self.strides and list(map(gaps, grads)) == self.grad_strides

    def _state_tensors(self) -> list[Tensor]:
        """Those with memory of their own: what lives here of a DTensor is another tensor."""
        return self.tensors + dtensor_parts(self.sharded_states)[0] if self.sharded_states else self.tensors

    def _states_as_they_were(self) -> bool:
        tensors = self._state_tensors()
        if list(map(Tensor.data_ptr, tensors)) != self.state_pointers:
            return False
        begin = self.next_compared
        end = begin + max(COMPARED, -(-len(tensors) // SHARE))
        self.next_compared = end if end < len(tensors) else 0
        return list(map(_kind, tensors[begin:end])) == self.state_kinds[begin:end]
