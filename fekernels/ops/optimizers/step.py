"""What the optimizers' operations share: settings, schema, checks, and one step over rows or pointer tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from fekernels._catalogue.optimizers import FLAGS, NOISES
from fekernels._runtime import backends
from fekernels._runtime.pointer_table import PointerTable, Row, step_numbers
from fekernels._runtime.torch_internals import dispatch_modes
from fekernels.ops._library import define_in_place
from fekernels.ops.optimizers.parameter_rows import (
    check_lists,
    check_scalars,
    group_rows,
    readable,
    readable_rows,
    shard_of,
)

__all__ = ["StepOperation", "StepSettings"]

# The numbers at the head of every operation's row, before the flags: struct StepSettings in csrc/formulas/step.h.
HEAD = ("lr", "temperature", "weight_decay", "prior_precision")
OPTIONAL = ("max_exp_avg_sq", "noise_unit", "anchor")  # tensors of a row whose list may be empty
SCHEMA_TYPES = {"float": "float", "bool": "bool", "int": "int", "str": "str", "Tensor | None": "Tensor?"}


class StepSettings:
    """What one step of a parameter group needs besides its tensors: what every operation's has.

    An operation's own is a dataclass of all fields in the operator's order; those with a default follow ``backend``.

    Attributes:
        lr, temperature: numbers, which the one-element tensors beside them replace where given.
        seed: 64 bits, signed.
        grad_scale: gradients are divided by it. found_inf: where it is not 0 nothing changes.
    """

    lr: float
    lr_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    weight_decay: float
    prior_precision: float
    maximize: bool
    stochastic_rounding: bool
    seed: int
    grad_scale: Tensor | None
    found_inf: Tensor | None

    # Of the operation alone, in the order of its struct in csrc/formulas.
    NUMBERS: ClassVar[tuple[str, ...]] = ()

    SWITCHES: ClassVar[tuple[tuple[str, int], ...]] = ()  # with their codes; StepOperation fills it

    def flags(self) -> int:
        """The switches as the kernels' bit set."""
        flags = 0
        for name, code in self.SWITCHES:
            if getattr(self, name):
                flags |= code
        return flags

    @functools.cached_property
    def row(self) -> list[float]:
        """The operation's settings as kernels take them: one row of float64. It is read at their first step."""
        row = [*_head(self), float(self.flags())]
        for name in self.NUMBERS:
            value = getattr(self, name)
            row.append(float(NOISES[value]) if name == "noise" else value)
        return row

    def schedule(self, name: str, value: float) -> None:
        """Set lr or temperature, in the row too where it has been made."""
        setattr(self, name, value)
        if "row" in self.__dict__:
            self.row[HEAD.index(name)] = value

    def check(self, function: str, lists: dict[str, Any]) -> None:
        """Raise for values of an operator's call that are out of their range; read what only the operator takes."""


_head = attrgetter(*HEAD)


