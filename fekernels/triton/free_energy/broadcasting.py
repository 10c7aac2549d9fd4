"""Operands of the free energy on a tile of [ROWS, COLUMNS] elements: loads, stores and sums.

An operand is full, one row for all ("column": it varies over columns), one column for all ("row"), or a scalar. Kernels
take all of that as one constexpr, a byte per operand: its shape, whether its gradient is wanted, and then the region of
the partial sums that is this gradient's (of its kind: sums over columns, sums over rows).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fekernels.triton import numerics
from fekernels.triton.free_energy import operand_flags as codes


@triton.jit
def widen(value):
    """float32 of a loaded value; 16-bit floats come as their bits."""
    if value.dtype == tl.float32:
        return value
    elif value.dtype == tl.bfloat16:
        return numerics.bf16_to_float(value.to(tl.uint16, bitcast=True))
    else:
        return numerics.fp16_to_float(value.to(tl.uint16, bitcast=True))


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """The counterpart of `widen`, rounded to nearest even. By integers: the bits of a NaN are part of the result."""
    if DTYPE == tl.float32:
        return value
    elif DTYPE == tl.bfloat16:
        return numerics.float_to_bf16(value).to(tl.bfloat16, bitcast=True)
    else:
        return numerics.float_to_fp16(value).to(tl.float16, bitcast=True)


@triton.jit
def full_pointers(pointer, row, pitch, begin, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """Addresses of rows `row` (int64 [ROWS]), columns begin .. begin + COLUMNS - 1. pitch: of rows, in ALIGNs.

    ALIGN elements that begin at a multiple of ALIGN columns are promised to be one aligned piece. The promise is made
    on a pointer that is born here: one made on an argument would be dropped, as it is where `begin` is the constant 0.
    """
    BYTES: tl.constexpr = ALIGN * pointer.dtype.element_ty.primitive_bitwidth // 8
    start = tl.multiple_of(pointer + begin, 16 if BYTES > 16 else BYTES)
    return start + (row * pitch * ALIGN)[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load(
    pointer, row, pitch, begin, valid, row_valid, column_valid,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """An operand's tile, float32, 0 where there is none. pitch: of rows, in ALIGNs if full, in elements if row."""
    if KIND == codes.FULL:
        value = tl.load(full_pointers(pointer, row, pitch, begin, COLUMNS, ALIGN), mask=valid, other=0)
        return widen(value)
    elif KIND == codes.COLUMN:
        value = tl.load(pointer + begin + tl.arange(0, COLUMNS), mask=column_valid, other=0)
        return tl.broadcast_to(widen(value)[None, :], (ROWS, COLUMNS))
    elif KIND == codes.ROW:
        value = tl.load(pointer + row * pitch, mask=row_valid, other=0)
        return tl.broadcast_to(widen(value)[:, None], (ROWS, COLUMNS))
    else:
        return tl.broadcast_to(widen(tl.load(pointer)), (ROWS, COLUMNS))


@triton.jit
def quads(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(x0 + x1) + (x2 + x3) of each four neighbours in a row, as float64 [ROWS, COLUMNS // 4].

    Sums go on in float64, where they are exact unless values differ by a factor of millions, so that no order in which
    a layout adds them shows in a result: neither the batch, nor the alignment, nor the shape of an operand.
    """
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 4, 2, 2)))
    first, second = tl.split(even + odd)
    return (first + second).to(tl.float64)


@triton.jit
def row_scale(weight, upstream, scale, row, row_valid, ROWS: tl.constexpr):
    """What multiplies a row's gradients: weight * (upstream or `scale`), in float32."""
    shared = tl.full((), scale, tl.float64).to(tl.float32)
    value = tl.broadcast_to(shared, (ROWS,))
    if upstream is not None:
        value = tl.load(upstream + row, mask=row_valid, other=0.0)
    if weight is not None:
        factor = tl.load(weight + row, mask=row_valid, other=0.0)
        value = tl.where(factor == 0.0, 0.0, factor * value)
    return value


@triton.jit
def kept(weight, row, valid):
    """``valid`` but for rows whose weight is 0, which count nothing, whatever they hold."""
    if weight is not None:
        valid = valid & (tl.load(weight + row, mask=valid, other=0.0) != 0.0)
    return valid
