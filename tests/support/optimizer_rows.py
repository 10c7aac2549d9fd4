"""Parameters in mid-training for the optimizers' steps, and the calls that step them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime import pointer_table
from fekernels.ops.optimizers.step import StepSettings
from tests.support.optimizers import BF16, F16, F32, OPERATIONS, VARIATIONAL, Case, Options, Step
from tests.support.tensors import clone, guarded, lay_out


@dataclass
class Row:
    """One parameter with everything a step reads or writes."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    anchor: Tensor
    step: Tensor
    stream: int
    shard: tuple[int, int, int] | None = None
    noise_unit: Tensor | None = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    WRITTEN = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "noise_unit")

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def clone(self, device: str | None = None) -> Row:
        """A copy with the same strides, alignment and guards."""
        return replace(self, **{name: clone(t, device) for name, t in self.tensors().items()})

    def plain(self) -> Row:
        """A copy whose tensors are contiguous and aligned."""
        copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in self.tensors().items()}
        return replace(self, **copies)

    def taken(self, op: str, options: Options) -> dict[str, Tensor | None]:
        """What of it the operation takes; None for a list that is left out."""
        given = {
            "anchor": options.anchor,
            "max_exp_avg_sq": options.amsgrad,
            "noise_unit": self.noise_unit is not None,
        }
        if op == "variational_adam_":
            given["anchor"] = options.samples != 0
            given["max_exp_avg_sq"] = options.samples == 0
        return {
            name: getattr(self, name) if given.get(name, True) else None for name in OPERATIONS[op].tensors
        }

    def pointers(self, op: str, options: Options) -> pointer_table.Row:
        """What a pointer table takes of it."""
        tensors = {"grad": self.param, **self.taken(op, options)}
        return pointer_table.Row(**tensors, stream=self.stream, shard=self.shard)  # type: ignore[arg-type]


def make_row(
    case: Case,
    options: Options,
    dtype: torch.dtype = F32,
    grad_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    anchor_dtype: torch.dtype | None = None,
    stream: int = 0x8000_0007,
    step_dtype: torch.dtype = F32,
    seed: int = 0,
) -> Row:
    """A parameter in mid-training, drawn from ``seed``; the values are of the size that the options' lr moves.

    Tensors lie between NaNs. Some values are 0, and the stream's highest bit is set, that of the second stream.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(scale: float) -> Tensor:
        values = torch.randn(case.shape, generator=generator, dtype=torch.float64) * scale
        return values.masked_fill(values.abs() < 0.02 * scale, 0.0)

    def placed(values: Tensor, of: torch.dtype | None, layout: str) -> Tensor:
        return guarded(lay_out(values.to(of or dtype), case.layout if layout == "same" else layout))

    second = drawn(0.4).square()
    largest = second * (1.5 - torch.rand(case.shape, generator=generator))
    return Row(
        param=placed(drawn(1.0), dtype, case.layout),
        grad=placed(drawn(0.4 * (options.grad_scale or 1.0)), grad_dtype, case.grad_layout),
        exp_avg=placed(drawn(0.2), state_dtype, case.state_layout),
        exp_avg_sq=placed(second, state_dtype, case.state_layout),
        max_exp_avg_sq=placed(largest, state_dtype, case.state_layout),
        anchor=placed(drawn(1.0), anchor_dtype, case.layout),
        step=torch.tensor(float(options.t - 1), dtype=step_dtype),
        stream=stream,
        shard=case.shard,
        noise_unit=torch.tensor(options.noise_unit, dtype=torch.float64),
    )


def row_of(step: Step) -> Row:
    """A fresh one, with the same values every time."""
    return _row_of(step).clone()


@functools.cache
def _row_of(step: Step) -> Row:
    row = make_row(step.case, step.options, *step.dtypes, step_dtype=step.step_dtype)
    if step.op == "variational_draw_" and step.dtypes.param in (BF16, F16):
        # Every other parameter is the rounding of its mean.
        near = row.param.to(row.exp_avg.dtype) * (1 + 2.0**-13)
        known = torch.arange(near.numel()).view(near.shape) % 2 == 0
        row.exp_avg.copy_(torch.where(known, near, row.exp_avg))
    return row


# Calls.


def settings_of(op: str, rows: list[Row], options: Options, **changes: Any) -> StepSettings:
    """The options as the operation's kernels take them."""
    kind = OPERATIONS[op].settings

    def scalar(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, dtype=F32, device=rows[0].param.device)

    given = {f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)}
    given |= dict(lr_tensor=None, temperature_tensor=None)
    given |= dict(grad_scale=scalar(options.grad_scale), found_inf=scalar(options.found_inf))
    if op in VARIATIONAL:
        given["weight_decay"] = options.prior_decay
    given |= changes
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})


def call(op: str, rows: list[Row], options: Options, backend: str | None = None, **changes: Any) -> None:
    """One call of the list operator, in place."""

    def size(row: Row) -> int:
        return max(row.param.numel(), 1)

    settings = settings_of(op, rows, options)
    operation = OPERATIONS[op]
    taken = [row.taken(op, options) for row in rows]
    lists: dict[str, list[Tensor | None]] = {
        f"{operation.names.get(name, name)}s": [] if taken[0][name] is None else [one[name] for one in taken]
        for name in operation.tensors
    }
    arguments = (
        lists
        | {f.name: getattr(settings, f.name) for f in fields(settings)}
        | dict(
            streams=[row.stream for row in rows],
            shards=[n for row in rows for n in row.shard or (0, size(row), size(row))]
            if any(row.shard for row in rows)
            else [],
            backend=backend,
        )
    )
    getattr(torch.ops.fekernels, op)(**{**arguments, **changes})


def tables_of(op: str, rows: list[Row], options: Options) -> list[pointer_table.PointerTable]:
    """Pointer tables over the rows, one for each set of dtypes as on a GPU."""
    parts: dict[int, list[pointer_table.Row]] = {}
    for row in (row.pointers(op, options) for row in rows):
        parts.setdefault(row.dtypes() & 0xFFFFFFFF, []).append(row)
    return [pointer_table.PointerTable(part) for part in parts.values()]
