"""The natural-gradient step of a mean-field Gaussian over a pointer table, by Triton.

csrc/formulas/variational_adam.h operation for operation; the formula and its source are in
fekernels.reference.optimizers.variational_adam.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fekernels.triton import numerics
from fekernels.triton.optimizers import codes
from fekernels.triton.optimizers import table_rows as rows_of

SUMMED = 1  # of the kernel's KIND: grad and anchor are sums over draws
CURVED = 2  # there may be a temperature above 0


@triton.jit
def update(mean, grad, exp_avg, hessian, product, hot, shared, KIND: tl.constexpr, FLAGS: tl.constexpr):
    """`variational_adam` of csrc/formulas/variational_adam.h; `shared`: the coefficients. `hot`: temperature > 0."""
    (
        one_minus_beta1, one_minus_beta2, inverse_bias1, step_size, weight_decay, precision_scale, radius, grad_scale,
    ) = shared  # fmt: skip
    if codes.SCALED & FLAGS:
        grad = numerics.divide(grad, grad_scale)
        if KIND & 2:
            product = numerics.divide(product, grad_scale)
    exp_avg = numerics.flushed(tl.fma(grad - exp_avg, one_minus_beta1, exp_avg), codes.ABOVE_OF_MOMENTUM)
    if KIND & 2:
        precision = hessian + weight_decay
        curvature = product * numerics.square_root(precision * precision_scale)
        change = (curvature - hessian) * one_minus_beta2
        updated = hessian + tl.fma(numerics.divide(change, precision) * 0.5, change, change)
        hessian = tl.where(hot, updated, hessian)
    drift = tl.fma(mean, weight_decay, exp_avg * inverse_bias1)
    move = numerics.divide(drift, hessian + weight_decay)
    move = tl.where(move > radius, radius, move)
    move = tl.where(move < radius * -1.0, radius * -1.0, move)
    return tl.fma(move, step_size * -1.0, mean), exp_avg, hessian


@triton.jit
def span(
    begin, left, addresses, layouts, layout, order, key, hot, shared,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, FLAGS: tl.constexpr, DTYPES: tl.constexpr,
):  # fmt: skip
    """Elements begin .. begin + left - 1 of one row. VECTOR: contiguous, aligned, in order, and whole groups only."""
    PARAM: tl.constexpr = DTYPES & 255
    GRAD: tl.constexpr = DTYPES >> 8 & 255
    STATE: tl.constexpr = DTYPES >> 16 & 255
    ANCHOR: tl.constexpr = DTYPES >> 24 & 255
    REAL: tl.constexpr = tl.float64 if DTYPES & 255 == codes.FLOAT64 else tl.float32
    # A 16-bit parameter is the rounding of its mean, which is another tensor.
    ROUNDED: tl.constexpr = (PARAM == codes.BFLOAT16 or PARAM == codes.FLOAT16) and KIND & 1 == 0
    for at in range(0, left, BLOCK):
        mask, first, offsets = rows_of.offsets(begin, at, left, layouts, layout, BLOCK, VECTOR, GROUP)
        if ROUNDED:
            mean = rows_of.read(addresses[4], first, offsets[4], mask, STATE, VECTOR).to(REAL)
        else:
            mean = rows_of.read(addresses[0], first, offsets[0], mask, PARAM, VECTOR).to(REAL)
        grad = rows_of.read(addresses[1], first, offsets[1], mask, GRAD, VECTOR).to(REAL)
        exp_avg = rows_of.read(addresses[2], first, offsets[2], mask, STATE, VECTOR).to(REAL)
        hessian = rows_of.read(addresses[3], first, offsets[3], mask, STATE, VECTOR).to(REAL)
        product = grad
        if KIND & 2:
            if KIND & 1:
                product = rows_of.read(addresses[5], first, offsets[5], mask, ANCHOR, VECTOR).to(REAL)
            else:
                normal = rows_of.normals(begin + at, order, key, BLOCK, VECTOR, GROUP, codes.WEIGHT_SAMPLE)
                product = grad * normal.to(REAL)
        mean, exp_avg, hessian = update(mean, grad, exp_avg, hessian, product, hot, shared, KIND, FLAGS)
        nothing = tl.zeros((BLOCK,), tl.uint32)
        rows_of.write(addresses[0], first, offsets[0], mean, nothing, mask, PARAM, VECTOR, False)
        rows_of.write(addresses[2], first, offsets[2], exp_avg, nothing, mask, STATE, VECTOR, False)
        if KIND & 2:
            rows_of.write(addresses[3], first, offsets[3], hessian, nothing, mask, STATE, VECTOR, False)
        if ROUNDED:
            rows_of.write(addresses[4], first, offsets[4], mean, nothing, mask, STATE, VECTOR, False)


@triton.jit(
    do_not_specialize=["rows", "blocks", "seed"],
    do_not_specialize_on_alignment=[
        "table", "layouts", "chunks", "scratch", "lr_tensor", "temperature_tensor", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def variational_adam_kernel(
    table, rows: tl.int32, layouts, chunks, blocks: tl.int32, scratch,
    lr: tl.float64, lr_tensor, temperature: tl.float64, temperature_tensor, weight_decay: tl.float64, ess: tl.float64,
    beta1: tl.float64, beta2: tl.float64, clip_radius: tl.float64, lr_scale: tl.float64, samples: tl.float64,
    seed: tl.int64, grad_scale, found_inf, KIND: tl.constexpr, FLAGS: tl.constexpr, DTYPES: tl.constexpr,
    BLOCK: tl.constexpr, SLOW_BLOCK: tl.constexpr, GROUP: tl.constexpr, VERSION: tl.constexpr,
):  # fmt: skip
    """One step of all rows; program b does the chunk that chunks[b] names."""
    REAL: tl.constexpr = tl.float64 if DTYPES & 255 == codes.FLOAT64 else tl.float32
    moves = True
    if found_inf is not None:
        moves = tl.load(found_inf) == 0.0
    if moves:
        block = tl.program_id(0)
        if block < blocks:
            begin, left, at, layout, order, t, stream, vector = rows_of.chunk_of(table, chunks, block, GROUP)
            row = table + tl.load(chunks + 2 * block).to(tl.int64) * codes.COLUMNS
            key = (tl.cast(seed, tl.int64), rows_of.draw_number(row), stream)
            heat = rows_of.scalar(temperature, temperature_tensor)
            b1, b2 = rows_of.scalar(beta1, None), rows_of.scalar(beta2, None)
            scale = tl.full((), 1.0, tl.float64)
            if grad_scale is not None:
                scale = tl.load(grad_scale).to(tl.float64)
            if KIND & 1:
                scale = scale * rows_of.scalar(samples, None)
            precision = tl.full((), 0.0, tl.float64)
            if heat > 0.0:
                precision = rows_of.scalar(ess, None) / heat
            shared = (
                (1.0 - b1).to(REAL), (1.0 - b2).to(REAL), (1.0 / (1.0 - numerics.integer_power(b1, t))).to(REAL),
                (rows_of.scalar(lr, lr_tensor) * rows_of.scalar(lr_scale, None)).to(REAL),
                rows_of.scalar(weight_decay, None).to(REAL), precision.to(REAL),
                rows_of.scalar(clip_radius, None).to(REAL), scale.to(REAL),
            )  # fmt: skip
            if vector:
                span(
                    begin, left, at, layouts, layout, order, key, heat > 0.0, shared,
                    True, BLOCK, GROUP, KIND, FLAGS, DTYPES,
                )  # fmt: skip
            else:
                span(
                    begin, left, at, layouts, layout, order, key, heat > 0.0, shared,
                    False, SLOW_BLOCK, GROUP, KIND, FLAGS, DTYPES,
                )  # fmt: skip
        if rows_of.finish(scratch):
            rows_of.advance_steps(table, rows)


def variational_adam_(
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
    lr, temperature, weight_decay, _, flags, ess, beta1, beta2, clip_radius, lr_scale, samples = settings
    kind = (SUMMED if samples else 0) | (CURVED if temperature_tensor is not None or temperature > 0 else 0)
    if samples or grad_scale is not None:
        flags = int(flags) | codes.SCALED.value
    values = (
        lr, lr_tensor, temperature, temperature_tensor, weight_decay, ess, beta1, beta2, clip_radius, lr_scale,
        samples, seed, grad_scale, found_inf,
    )  # fmt: skip
    rows_of.launch(variational_adam_kernel, table, layouts, chunks, scratch, values, kind, int(flags), dtypes)
