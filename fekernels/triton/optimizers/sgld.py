"""Plain stochastic gradient Langevin dynamics over a pointer table, by Triton.

csrc/formulas/sgld.h operation for operation; the formula and its source are in fekernels.reference.optimizers.sgld.
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
    begin, left, addresses, layouts, layout, order, key, noisy, grad_scale, shared,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    NOISE: tl.constexpr, FLAGS: tl.constexpr, DTYPES: tl.constexpr,
):  # fmt: skip
    """Elements begin .. begin + left - 1 of one row. VECTOR: contiguous, aligned, in order, and whole groups only."""
    PARAM: tl.constexpr = DTYPES & 255
    GRAD: tl.constexpr = DTYPES >> 8 & 255
    ANCHOR: tl.constexpr = DTYPES >> 24 & 255
    REAL: tl.constexpr = tl.float64 if DTYPES & 255 == codes.FLOAT64 else tl.float32
    ROUND: tl.constexpr = codes.STOCHASTIC & FLAGS != 0
    minus_h, noise_scale, weight_decay, prior_precision = shared
    for at in range(0, left, BLOCK):
        mask, first, offsets = rows_of.offsets(begin, at, left, layouts, layout, BLOCK, VECTOR, GROUP)
        param = rows_of.read(addresses[0], first, offsets[0], mask, PARAM, VECTOR).to(REAL)
        grad = rows_of.read(addresses[1], first, offsets[1], mask, GRAD, VECTOR).to(REAL)
        if codes.SCALED & FLAGS:
            grad = numerics.divide(grad, grad_scale)
        if codes.MAXIMIZE & FLAGS:
            grad = grad * -1.0  # older Tritons make 0 - grad of -grad, which differs in the sign of 0
        if codes.DECAY & FLAGS:
            grad = tl.fma(param, weight_decay, grad)
        if codes.PRIOR & FLAGS:
            anchor = tl.zeros((BLOCK,), REAL)
            if addresses[5] != 0:
                anchor = rows_of.read(addresses[5], first, offsets[5], mask, ANCHOR, VECTOR).to(REAL)
            grad = tl.fma(param - anchor, prior_precision, grad)
        param = tl.fma(grad, minus_h, param)

        here = begin + at
        if NOISE:
            if codes.MAYBE_QUIET & FLAGS:
                if noisy:
                    normal = rows_of.normals(here, order, key, BLOCK, VECTOR, GROUP)
                    param = tl.fma(normal.to(REAL), noise_scale, param)
            else:
                normal = rows_of.normals(here, order, key, BLOCK, VECTOR, GROUP)
                param = tl.fma(normal.to(REAL), noise_scale, param)
        word = tl.zeros((BLOCK,), tl.uint32)
        if ROUND and PARAM == codes.BFLOAT16:
            word = rows_of.rounding_words(here, order, key, BLOCK, VECTOR, GROUP)
        rows_of.write(addresses[0], first, offsets[0], param, word & 0xFFFF, mask, PARAM, VECTOR, ROUND)


@triton.jit(
    do_not_specialize=["rows", "blocks", "seed"],
    do_not_specialize_on_alignment=[
        "table", "layouts", "chunks", "scratch", "lr_tensor", "temperature_tensor", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def sgld_kernel(
    table, rows: tl.int32, layouts, chunks, blocks: tl.int32, scratch, lr: tl.float64, lr_tensor,
    temperature: tl.float64, temperature_tensor, weight_decay: tl.float64, prior_precision: tl.float64,
    seed: tl.int64, grad_scale, found_inf, NOISE: tl.constexpr, FLAGS: tl.constexpr, DTYPES: tl.constexpr,
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
            key = (tl.cast(seed, tl.int64), t, stream)
            h = rows_of.scalar(lr, lr_tensor)
            heat = rows_of.scalar(temperature, temperature_tensor)
            noisy = (heat > 0.0) & (h > 0.0)
            scale = tl.full((), 1.0, REAL)
            if codes.SCALED & FLAGS:
                scale = tl.load(grad_scale).to(REAL)
            shared = (
                (h * -1.0).to(REAL), tl.sqrt(2.0 * heat * h).to(REAL), rows_of.scalar(weight_decay, None).to(REAL),
                rows_of.scalar(prior_precision, None).to(REAL),
            )  # fmt: skip
            if vector:
                span(
                    begin, left, at, layouts, layout, order, key, noisy, scale, shared,
                    True, BLOCK, GROUP, NOISE, FLAGS, DTYPES,
                )  # fmt: skip
            else:
                span(
                    begin, left, at, layouts, layout, order, key, noisy, scale, shared,
                    False, SLOW_BLOCK, GROUP, NOISE, FLAGS, DTYPES,
                )  # fmt: skip
        if rows_of.finish(scratch):
            rows_of.advance_steps(table, rows)


def sgld_(
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
    lr, temperature, weight_decay, prior_precision, bits = settings
    from_tensors = lr_tensor is not None or temperature_tensor is not None
    noisy = from_tensors or (temperature > 0 and lr > 0)
    flags = int(bits) | rows_of.features(weight_decay, prior_precision, grad_scale, from_tensors)
    values = (
        lr, lr_tensor, temperature, temperature_tensor, weight_decay, prior_precision, seed, grad_scale, found_inf,
    )  # fmt: skip
    rows_of.launch(sgld_kernel, table, layouts, chunks, scratch, values, noisy, flags, dtypes)
