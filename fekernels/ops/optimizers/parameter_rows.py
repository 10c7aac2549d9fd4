"""What the optimizers' list operators share: their checks, and the rows of one kernel call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from fekernels._checks import number
from fekernels._runtime.pointer_table import Row, check_like
from fekernels.ops.plain_memory import (
    SharedElements,
    check_storage,
    has_plain_memory,
    in_plain_memory,
    lost_memory,
    overlaps_itself,
)

__all__ = [
    "check_lists",
    "check_row",
    "check_scalars",
    "check_unit",
    "group_rows",
    "readable",
    "readable_rows",
    "shard_of",
]


def shard_of(shards: Sequence[int], i: int) -> tuple[int, int, int] | None:
    """(offset, length, pitch) of tensor ``i``: three integers each, or an empty list when nothing is sharded."""
    return (shards[3 * i], shards[3 * i + 1], shards[3 * i + 2]) if shards else None


def group_rows(rows: Sequence[Row]) -> list[list[Row]]:
    """One list per kernel call: everything on a CPU, where dtypes may be mixed; by dtypes on a GPU."""
    if rows[0].param.device.type == "cpu":
        return [list(rows)]
    parts: dict[int, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.dtypes() & 0xFFFFFFFF, []).append(row)
    return list(parts.values())


def check_lists(
    function: str,
    params: Sequence[Tensor],
    required: dict[str, Sequence[Tensor]],
    optional: dict[str, Sequence[Tensor]],
    streams: Sequence[int],
    shards: Sequence[int],
) -> None:
    """Raise ValueError where lists differ in length, or where a stream or shard is none."""
    lists: dict[str, Sequence[object]] = {**required, "streams": streams}
    lists.update({name: tensors for name, tensors in optional.items() if tensors})
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(
                f"{function}: {name} must have {len(params)} entries like params; got {len(values)}"
            )
    for i, stream in enumerate(streams):
        if not 0 <= stream < 1 << 32:
            raise ValueError(f"{function}: streams[{i}] must be in [0, 2^32); got {stream}")
    if shards and len(shards) != 3 * len(params):
        raise ValueError(f"{function}: shards must have {3 * len(params)} entries or none; got {len(shards)}")
    for i in range(len(shards) // 3):
        offset, length, pitch = shards[3 * i : 3 * i + 3]
        if offset < 0 or not 1 <= length <= pitch:
            raise ValueError(
                f"{function}: shards must have offset >= 0 and 1 <= length <= pitch; got {(offset, length, pitch)} "
                f"for params[{i}]"
            )


def check_row(function: str, where: str, row: Row, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise where tensors do not fit their parameter: kernels go by addresses and would not notice.

    ``names``: of the operation, as ``StepOperation`` has them.

    Raises:
        TypeError: what is no tensor. ValueError: a wrong shape, dtype, device or layout, a parameter or state whose
            elements share memory or that holds no values.
    """
    param, step, unit = row.param, row.step, row.noise_unit
    states = {"exp_avg": row.exp_avg, "exp_avg_sq": row.exp_avg_sq, "max_exp_avg_sq": row.max_exp_avg_sq}
    operands = {"param": param, "grad": row.grad, **states, "anchor": row.anchor}
    for key, tensor in {**operands, "step": step, "noise_unit": unit}.items():
        if tensor is None and key not in ("param", "grad", "step"):
            continue
        name = names.get(key, key)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} of {where} must be a tensor; got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{function}: {name} of {where} must be dense; got layout {tensor.layout}")
        if tensor.device != param.device:
            raise ValueError(
                f"{function}: {name} of {where} must be on {param.device} like its parameter; got {tensor.device}"
            )
        if key in operands:
            check_like(function, f"{name} of {where}", tensor, param, ValueError)
        _check_values(function, name, where, tensor, written=key not in ("grad", "anchor"))
    if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{function}: {names.get('step', 'step')} of {where} must be one float32 or float64; got {step.dtype} of "
            f"shape {tuple(step.shape)}"
        )
    if unit is not None:
        check_unit(function, where, unit, names.get("noise_unit", "noise_unit"))
    dtypes = {str(tensor.dtype) for tensor in states.values() if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(
            f"{function}: the states of {where} must have one dtype; got {', '.join(sorted(dtypes))}"
        )


def check_unit(function: str, where: str, unit: Tensor, name: str = "noise_unit") -> None:
    """ValueError for what is not one float64, finite and not negative; a GPU's value is not read."""
    if unit.numel() != 1 or unit.dtype != torch.float64:
        raise ValueError(
            f"{function}: {name} of {where} must be one float64; got {unit.dtype} of shape {tuple(unit.shape)}"
        )
    if unit.device.type == "cpu" and has_plain_memory(unit):
        number(function, f"{name} of {where}", unit.item())


def _check_values(function: str, name: str, where: str, tensor: Tensor, written: bool) -> None:
    if tensor.is_meta:
        raise ValueError(f"{function}: {name} of {where} must hold values; got a tensor on the meta device")
    if lost_memory(tensor):
        check_storage(f"{function}: {name} of {where}", tensor)
    if written and not tensor.is_contiguous() and has_plain_memory(tensor) and overlaps_itself(tensor):
        raise SharedElements(
            f"{function}: {name} of {where} must have memory of its own for every element; got strides "
            f"{tensor.stride()} for shape {tuple(tensor.shape)} (clone it)"
        )


def readable(row: Row) -> Row | None:
    """The row as a kernel may go through it by addresses; None where only operators can do its step.

    What is only read is copied where it has no plain memory: lazily negated gradients, for one.
    """
    written = (row.param, row.exp_avg, row.exp_avg_sq, row.max_exp_avg_sq, row.step, row.noise_unit)
    if not all(tensor is None or has_plain_memory(tensor) for tensor in written):
        return None
    anchor = row.anchor if row.anchor is None else in_plain_memory(row.anchor)
    grad = in_plain_memory(row.grad)
    if grad is row.grad and anchor is row.anchor:
        return row
    if not (has_plain_memory(grad) and (anchor is None or has_plain_memory(anchor))):
        return None  # a transform makes every copy one of its own tensors
    return replace(row, grad=grad, anchor=anchor)


def readable_rows(function: str, rows: Sequence[Row], names: Mapping[str, str]) -> list[Row | None]:
    """``readable`` of each row; all are checked before any of them moves."""
    for i, row in enumerate(rows):
        check_row(function, f"params[{i}]", row, names)
        if row.param.device != rows[0].param.device:
            raise ValueError(
                f"{function}: params must be on one device; got {rows[0].param.device} and {row.param.device}"
            )
    return [readable(row) for row in rows]


def check_scalars(function: str, device: torch.device, **scalars: Tensor | None) -> None:
    """Raise ValueError for what is not one float32 or float64 on ``device``."""
    for name, tensor in scalars.items():
        if tensor is None:
            continue
        if tensor.numel() != 1 or tensor.dtype not in (torch.float32, torch.float64) or tensor.is_meta:
            raise ValueError(
                f"{function}: {name} must be one float32 or float64; got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{function}: {name} must be on {device} like params; got {tensor.device}")
        check_storage(f"{function}: {name}", tensor)
        if device.type == "cpu" and name in ("lr_tensor", "temperature_tensor"):
            number(function, name, tensor.item())
