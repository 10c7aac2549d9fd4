"""Parameters in mid-training for the optimizers' steps, and the calls that step them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime import pointer_table
from fekernels.ops.optimizers.step import StepSettings
from tests.support.optimizers import F32, OPERATIONS, Case, Options, Step
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

    def pointers(self, op: str, options: Options) -> pointer_table.Row:
        """What a pointer table takes of it."""
        anchor = self.anchor if options.anchor else None
        if op == "sgld_":
            return pointer_table.Row(
                self.param, self.grad, self.step, self.stream, anchor=anchor, shard=self.shard
            )
        largest = self.max_exp_avg_sq if options.amsgrad else None
        return pointer_table.Row(
            self.param, self.grad, self.step, self.stream, self.exp_avg, self.exp_avg_sq, largest, anchor, self.shard,
            self.noise_unit,
        )  # fmt: skip


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
    return make_row(step.case, step.options, *step.dtypes, step_dtype=step.step_dtype)


# Calls.


def settings_of(op: str, rows: list[Row], options: Options, **changes: Any) -> StepSettings:
    """The options as the operation's kernels take them."""
    kind = OPERATIONS[op].settings

    def scalar(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, dtype=F32, device=rows[0].param.device)

    given = {f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)}
    given |= dict(lr_tensor=None, temperature_tensor=None)
    given |= dict(grad_scale=scalar(options.grad_scale), found_inf=scalar(options.found_inf))
    return kind(**{**given, **changes})


def call(op: str, rows: list[Row], options: Options, backend: str | None = None, **changes: Any) -> None:
    """One call of the list operator, in place."""

    def size(row: Row) -> int:
        return max(row.param.numel(), 1)

    settings = settings_of(op, rows, options)
    lists = {f"{name}s": [getattr(row, name) for row in rows] for name in OPERATIONS[op].tensors}
    left_out = {
        "anchors": options.anchor,
        "max_exp_avg_sqs": options.amsgrad,
        "noise_units": rows[0].noise_unit,
    }
    lists |= {
        name: [] for name, given in left_out.items() if name in lists and (given is None or given is False)
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
