"""A parameter group's pointer tables, and how each step makes sure that they still point at the right tensors."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor

from fekernels._table import PointerTable, Row
from fekernels.ops._rows import group_rows
from fekernels.optim._shards import is_sharded, local_tensor

__all__ = ["TableCache"]


class TableCache:
    """The pointer tables of one group, and what must still hold of its tensors for the tables to be right.

    Everything is kept in parallel lists, over the parameters that had a gradient, because comparing whole lists is what
    makes the check cost less than the step for hundreds of small parameters.
    """

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Any]], rows: list[Row], amsgrad: bool
    ) -> None:
        self.amsgrad = amsgrad  # whether the rows point at a max_exp_avg_sq
        self.noise_units = all(row.noise_unit is not None for row in rows)
        self.params = list(params)
        self.missing = [param.grad is None for param in params]
        self.live = [param for param in params if param.grad is not None]
        self.sharded = any(map(is_sharded, self.live))
        self.states = states
        self.values = [value for state in states for value in state.values()]
        self.tensors = [value for value in self.values if isinstance(value, Tensor) and not is_sharded(value)]
        self.state_pointers = list(map(Tensor.data_ptr, self.tensors))
        self.pointers = [row.param.data_ptr() for row in rows]
        self.shapes = [row.param.shape for row in rows]
        self.strides = [row.param.stride() for row in rows]
        self.grad_dtypes = [row.grad.dtype for row in rows]
        self.grad_strides = [row.grad.stride() for row in rows]
        parts = group_rows(rows) if rows else []
        position = {id(row): i for i, row in enumerate(rows)}
        # Which of the gradients are a table's rows.
        self.parts = [[position[id(row)] for row in part] for part in parts]
        self.tables = [PointerTable(part) for part in parts]

    def point_to_gradients(self, params: list[Tensor], states: dict[Tensor, Any]) -> bool:
        """Write this step's gradients into the tables; False when anything else has changed since they were made."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        grads = [param.grad for param in params]
        if [grad is None for grad in grads] != self.missing:
            return False
        live, local = [grad for grad in grads if grad is not None], self.live
        if self.sharded:
            live, local = list(map(local_tensor, live)), list(map(local_tensor, local))
        try:
            unchanged = (
                list(map(Tensor.data_ptr, local)) == self.pointers
                and list(map(Tensor.stride, local)) == self.strides
                and [param.shape for param in local] == self.shapes
                and [grad.dtype for grad in live] == self.grad_dtypes
                and list(map(Tensor.stride, live)) == self.grad_strides
                and all(map(is_, map(states.get, self.live), self.states))
                and sum(map(len, self.states)) == len(self.values)
                and all(map(is_, chain.from_iterable(map(dict.values, self.states)), self.values))
                and list(map(Tensor.data_ptr, self.tensors)) == self.state_pointers
            )
        except RuntimeError:  # a sparse gradient has no strides
            return False
        if not unchanged:
            return False
        pointers = list(map(Tensor.data_ptr, live))
        for table, part in zip(self.tables, self.parts, strict=True):
            table.point_to(pointers if len(self.tables) == 1 else [pointers[i] for i in part])
        return True
