"""The pointer table: what the compiled kernels know of an optimizer's tensors, one row of int64 words per parameter.

Passing a few hundred tensors through an operator's argument lists costs more than stepping them; a table is built once,
and between steps only the gradients' pointers are written into it. ``csrc/core/pointer_table.h`` is the other side of
this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.optimizers import DTYPES

__all__ = [
    "CHUNK",
    "COLUMNS",
    "GRAD",
    "LAST_FLOAT32_STEP",
    "LAST_STEP",
    "PointerTable",
    "Row",
    "check_dtype",
    "check_like",
    "count_problem",
    "step_numbers",
    "supported_dtypes",
]

COLUMNS = 16  # words of a row: struct TableRow in csrc/core/pointer_table.h
GRAD = 1  # the column of the gradient's address
CHUNK = 4096  # elements of a GPU block, kChunk in csrc/core/pointer_table.h

# The ends of step counters, kFloat32Steps and kFloat64Steps in csrc/torch/optimizers.cpp. A float32 ends at 2^24: from
# it on adding 1 changes nothing, and the noise would repeat. A float64 ends where the noise's counter of steps does.
LAST_FLOAT32_STEP, LAST_STEP = 1 << 24, (1 << 32) - 1

DTYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for code, name in enumerate(DTYPES)}


def supported_dtypes() -> str:
    """For error messages."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)


def check_dtype(function: str, name: str, tensor: Tensor, error: type[Exception] = TypeError) -> None:
    """Raise ``error`` for a tensor whose dtype no kernel knows."""
    if tensor.dtype not in DTYPE_CODES:
        raise error(f"{function}: {name} must be one of {supported_dtypes()}; got {tensor.dtype}")


def check_like(
    function: str, name: str, tensor: Tensor, param: Tensor, dtype_error: type[Exception] = TypeError
) -> None:
    """Raise for a tensor that belongs to ``param`` and has no values, another shape or a dtype that no kernel knows.

    Raises:
        ValueError: the first two. ``dtype_error``: the third.
    """
    if tensor.is_meta and not param.is_meta:
        raise ValueError(f"{function}: {name} must hold values; got a tensor on the meta device")
    if tensor.shape != param.shape:
        raise ValueError(
            f"{function}: {name} must have shape {tuple(param.shape)} like its parameter; got {tuple(tensor.shape)}"
        )
    check_dtype(function, name, tensor, dtype_error)


def count_problem(step: Tensor) -> str | None:
    """What is wrong with a counter that can count no further step."""
    t, single = float(step), step.dtype == torch.float32
    if 0 <= t < (LAST_FLOAT32_STEP if single else LAST_STEP):
        return None
    return f"must be below 2^{24 if single else 32}, where its counter ends; got {t:.17g}"


def step_numbers(steps: Sequence[Tensor]) -> list[int]:
    """t of the step to come of each parameter; nothing has changed where one cannot be counted."""
    for step in steps:
        problem = count_problem(step)
        if problem is not None:
            raise RuntimeError(f"step {problem}")
    return [int(step) + 1 for step in steps]


# The states that GPU kernels are compiled for, by the parameter's dtype; the CPU's take any.
GPU_STATES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}


def _check_gpu_dtypes(row: Row) -> None:
    param, grad = row.param.dtype, row.grad.dtype
    state = param if row.exp_avg is None else row.exp_avg.dtype
    if grad != param:
        raise ValueError(f"on a GPU the gradient of a {param} parameter must have its dtype; got {grad}")
    if state not in GPU_STATES[param]:
        known = " or ".join(map(str, GPU_STATES[param]))
        raise ValueError(f"on a GPU the states of a {param} parameter must be {known}; got {state}")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Row:
    """The tensors of one parameter. ``shard``: (offset, length, pitch) as in pointer_table.h; None for a whole one.

    ``noise_unit``: one float64, the momentum noise unit of the last step that moved, 0 for none; the kernel keeps it.
    """

    param: Tensor
    grad: Tensor
    step: Tensor
    stream: int
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    max_exp_avg_sq: Tensor | None = None
    anchor: Tensor | None = None
    shard: tuple[int, int, int] | None = None
    noise_unit: Tensor | None = None

    def scalars(self) -> tuple[Tensor | None, ...]:
        """One element each, which the kernel updates beside the operands."""
        return (self.step, self.noise_unit)

    def operands(self) -> tuple[Tensor | None, ...]:
        """In the order of the table's pointers and of the strides in ``layouts``."""
        return (self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq, self.anchor)

    def dtypes(self) -> int:
        """Codes in bytes: parameter, gradient, states, anchor, step."""
        state = self.param if self.exp_avg is None else self.exp_avg
        anchor = self.param if self.anchor is None else self.anchor
        code = 0
        for position, tensor in enumerate((self.param, self.grad, state, anchor, self.step)):
            code |= DTYPE_CODES[tensor.dtype] << 8 * position
        return code


