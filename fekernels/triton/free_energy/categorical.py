"""Kernel of the categorical energy, logsumexp(l) - l[target] at each position, and softmax(l) - onehot(target)."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fekernels.triton import functions as f
from fekernels.triton.free_energy import broadcasting as operands


@triton.jit
def logits_of(
    logits, first, at, classes, position_valid, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr
):
    """A tile of logits, float32, minus infinity where there is none. first: the index of its first position's first."""
    column = at + tl.arange(0, COLUMNS)
    valid = position_valid[:, None] & (column // ALIGN < classes // ALIGN)[None, :]
    pointers = operands.full_pointers(
        logits, tl.arange(0, ROWS).to(tl.int64), classes // ALIGN, first + at, COLUMNS, ALIGN
    )
    return tl.where(valid, operands.widen(tl.load(pointers, mask=valid, other=0)), float("-inf")), valid


@triton.jit
def larger(a, b):
    """The maximum; NaN if one is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def target_of(logit, label, at, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile's share of each row's logit of class `label`: that, or 0."""
    hit = (at + tl.arange(0, COLUMNS))[None, :] == label[:, None]
    return tl.sum(tl.where(hit, logit, 0.0), 1)


@triton.jit
def store_gradient(
    grad, logit, shift, total, row_scale, counts, label, first, at, classes, valid,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    softmax = tl.div_rn(f.exp_negative(logit - shift[:, None]), tl.broadcast_to(total[:, None], logit.shape))
    hit = (at + tl.arange(0, COLUMNS))[None, :] == label[:, None]
    value = tl.where(hit, softmax - 1.0, softmax) * row_scale[:, None]
    value = operands.narrow(tl.where(counts[:, None], value, 0.0), grad.dtype.element_ty)
    pointers = operands.full_pointers(
        grad, tl.arange(0, ROWS).to(tl.int64), classes // ALIGN, first + at, COLUMNS, ALIGN
    )
    tl.store(pointers, value, mask=valid)


@triton.jit(
    do_not_specialize=["positions", "rows_positions", "classes"],
    do_not_specialize_on_alignment=["logits", "target", "mask", "weight", "upstream", "grad", "sums"],
)
def categorical_kernel(
    logits, target, mask, weight, upstream, grad, sums, positions: tl.int64, rows_positions: tl.int64,
    classes: tl.int32, scale: tl.float64,
    PER_ROW: tl.constexpr, ONE_TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Positions ROWS * b .. of `positions` (of all rows together) by program b; a row has `rows_positions`.

    PER_ROW: `sums` takes every position's energy; else one per program, weighted.
    """
    program = tl.program_id(0)
    position = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = program.to(tl.int64) * ROWS * (classes // ALIGN) * ALIGN
    valid = position < positions
    row = position // rows_positions
    counts = operands.kept(weight, row, valid)
    if mask is not None:
        counts = counts & (tl.load(mask + position, mask=valid, other=0) != 0)
    label = tl.load(target + position, mask=counts, other=0)
    nowhere = (label < 0) | (label >= classes)

    shift = tl.full((ROWS,), float("-inf"), tl.float32)
    chosen = tl.zeros((ROWS,), tl.float32)
    wide_total = tl.zeros((ROWS,), tl.float64)
    if ONE_TILE:
        logit, filled = logits_of(logits, first, 0, classes, valid, ROWS, COLUMNS, ALIGN)
        shift = tl.reduce(logit, 1, larger)
        chosen = target_of(logit, label, 0, ROWS, COLUMNS)
        wide_total = tl.sum(operands.quads(f.exp_negative(logit - shift[:, None]), ROWS, COLUMNS), 1)
    else:
        largest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
        for at in range(0, classes, COLUMNS):
            logit, filled = logits_of(logits, first, at, classes, valid, ROWS, COLUMNS, ALIGN)
            largest = larger(largest, logit)
            chosen += target_of(logit, label, at, ROWS, COLUMNS)
        shift = tl.reduce(largest, 1, larger)
        parts = tl.zeros((ROWS, COLUMNS // 4), tl.float64)
        for at in range(0, classes, COLUMNS):
            logit, filled = logits_of(logits, first, at, classes, valid, ROWS, COLUMNS, ALIGN)
            parts += operands.quads(f.exp_negative(logit - shift[:, None]), ROWS, COLUMNS)
        wide_total = tl.sum(parts, 1)
    total = wide_total.to(tl.float32)
    energy = tl.where(nowhere, float("nan"), f.log(total) - (chosen - shift))
    energy = tl.where(counts, energy, 0.0).to(tl.float64)
    if PER_ROW:
        tl.store(sums + position, energy, mask=valid)
    else:
        if weight is not None:
            energy *= tl.load(weight + row, mask=valid, other=0.0).to(tl.float64)
        tl.store(sums + program, tl.sum(energy, 0))

    if grad is not None:
        row_scale = tl.where(
            nowhere, float("nan"), operands.row_scale(weight, upstream, scale, row, valid, ROWS)
        )
        if ONE_TILE:
            store_gradient(
                grad, logit, shift, total, row_scale, counts, label, first, 0, classes, filled, ROWS, COLUMNS, ALIGN
            )  # fmt: skip
        else:
            for at in range(0, classes, COLUMNS):
                logit, filled = logits_of(logits, first, at, classes, valid, ROWS, COLUMNS, ALIGN)
                store_gradient(
                    grad, logit, shift, total, row_scale, counts, label, first, at, classes, filled,
                    ROWS, COLUMNS, ALIGN,
                )  # fmt: skip
