"""What the optimizers' list operators share: their checks, and the rows of one kernel call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fekernels._table import DTYPE_CODES, Row, supported_dtypes

__all__ = ["check_lists", "group_rows", "shard_of"]


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
    steps: Sequence[Tensor],
    streams: Sequence[int],
    shards: Sequence[int],
) -> None:
    """Raise ValueError where lists differ in length, or tensors in device or shape, before anything has changed."""
    lists = {**required, **{name: tensors for name, tensors in optional.items() if tensors}}
    for name, values in (*lists.items(), ("steps", steps), ("streams", streams)):
        if len(values) != len(params):
            raise ValueError(
                f"{function}: {name} must have {len(params)} entries like params; got {len(values)}"
            )
    if shards and len(shards) != 3 * len(params):
        raise ValueError(f"{function}: shards must have {3 * len(params)} entries or none; got {len(shards)}")
    device = params[0].device
    for i, param in enumerate(params):
        for name, tensor in (("params", param), *((name, tensors[i]) for name, tensors in lists.items())):
            if tensor.device != device:
                raise ValueError(
                    f"{function}: {name}[{i}] must be on {device} like params[0]; got {tensor.device}"
                )
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{function}: {name}[{i}] must have shape {tuple(param.shape)} like its parameter; "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.dtype not in DTYPE_CODES:
                raise ValueError(
                    f"{function}: {name}[{i}] must be one of {supported_dtypes()}; got {tensor.dtype}"
                )
        if steps[i].numel() != 1:
            raise ValueError(f"{function}: steps[{i}] must have one element; got {steps[i].numel()}")
