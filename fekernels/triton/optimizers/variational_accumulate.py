"""Sums over draws of a gradient, and of its product with the draw's normal, over a pointer table, by Triton.

csrc/formulas/variational_accumulate.h operation for operation; the formula and its source are in
fekernels.reference.optimizers.variational_accumulate.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fekernels.triton.optimizers import codes
from fekernels.triton.optimizers import table_rows as rows_of


@triton.jit
def span(
    begin, left, addresses, layouts, layout, order, key,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, DTYPES: tl.constexpr,
):  # fmt: skip
    """Elements begin .. begin + left - 1 of one row. VECTOR: contiguous, aligned, in order, and whole groups only."""
    GRAD: tl.constexpr = DTYPES >> 8 & 255
    STATE: tl.constexpr = DTYPES >> 16 & 255
    REAL: tl.constexpr = tl.float64 if DTYPES & 255 == codes.FLOAT64 else tl.float32
    for at in range(0, left, BLOCK):
        mask, first, offsets = rows_of.offsets(begin, at, left, layouts, layout, BLOCK, VECTOR, GROUP)
        grad = rows_of.read(addresses[1], first, offsets[1], mask, GRAD, VECTOR).to(REAL)
        normal = rows_of.normals(begin + at, order, key, BLOCK, VECTOR, GROUP, codes.WEIGHT_SAMPLE).to(REAL)
        if FIRST:
            total = grad
            product = grad * normal
        else:
            total = rows_of.read(addresses[2], first, offsets[2], mask, STATE, VECTOR).to(REAL) + grad
            product = rows_of.read(addresses[3], first, offsets[3], mask, STATE, VECTOR).to(REAL)
            product = tl.fma(grad, normal, product)
        nothing = tl.zeros((BLOCK,), tl.uint32)
        rows_of.write(addresses[2], first, offsets[2], total, nothing, mask, STATE, VECTOR, False)
        rows_of.write(addresses[3], first, offsets[3], product, nothing, mask, STATE, VECTOR, False)


@triton.jit(
    do_not_specialize=["rows", "blocks", "seed"],
    do_not_specialize_on_alignment=[
        "table", "layouts", "chunks", "scratch", "lr_tensor", "temperature_tensor", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def variational_accumulate_kernel(
    table, rows: tl.int32, layouts, chunks, blocks: tl.int32, scratch, seed: tl.int64, found_inf,
    FIRST: tl.constexpr, FLAGS: tl.constexpr, DTYPES: tl.constexpr,
    BLOCK: tl.constexpr, SLOW_BLOCK: tl.constexpr, GROUP: tl.constexpr, VERSION: tl.constexpr,
):  # fmt: skip
    """The sums of all rows; program b does the chunk that chunks[b] names. Nothing counts up afterwards."""
    moves = True
    if found_inf is not None:
        moves = tl.load(found_inf) == 0.0
    block = tl.program_id(0)
    if moves & (block < blocks):
        begin, left, at, layout, order, t, stream, vector = rows_of.chunk_of(table, chunks, block, GROUP)
        row = table + tl.load(chunks + 2 * block).to(tl.int64) * codes.COLUMNS
        key = (tl.cast(seed, tl.int64), rows_of.draw_number(row), stream)
        if vector:
            span(begin, left, at, layouts, layout, order, key, True, BLOCK, GROUP, FIRST, DTYPES)
        else:
            span(begin, left, at, layouts, layout, order, key, False, SLOW_BLOCK, GROUP, FIRST, DTYPES)


def variational_accumulate_(
    table: torch.Tensor,
    layouts: torch.Tensor,
    chunks: torch.Tensor,
    scratch: torch.Tensor,
    settings: Sequence[float],
    lr_tensor: torch.Tensor | None,
    temperature_tensor: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    seed: int,
    dtypes: int,
) -> None:
    """The operator of the same name in fekernels.ops.optimizers. dtypes: the table's column 12, one for all rows."""
    flags, samples = settings[4:]
    values = (seed, found_inf)
    rows_of.launch(
        variational_accumulate_kernel,
        table,
        layouts,
        chunks,
        scratch,
        values,
        samples == 0,
        int(flags),
        dtypes,
    )