class StepOperation:
    """One optimizer operation: the operator of its name over lists, and the same step over rows and tables.

    Args:
        name: of the operator, and of its function in every backend.
        settings: its dataclass.
        tensors: the fields of a ``Row`` that it takes, in the operator's order.
        names: what of these is another thing to this operation, by the name that users know it by.
        only_read: those of the tensors that it does not write.

    Attributes:
        switches: the names of the settings that are bools.
        numbers: of those that are plain numbers.
        arguments: the settings in the operator's order, without those that follow ``backend``.
        late: those that follow it, with their values where a call leaves them out.
    """

    def __init__(
        self,
        name: str,
        settings: type[StepSettings],
        tensors: tuple[str, ...],
        names: Mapping[str, str] = MappingProxyType({}),
        only_read: tuple[str, ...] = ("grad", "anchor"),
    ) -> None:
        self.name, self.settings, self.tensors, self.names = name, settings, tensors, names
        given = fields(settings)  # type: ignore[arg-type]  # every operation's own is a dataclass
        kinds = {field.name: str(field.type) for field in given}
        self.switches = tuple(key for key, kind in kinds.items() if kind == "bool")
        settings.SWITCHES = tuple((key, FLAGS[key]) for key in self.switches)
        self.numbers = tuple(
            key for key, kind in kinds.items() if kind == "float" and f"{key}_tensor" not in kinds
        )
        self.late = {field.name: field.default for field in given if field.default is not MISSING}
        self.arguments = tuple(key for key in kinds if key not in self.late)
        self._lists = {key: f"{names.get(key, key)}s" for key in tensors}
        self.lists = (*self._lists.values(), "streams", "shards")
        self._order = (*self.lists, *self.arguments, "backend", *self.late)
        letters = iter("abcdefghijkl")
        written = [
            f"Tensor[] {listed}" if key in only_read else f"Tensor({next(letters)}!)[] {listed}"
            for key, listed in self._lists.items()
        ]
        early = [f"{SCHEMA_TYPES[kinds[key]]} {key}" for key in self.arguments]
        late = [f"{SCHEMA_TYPES[kinds[key]]} {key}={value}" for key, value in self.late.items()]
        arguments = [*written, "int[] streams", "int[] shards", *early, "str? backend=None", *late]
        define_in_place(f"{name}({', '.join(arguments)}) -> ()", self.step_lists)

    def step_lists(self, *args: Any, **named: Any) -> None:
        """The operator. What kernels cannot read by its address, the reference steps by operators."""
        given = {
            "backend": None,
            **self.late,
            **dict(zip(self._order, args, strict=False)),
            **named,
        }
        params: list[Tensor] = given["params"]
        if not params:
            return
        settings = self.settings(**{key: given[key] for key in (*self.arguments, *self.late)})
        settings.check(self.name, given)
        tensors = {key: given[listed] for key, listed in self._lists.items()}
        check_lists(
            self.name,
            params,
            {listed: given[listed] for key, listed in self._lists.items() if key not in OPTIONAL},
            {listed: given[listed] for key, listed in self._lists.items() if key in OPTIONAL},
            given["streams"],
            given["shards"],
        )
        if getattr(settings, "amsgrad", False) and not given["max_exp_avg_sqs"]:
            raise ValueError(
                f"{self.name}: max_exp_avg_sqs must hold one tensor per parameter with amsgrad=True; got none"
            )
        rows = [
            Row(
                **{"grad": params[i], **{key: values[i] for key, values in tensors.items() if values}},
                stream=given["streams"][i],
                shard=shard_of(given["shards"], i),
            )
            for i in range(len(params))
        ]
        fitted = readable_rows(self.name, rows, self.names)
        device = params[0].device
        check_scalars(
            self.name, device, lr_tensor=settings.lr_tensor, temperature_tensor=settings.temperature_tensor,
            grad_scale=settings.grad_scale, found_inf=settings.found_inf,
        )  # fmt: skip
        if device.type != "cpu":  # a GPU's kernels read them as float32
            settings.grad_scale = None if settings.grad_scale is None else settings.grad_scale.float()
            settings.found_inf = None if settings.found_inf is None else settings.found_inf.float()
        self._step_fitted(rows, fitted, settings, backends.choose(device.type, given["backend"]))

    def step_rows(self, rows: Sequence[Row], settings: StepSettings, backend: str) -> None:
        """One step of rows that ``check_row`` has seen."""
        self._step_fitted(rows, [readable(row) for row in rows], settings, backend)

    def _step_fitted(
        self, rows: Sequence[Row], fitted: Sequence[Row | None], settings: StepSettings, backend: str
    ) -> None:
        by_rows = backends.takes_rows(backend)
        plain = [] if by_rows else [row for row in fitted if row is not None]
        others = [fit or row for row, fit in zip(rows, fitted, strict=True) if by_rows or fit is None]
        if plain and others:
            step_numbers([row.step for row in rows])  # nothing must move if one of them has come to its end
        if others:
            backends.implementation(self.name, backend if by_rows else backends.BY_ROWS)(others, settings)
        if plain:
            self.step_tables([PointerTable(part) for part in group_rows(plain)], settings, backend)

    def step_tables(self, tables: Sequence[PointerTable], settings: StepSettings, backend: str) -> None:
        """One kernel call per table: one table per group, or on a GPU one for each set of dtypes in it."""
        kernel = backends.implementation(self.name, backend)
        row = settings.row
        for table in tables:
            kernel(
                table.table, table.layouts, table.chunks, table.scratch, row, settings.lr_tensor,
                settings.temperature_tensor, settings.grad_scale, settings.found_inf, settings.seed, table.dtypes,
            )  # fmt: skip

    def seen(self) -> bool:
        """Whether somebody is to see the operator: torch.compile, or a mode such as FakeTensorMode."""
        return torch.compiler.is_compiling() or dispatch_modes()