def _layout(shape: Sequence[int], operands: Sequence[Tensor | None]) -> list[int]:
    """ndim, sizes, and each operand's strides, with dimensions merged where all operands step through them evenly."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d, size in enumerate(shape):
        steps = [tensor.stride(d) if tensor is not None else 0 for tensor in operands]
        if sizes and all(
            not known or known[-1] == step * size for known, step in zip(strides, steps, strict=True)
        ):
            sizes[-1] *= size
            for known, step in zip(strides, steps, strict=True):
                known[-1] = step
        else:
            sizes.append(size)
            for known, step in zip(strides, steps, strict=True):
                known.append(step)
    return [len(sizes), *sizes, *(step for known in strides for step in known)]


def _without_gaps(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class PointerTable:
    """A table over ``rows`` (all on one device; on a GPU, all with the same dtypes).

    Attributes:
        table: int64 [rows, 16].
        layouts: int64 [n], the sizes and strides of the rows that are not contiguous.
        chunks: int32 [blocks, 2], the (row, chunk in row) of every GPU block; empty on a CPU.
        scratch: int32 [1], the GPU blocks' count of those done; zero between steps.
        dtypes: the rows' dtype code (of the first row on a CPU, where each row's own counts).
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.device = rows[0].param.device
        self.dtypes = rows[0].dtypes() & 0xFFFFFFFF
        # The table holds addresses: whatever becomes of the tensors, this memory must stay. (Not that of the gradients,
        # which are new at every step.)
        kept = [
            t
            for row in rows
            for t in (*row.operands(), *row.scalars())
            if t is not None and t is not row.grad
        ]
        self._memory = [tensor.untyped_storage() for tensor in kept]
        layouts: list[int] = []
        words = [self._words(row, layouts) for row in rows]
        self._host = torch.tensor(words, dtype=torch.int64).view(len(rows), COLUMNS)
        self.layouts = torch.tensor(layouts or [0], dtype=torch.int64, device=self.device)
        self.scratch = torch.zeros(1, dtype=torch.int32, device=self.device)
        chunks: list[tuple[int, int]] = []
        if self.device.type != "cpu":
            for row in rows:
                _check_gpu_dtypes(row)
            chunks = [(i, c) for i, row in enumerate(rows) for c in range(-(-row.param.numel() // CHUNK))]
        self.chunks = torch.tensor(chunks, dtype=torch.int32).view(-1, 2).to(self.device)
        self._grads = [word[GRAD] for word in words]
        self._captured: list[Tensor] = []
        if self.device.type == "cpu":
            self.table = self._host
            self._grad_column = self._host.numpy()[:, GRAD]
        else:
            self.table = self._host.to(self.device)
            self._host = self._host.pin_memory() if self.device.type == "cuda" else self._host

    @staticmethod
    def _words(row: Row, layouts: list[int]) -> list[int]:
        operands = row.operands()
        numel = row.param.numel()
        offset, length, pitch = row.shard or (0, max(numel, 1), max(numel, 1))
        layout = dense = 0
        if not all(tensor is None or tensor.is_contiguous() for tensor in operands):
            layout = 1 + len(layouts)
            layouts += _layout(row.param.shape, operands)
            strides = {tensor.stride() for tensor in operands if tensor is not None}
            dense = int(len(strides) == 1 and _without_gaps(row.param))
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in operands]
        shard = (numel, row.stream, offset, length, pitch)
        noise_unit = 0 if row.noise_unit is None else row.noise_unit.data_ptr()
        return [*pointers, row.step.data_ptr(), *shard, row.dtypes(), layout, dense, noise_unit]

    def point_to_checked(self, check: Any) -> None:
        """``point_to`` the gradients of a native check."""
        if self.device.type == "cpu":
            check.write(self._host.data_ptr() + GRAD * 8, COLUMNS)
        else:
            self.point_to(check.addresses())

    def point_to(self, grads: list[int]) -> None:
        """Write the gradients' addresses of this step; on a GPU by one small copy, and only when they moved."""
        if self.device.type == "cpu":
            self._grad_column[:] = grads
            return
        if grads == self._grads:
            return
        self._grads = grads
        host = self._host
        if torch.cuda.is_current_stream_capturing():
            # The graph replays this copy from this very memory: it must not be written again.
            host = self._host.clone().pin_memory()
            self._captured.append(host)
        elif self._copied is not None:
            self._copied.synchronize()  # the copy of the step before has long ended, unless the GPU is a step behind
        host[:, GRAD] = torch.tensor(grads, dtype=torch.int64)
        self.table.copy_(host, non_blocking=True)
        if host is self._host:
            self._copied = torch.cuda.Event()
            self._copied.record()

    _copied: torch.cuda.Event | None = None
