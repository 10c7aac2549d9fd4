"""Weights drawn from their mean-field Gaussian over a pointer table, by Triton.

csrc/formulas/variational_draw.h operation for operation; the formula and its source are in
fekernels.reference.optimizers.variational_draw.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fekernels.triton import numerics
from fekernels.triton.optimizers import codes
from fekernels.triton.optimizers import table_rows as rows_of


@triton.jit
def span(
    begin, left, addresses, layouts, layout, order, key, noisy, shared,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    NOISE: tl.constexpr, FLAGS: tl.constexpr, DTYPES: tl.constexpr,
):  # fmt: skip
    """Elements begin .. begin + left - 1 of one row. VECTOR: contiguous, aligned, in order, and whole groups only.

    NOISE: 0 for none, 1 where the standard deviation is of a curvature, 2 where it stands there itself.
    """
    PARAM: tl.constexpr = DTYPES & 255
    STATE: tl.constexpr = DTYPES >> 16 & 255
    REAL: tl.constexpr = tl.float64 if DTYPES & 255 == codes.FLOAT64 else tl.float32
    variance, weight_decay = shared
    for at in range(0, left, BLOCK):
        mask, first, offsets = rows_of.offsets(begin, at, left, layouts, layout, BLOCK, VECTOR, GROUP)
        param = rows_of.read(addresses[0], first, offsets[0], mask, PARAM, VECTOR).to(REAL)
        mean = param
        if PARAM == codes.BFLOAT16 or PARAM == codes.FLOAT16:
            # A parameter that is not the mean's rounding, somebody has set: it is the mean from now on.
            kept = rows_of.read(addresses[2], first, offsets[2], mask, STATE, VECTOR).to(REAL)
            if PARAM == codes.BFLOAT16:
                rounded = numerics.bf16_to_float(numerics.float_to_bf16(kept))
            else:
                rounded = numerics.fp16_to_float(numerics.float_to_fp16(kept))
            known = rounded.to(tl.int32, bitcast=True) == param.to(tl.int32, bitcast=True)
            mean = tl.where(known, kept, param)
        drawn = mean
        if NOISE != 0:
            spread = rows_of.read(addresses[3], first, offsets[3], mask, STATE, VECTOR).to(REAL)
            deviation = spread
            if NOISE == 1:
                of_all = tl.zeros((BLOCK,), REAL) + variance
                deviation = numerics.square_root(numerics.divide(of_all, spread + weight_decay))
            normal = rows_of.normals(begin + at, order, key, BLOCK, VECTOR, GROUP, codes.WEIGHT_SAMPLE).to(
                REAL
            )
            drawn = tl.where(noisy, tl.fma(deviation, normal, mean), mean)
        nothing = tl.zeros((BLOCK,), tl.uint32)
        rows_of.write(addresses[0], first, offsets[0], drawn, nothing, mask, PARAM, VECTOR, False)
        rows_of.write(addresses[2], first, offsets[2], mean, nothing, mask, STATE, VECTOR, False)


@triton.jit(
    do_not_specialize=["rows", "blocks", "seed"],
    do_not_specialize_on_alignment=[
        "table", "layouts", "chunks", "scratch", "lr_tensor", "temperature_tensor", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def variational_draw_kernel(
    table, rows: tl.int32, layouts, chunks, blocks: tl.int32, scratch, temperature: tl.float64, temperature_tensor,
    weight_decay: tl.float64, ess: tl.float64, seed: tl.int64, NOISE: tl.constexpr, FLAGS: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, SLOW_BLOCK: tl.constexpr, GROUP: tl.constexpr, VERSION: tl.constexpr,
):  # fmt: skip
    """A draw of all rows; program b does the chunk that chunks[b] names."""
    REAL: tl.constexpr = tl.float64 if DTYPES & 255 == codes.FLOAT64 else tl.float32
    block = tl.program_id(0)
    if block < blocks:
        begin, left, at, layout, order, t, stream, vector = rows_of.chunk_of(table, chunks, block, GROUP)
        key = (tl.cast(seed, tl.int64), t, stream)
        heat = rows_of.scalar(temperature, temperature_tensor)
        shared = ((heat / rows_of.scalar(ess, None)).to(REAL), rows_of.scalar(weight_decay, None).to(REAL))
        if vector:
            span(
                begin, left, at, layouts, layout, order, key, heat > 0.0, shared,
                True, BLOCK, GROUP, NOISE, FLAGS, DTYPES,
            )  # fmt: skip
        else:
            span(
                begin, left, at, layouts, layout, order, key, heat > 0.0, shared,
                False, SLOW_BLOCK, GROUP, NOISE, FLAGS, DTYPES,
            )  # fmt: skip
    if rows_of.finish(scratch):
        rows_of.advance_steps(table, rows)


def variational_draw_(
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
    _, temperature, weight_decay, _, flags, ess, deviations = settings
    noise = 0 if temperature_tensor is None and not temperature > 0 else 1 + (deviations != 0)
    values = (temperature, temperature_tensor, weight_decay, ess, seed)
    rows_of.launch(
        variational_draw_kernel, table, layouts, chunks, scratch, values, noise, int(flags), dtypes
    )
