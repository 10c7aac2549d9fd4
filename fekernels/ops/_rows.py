"""What the optimizers' list operators share: their checks, and the rows of one kernel call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fekernels._table import DTYPE_CODES, Row, supported_dtypes

__all__ = ["check_lists", "check_row", "check_scalars", "group_rows", "shard_of"]


def shard_of(shards: Sequence[int], i: int) -> tuple[int, int, int] | None:
    """(offset, run, pitch) of tensor ``i``: three integers each, or an empty list when nothing is sharded."""
    return (shards[3 * i], shards[3 * i + 1], shards[3 * i + 2]) if shards else None


def group_rows(rows: Sequence[Row]) -> list[list[Row]]:
    """One list a kernel call: everything on a CPU, where dtypes may be mixed; by dtypes on a GPU."""
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
        offset, run, pitch = shards[3 * i : 3 * i + 3]
        if offset < 0 or not 1 <= run <= pitch:
            raise ValueError(
                f"{function}: shards must have offset >= 0 and 1 <= run <= pitch; got {(offset, run, pitch)} "
                f"for params[{i}]"
            )


def check_row(function: str, where: str, row: Row) -> None:
    """Raise ValueError where tensors do not fit their parameter: kernels go by addresses and would not notice."""
    param, step = row.param, row.step
    states = {"exp_avg": row.exp_avg, "exp_avg_sq": row.exp_avg_sq, "max_exp_avg_sq": row.max_exp_avg_sq}
    for name, tensor in {
        "param": param,
        "grad": row.grad,
        **states,
        "anchor": row.anchor,
        "step": step,
    }.items():
        if tensor is None:
            continue
        if tensor.device != param.device:
            raise ValueError(
                f"{function}: {name} of {where} must be on {param.device} like its parameter; got {tensor.device}"
            )
        if tensor.shape != param.shape and tensor is not step:
            raise ValueError(
                f"{function}: {name} of {where} must have shape {tuple(param.shape)} like its parameter; "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPE_CODES and tensor is not step:
            raise ValueError(
                f"{function}: {name} of {where} must be one of {supported_dtypes()}; got {tensor.dtype}"
            )
    if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{function}: step of {where} must be one float32 or float64; got {step.dtype} of shape {tuple(step.shape)}"
        )
    unit = row.noise_unit
    if unit is not None and (unit.numel() != 1 or unit.dtype != torch.float64 or unit.device != param.device):
        raise ValueError(
            f"{function}: noise_unit of {where} must be one float64 on {param.device}; "
            f"got {unit.dtype} of shape {tuple(unit.shape)} on {unit.device}"
        )
    dtypes = {str(tensor.dtype) for tensor in states.values() if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(
            f"{function}: the states of {where} must have one dtype; got {', '.join(sorted(dtypes))}"
        )


def check_scalars(function: str, device: torch.device, **scalars: Tensor | None) -> None:
    """Raise ValueError for what is not one float32 or float64 on ``device``."""
    for name, tensor in scalars.items():
        if tensor is None:
            continue
        if tensor.numel() != 1 or tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{function}: {name} must be one float32 or float64; got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{function}: {name} must be on {device} like params; got {tensor.device}")
