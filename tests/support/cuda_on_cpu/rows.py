"""Parameters in every kind of place, in guarded memory, to be stepped twice over and compared bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._runtime.pointer_table import Row

GUARD = 64  # elements on either side of a tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [
    (F32, F32),
    (F64, F64),
    (BF16, BF16),
    (F16, F16),
    (BF16, F32),
    (F16, F32),
    (F32, BF16),
]  # parameter, states


class Arena:
    """Tensors in guarded buffers. Two arenas asked for the same tensors hold the same bits."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(7)
        self.buffers: list[Tensor] = []

    def tensor(self, shape, dtype, *, scale=1.0, squared=False, stride=None, misaligned=False) -> Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=F64) * scale
        values[values.abs() < 0.02 * scale] = 0.0
        if squared:
            values = values**2
        if stride is None:
            stride = torch.empty(shape, device="meta").stride()
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if values.numel() else 0
        buffer = torch.full((span + 2 * GUARD,), float("nan"), dtype=dtype)
        self.buffers.append(buffer)
        view = buffer.as_strided(shape, stride, GUARD + misaligned)
        if 0 in stride:  # as the gradient of a sum
            buffer[GUARD + misaligned] = 0.25
        else:
            view.copy_(values)
        return view

    def scalar(self, value: float, dtype=F32) -> Tensor:
        self.buffers.append(torch.tensor([value], dtype=dtype))
        return self.buffers[-1]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        wrong = (
            (bits(a).view(a.numel(), -1) != bits(b).view(b.numel(), -1)).any(1).nonzero().flatten().tolist()
        )
        assert not wrong, (
            f"buffer {i} ({a.dtype}, {a.numel()}) differs at {wrong[:8]}: {a[wrong[:3]]} {b[wrong[:3]]}"
        )


# Each is a parameter: its shape, what is odd about its place in memory, and (offset, run, pitch) of a shard.
ROWS: list[dict] = [
    {"shape": (5003,)},
    {"shape": (64, 8)},
    {"shape": (0,)},
    {"shape": ()},
    {"shape": (7,)},
    {"shape": (1051,), "misaligned": True},
    {"shape": (37, 29), "stride": (1, 37)},
    {"shape": (3, 5, 7), "stride": (40, 1, 5), "grad_stride": (1, 21, 3), "state_stride": (35, 7, 1)},
    {"shape": (20, 15), "grad_stride": (0, 0)},
    {"shape": (515,), "shard": (8, 515, 515)},
    {"shape": (515,), "shard": (12, 515, 515)},
    {"shape": (515,), "shard": (2**34 - 16, 515, 515)},
    {"shape": (301,), "shard": (2**34 - 5, 301, 301)},
    {"shape": (30, 24), "shard": (48, 24, 96)},
    {"shape": (30, 23), "shard": (23, 23, 70), "stride": (1, 30)},
]


def make_rows(
    arena: Arena,
    param_type,
    state_type=None,
    *,
    anchor_type=None,
    amsgrad=False,
    which=ROWS,
    steps=(0, 9, 400),
    units=(),
) -> list[Row]:
    """``state_type`` None: without states. ``units``: the noise units of the rows in turn, if they have any."""
    rows = []
    for i, row in enumerate(which):
        place = {"misaligned": row.get("misaligned", False)}
        strided = place | {"stride": row.get("stride")}
        states = place | {"stride": row.get("state_stride", row.get("stride"))}
        shape, has_states = row["shape"], state_type is not None
        rows.append(
            Row(
                param=arena.tensor(shape, param_type, **strided),
                grad=arena.tensor(
                    shape, param_type, scale=0.3, **(place | {"stride": row.get("grad_stride")})
                ),
                exp_avg=arena.tensor(shape, state_type, scale=0.1, **states) if has_states else None,
                exp_avg_sq=arena.tensor(shape, state_type, scale=0.3, squared=True, **states)
                if has_states
                else None,
                max_exp_avg_sq=arena.tensor(shape, state_type, scale=0.4, squared=True, **states)
                if amsgrad
                else None,
                anchor=arena.tensor(shape, anchor_type, scale=0.5, **strided)
                if anchor_type is not None
                else None,
                step=arena.scalar(steps[i % len(steps)], F64 if i % 2 else F32),
                stream=[0, 3, 0xFFFFFFFF, 0x80000001][i % 4],
                shard=row.get("shard"),
                noise_unit=arena.scalar(units[i % len(units)], F64) if units else None,
            )
        )
    return rows
