"""A step over the pointer table of csrc/core: its launch; and on the device loads, stores, noise, step counters."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fekernels.triton import numerics
from fekernels.triton.launch import EXACT, on_device_of
from fekernels.triton.optimizers import codes


@functools.cache
def configuration(dtypes: int, flags: int) -> dict[str, int]:
    """Block sizes and launch options for tensors of these dtypes (the table's column 12), and the kernel's flags.

    A thread of the fast path takes 16 bytes of the narrowest tensor, one of the slow path a single element: more would
    cost registers, which hide latency better as further programs of the same multiprocessor. `maxnreg` leaves room for
    eight programs in float32 (six with rarer terms), four where a thread has eight elements, three in float64, and
    nothing spills. Left alone, ptxas takes more than it needs, and for sm_90 spills all the same.

    GROUP, elements that the fast path takes or leaves as one, is 8 where there are 16-bit tensors: 16 bytes of them,
    and one counter block of the rounding noise of exp_avg_sq.
    """
    used = {dtypes >> shift & 255 for shift in (0, 8, 16)}
    narrow = not used.isdisjoint({codes.BFLOAT16.value, codes.FLOAT16.value})
    if codes.FLOAT64.value in used:
        registers = 168
    elif narrow:
        registers = 128
    else:
        registers = 80 if flags & (codes.AMSGRAD.value | codes.PRIOR.value) else 64
    return {
        "BLOCK": 1024 if narrow else 512,
        "SLOW_BLOCK": 128,
        "GROUP": 8 if narrow else 4,
        "VERSION": codes.VERSION,
        "num_warps": 4,
        "maxnreg": registers,
    }


def features(
    weight_decay: float, prior_precision: float, grad_scale: torch.Tensor | None, from_tensors: bool
) -> int:
    """The flags of what is in use. from_tensors: lr or temperature is one; only the device knows if there is noise."""
    return (
        (codes.DECAY.value if weight_decay != 0 else 0)
        | (codes.PRIOR.value if prior_precision != 0 else 0)
        | (codes.SCALED.value if grad_scale is not None else 0)
        | (codes.MAYBE_QUIET.value if from_tensors else 0)
    )


def chunks_of(table: torch.Tensor, chunks: torch.Tensor, dtypes: int) -> torch.Tensor:
    """`chunks`, or for the interpreter, as a table on a CPU comes without, those of its rows.

    Raises:
        ValueError: rows of several dtypes on a CPU (on a GPU the caller has parted them).
    """
    if table.is_cuda:
        return chunks
    found = (table[:, codes.DTYPES.value] & 0xFFFFFFFF).unique().tolist()
    if found != [dtypes & 0xFFFFFFFF]:
        raise ValueError(
            f"Triton: the rows of a table must all have dtypes {dtypes & 0xFFFFFFFF:#x}; got {found}"
        )
    sizes = table[:, codes.NUMEL.value].tolist()
    pairs = [
        (row, chunk) for row, numel in enumerate(sizes) for chunk in range(-(-numel // codes.CHUNK.value))
    ]
    return torch.tensor(pairs, dtype=torch.int32).view(-1, 2)


def launch(
    kernel: Any,
    table: torch.Tensor,
    layouts: torch.Tensor,
    chunks: torch.Tensor,
    scratch: torch.Tensor,
    values: tuple[Any, ...],
    noise: int,
    flags: int,
    dtypes: int,
) -> None:
    """One step of all rows. values: the kernel's parameters between those that every step has."""
    rows = table.shape[0]
    if rows == 0:
        return
    chunks = chunks_of(table, chunks, dtypes)
    blocks = chunks.shape[0]
    with on_device_of(table):
        # Where no row has elements there is still one program, as the steps advance.
        kernel[(max(blocks, 1),)](
            table, rows, layouts, chunks, blocks, scratch, *values, noise, flags, dtypes,
            **configuration(dtypes, flags), **EXACT,
        )  # fmt: skip


@triton.jit
def read(address, begin, offsets, mask, CODE: tl.constexpr, VECTOR: tl.constexpr):
    """Elements begin + offsets (scalar, tensor) of the tensor at `address` (int64), as float64 or else as float32.

    VECTOR promises that they begin at a multiple of 16 bytes. The promise must not outlive the branch that checked it,
    so it is made on a pointer that is born here.
    """
    if CODE == codes.FLOAT32:
        start = address.to(tl.pointer_type(tl.float32))
    elif CODE == codes.FLOAT64:
        start = address.to(tl.pointer_type(tl.float64))
    else:
        start = address.to(tl.pointer_type(tl.uint16))
    start += begin
    if VECTOR:
        start = tl.multiple_of(start, 16)
    bits = tl.load(start + offsets, mask=mask, other=0)
    if CODE == codes.BFLOAT16:
        return numerics.bf16_to_float(bits)
    elif CODE == codes.FLOAT16:
        return numerics.fp16_to_float(bits)
    else:
        return bits


@triton.jit
def write(
    address, begin, offsets, value, rounding, mask, CODE: tl.constexpr, VECTOR: tl.constexpr, ROUND: tl.constexpr
):  # fmt: skip
    """The counterpart of `read`. rounding: 16 random bits per element (uint32), used if ROUND and bfloat16."""
    if CODE == codes.FLOAT32:
        start = address.to(tl.pointer_type(tl.float32))
        stored = value.to(tl.float32)
    elif CODE == codes.FLOAT64:
        start = address.to(tl.pointer_type(tl.float64))
        stored = value.to(tl.float64)
    else:
        start = address.to(tl.pointer_type(tl.uint16))
        if CODE == codes.FLOAT16:
            stored = numerics.float_to_fp16(value.to(tl.float32))
        elif ROUND:
            stored = numerics.float_to_bf16_stochastic(value.to(tl.float32), rounding)
        else:
            stored = numerics.float_to_bf16(value.to(tl.float32))
    start += begin
    if VECTOR:
        start = tl.multiple_of(start, 16)
    tl.store(start + offsets, stored, mask=mask)


@triton.jit
def strided_offsets(element, layouts, layout):
    """Where logical element `element` (int64 tensor) lies in each operand, in the order of the table's pointers."""
    start = layouts + (layout - 1)
    dimensions = tl.load(start).to(tl.int32)
    p0 = element * 0
    p1 = p0
    p2 = p0
    p3 = p0
    p4 = p0
    p5 = p0
    for back in range(dimensions):
        here = start + (dimensions - back)
        size = tl.load(here)
        position = element % size
        element = element // size
        p0 += position * tl.load(here + dimensions)
        p1 += position * tl.load(here + 2 * dimensions)
        p2 += position * tl.load(here + 3 * dimensions)
        p3 += position * tl.load(here + 4 * dimensions)
        p4 += position * tl.load(here + 5 * dimensions)
        p5 += position * tl.load(here + 6 * dimensions)
    return p0, p1, p2, p3, p4, p5


@triton.jit
def offsets(begin, at, left, layouts, layout, BLOCK: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr):
    """Of elements begin + at .. begin + at + BLOCK - 1: which exist, and where `read` finds them in each operand."""
    lane = at + tl.arange(0, BLOCK)
    if VECTOR:
        # One truth for all of a group, so that masked loads and stores stay whole.
        return lane // GROUP < left // GROUP, begin, (lane, lane, lane, lane, lane, lane)
    else:
        element = begin + lane
        p0, p1, p2, p3, p4, p5 = element, element, element, element, element, element
        if layout != 0:
            p0, p1, p2, p3, p4, p5 = strided_offsets(element, layouts, layout)
        return lane < left, begin * 0, (p0, p1, p2, p3, p4, p5)


@triton.jit
def global_index(begin, BLOCK: tl.constexpr, order):
    """Indices in the whole parameter of elements begin .. begin + BLOCK - 1 of this shard."""
    offset, length, pitch, in_order = order
    element = begin + tl.arange(0, BLOCK)
    return offset + (element // length) * pitch + element % length


@triton.jit
def normals(
    begin, order, key, BLOCK: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr,
    PURPOSE: tl.constexpr = codes.LANGEVIN_NOISE,
):  # fmt: skip
    """Normal numbers of elements begin .. begin + BLOCK - 1 of a row.

    order = offset, length, pitch, in_order. in_order: consecutive elements are consecutive in the whole parameter and
    `offset` is a multiple of GROUP, so that elements share counter blocks; VECTOR says so at compile time.
    key = seed, step, stream.
    """
    offset, length, pitch, in_order = order
    seed, t, stream = key
    if VECTOR:
        return numerics.normals_from(offset + begin, BLOCK, seed, t, stream, PURPOSE, GROUP)
    else:
        if in_order:
            z = numerics.normals_from(offset + begin, BLOCK, seed, t, stream, PURPOSE, 4)
        else:
            z = numerics.normals_at(global_index(begin, BLOCK, order), seed, t, stream, PURPOSE)
        return z


@triton.jit
def rounding_words(begin, order, key, BLOCK: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr):
    """One word per element for stochastic rounding: the low half for the parameter, the high half for exp_avg."""
    offset, length, pitch, in_order = order
    seed, t, stream = key
    if VECTOR:
        return numerics.words_from(offset + begin, BLOCK, seed, t, stream, codes.STOCHASTIC_ROUNDING, GROUP)
    else:
        if in_order:
            word = numerics.words_from(offset + begin, BLOCK, seed, t, stream, codes.STOCHASTIC_ROUNDING, 4)
        else:
            word = numerics.words_at(
                global_index(begin, BLOCK, order), seed, t, stream, codes.STOCHASTIC_ROUNDING
            )
        return word


@triton.jit
def rounding_halves(begin, order, key, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Sixteen bits per element for exp_avg_sq: the halves, in order, of a stream of their own."""
    offset, length, pitch, in_order = order
    seed, t, stream = key
    stream = stream ^ 0x80000000
    if VECTOR:
        return numerics.halves_from(offset + begin, BLOCK, seed, t, stream, codes.STOCHASTIC_ROUNDING)
    else:
        if in_order:
            half = numerics.halves_from(offset + begin, BLOCK, seed, t, stream, codes.STOCHASTIC_ROUNDING)
        else:
            half = numerics.halves_at(
                global_index(begin, BLOCK, order), seed, t, stream, codes.STOCHASTIC_ROUNDING
            )
        return half


@triton.jit
def scalar(value, pointer):
    """A hyperparameter as float64: `*pointer` where there is a one-element tensor, else `value`."""
    if pointer is not None:
        return tl.load(pointer).to(tl.float64)
    else:
        return tl.full((), value, tl.float64)


@triton.jit
def has_float64_step(row):
    """Whether the step of the row (or rows) at `row` is float64; else it is float32. It may differ from row to row."""
    return (tl.load(row + codes.DTYPES) >> 32) & 255 == codes.FLOAT64


@triton.jit
def chunk_of(table, chunks, block, GROUP: tl.constexpr):
    """What program `block` works on: begin, left, addresses, layout, order, t and stream, and whether VECTOR holds."""
    row = table + tl.load(chunks + 2 * block).to(tl.int64) * codes.COLUMNS
    begin = tl.load(chunks + 2 * block + 1).to(tl.int64) * codes.CHUNK
    numel = tl.load(row + codes.NUMEL)
    left = tl.minimum(numel - begin, codes.CHUNK).to(tl.int32)
    a0, a1, a2 = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    a3, a4, a5 = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    offset = tl.load(row + codes.OFFSET)
    length = tl.load(row + codes.LENGTH)
    layout = tl.load(row + codes.LAYOUT)
    in_order = (length >= numel) & (offset % GROUP == 0)
    aligned = (a0 | a1 | a2 | a3 | a4 | a5) % 16 == 0
    vector = in_order & aligned & (layout == 0) & (left % GROUP == 0)

    step = tl.load(row + codes.STEP)
    before = tl.full((), 0.0, tl.float64)
    if has_float64_step(row):
        before = tl.load(step.to(tl.pointer_type(tl.float64)))
    else:
        before = tl.load(step.to(tl.pointer_type(tl.float32))).to(tl.float64)
    t = (before + 1.0).to(tl.int64).to(tl.uint32)
    stream = tl.load(row + codes.STREAM).to(tl.uint32)
    order = (offset, length, tl.load(row + codes.PITCH), in_order)
    return begin, left, (a0, a1, a2, a3, a4, a5), layout, order, t, stream, vector


@triton.jit
def draw_number(row):
    """What stands at a row's noise_unit where that counts draws of the weights; 0 where there is none."""
    at = tl.load(row + codes.NOISE_UNIT)
    number = tl.full((), 0.0, tl.float64)
    if at != 0:
        number = tl.load(at.to(tl.pointer_type(tl.float64)))
    return number.to(tl.int64).to(tl.uint32)


@triton.jit
def finish(scratch):
    """Whether this program is the last of the launch to reach this; it then leaves `scratch` at 0 for the next launch.

    The barrier makes sure that every thread has read what the last program is about to change.
    """
    tl.debug_barrier()
    last = tl.atomic_add(scratch, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(scratch, 0)
    return last


@triton.jit
def advance_steps(table, rows):
    """Adds 1 to the step of every row."""
    for begin in range(0, rows, codes.ROWS_AT_ONCE):
        index = begin + tl.arange(0, codes.ROWS_AT_ONCE)
        valid = index < rows
        # Beyond the last row stands in the first, so that every address is one.
        row = table + tl.where(valid, index, 0).to(tl.int64) * codes.COLUMNS
        double_step = has_float64_step(row)
        address = tl.load(row + codes.STEP)
        single = address.to(tl.pointer_type(tl.float32))
        double = address.to(tl.pointer_type(tl.float64))
        tl.store(
            single,
            tl.load(single, mask=valid & (double_step == 0), other=0) + 1,
            mask=valid & (double_step == 0),
        )
        tl.store(double, tl.load(double, mask=valid & double_step, other=0) + 1, mask=valid & double_step)


@triton.jit
def set_noise_units(table, rows, unit):
    """Writes `unit` (float64) where rows keep that of the noise in their momentum."""
    for begin in range(0, rows, codes.ROWS_AT_ONCE):
        index = begin + tl.arange(0, codes.ROWS_AT_ONCE)
        valid = index < rows
        address = tl.load(table + tl.where(valid, index, 0).to(tl.int64) * codes.COLUMNS + codes.NOISE_UNIT)
        tl.store(address.to(tl.pointer_type(tl.float64)), unit, mask=valid & (address != 0))
