"""Kernels of the free energy: terms and their gradients on tiles, and the sums of what the tiles left.

Sums are of float64 partial sums in a fixed order, with no atomics, so results repeat bit for bit, and a row's partial
sums depend on its own columns alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from fekernels.triton.free_energy import broadcasting as operands
from fekernels.triton.free_energy import likelihoods
from fekernels.triton.free_energy import operand_flags as codes


@triton.jit
def take_gradient(
    slope, counts, valid, row, row_scale, at, columns, grad, row_total, column_total,
    CODE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile's gradient of one operand: stored, or added to what is returned, the sums over columns and over rows."""
    if codes.WANTED & CODE:
        if codes.SHAPE & CODE == codes.FULL:
            value = tl.where(counts, slope * row_scale[:, None], 0.0)
            pointers = operands.full_pointers(grad, row, columns // ALIGN, at, COLUMNS, ALIGN)
            tl.store(pointers, operands.narrow(value, grad.dtype.element_ty), mask=valid)
        elif codes.SHAPE & CODE == codes.COLUMN:
            column_total += tl.where(counts, slope * row_scale[:, None], 0.0)
        else:
            row_total += operands.quads(tl.where(counts, slope, 0.0), ROWS, COLUMNS)
    return row_total, column_total


@triton.jit
def take_row_total(row_total, row_scale, total, sums, region, offsets, row_valid, CODE: tl.constexpr):
    """The end of some rows of one operand's gradient: stored if it is the row's, added to `total` if a scalar's."""
    if codes.WANTED & CODE:
        if codes.SHAPE & CODE == codes.ROW:
            tl.store(sums + (CODE // codes.REGION) * region + offsets, tl.sum(row_total, 1), mask=row_valid)
        elif codes.SHAPE & CODE == codes.SCALAR:
            total += tl.sum(tl.sum(row_total, 1) * row_scale.to(tl.float64), 0)
    return total


@triton.jit
def leave_totals(
    total, column_total, sums, region, program, column_sums, column_region, block, begin, columns,
    CODE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The end of a program, for one operand's gradient."""
    if codes.WANTED & CODE:
        if codes.SHAPE & CODE == codes.SCALAR:
            tl.store(sums + (CODE // codes.REGION) * region + program + tl.arange(0, 1), total)
        elif codes.SHAPE & CODE == codes.COLUMN:
            column = begin + tl.arange(0, COLUMNS)
            pointers = (
                column_sums + (CODE // codes.REGION) * column_region + block.to(tl.int64) * columns + column
            )
            tl.store(pointers, tl.sum(column_total, 0), mask=column < columns)


@triton.jit(
    do_not_specialize=[
        "pitch0", "pitch1", "pitch2", "pitch3", "target_pitch", "mask_pitch", "rows", "columns", "segments",
        "row_steps", "region", "column_region",
    ],
    do_not_specialize_on_alignment=[
        "param0", "param1", "param2", "param3", "target", "mask", "weight", "upstream", "grad0", "grad1", "grad2",
        "grad3", "sums", "column_sums",
    ],
)  # fmt: skip
def terms_kernel(
    param0, param1, param2, param3, pitch0: tl.int64, pitch1: tl.int64, pitch2: tl.int64, pitch3: tl.int64,
    target, target_pitch: tl.int64, mask, mask_pitch: tl.int64, weight, upstream, grad0, grad1, grad2, grad3,
    sums, region: tl.int64, column_sums, column_region: tl.int64,
    rows: tl.int64, columns: tl.int32, segments: tl.int32, row_steps: tl.int32, scale: tl.float64,
    TERM: tl.constexpr, COUNT: tl.constexpr, OPERANDS: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEGMENT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows ROWS * row_steps * (b // segments) .. of segment b % segments of `columns`, by program b.

    Writes full gradients; into region 0 of `sums` the segment's energies (PER_ROW: one per row, at [row, segment]; else
    one per program, weighted); into others the sums over columns of gradients of "row" operands (at [row, segment])
    and of scalars (one per program, with the row's scale); into `column_sums` the sums over rows, at
    [region, block, column].
    """
    program = tl.program_id(0)
    segment = program % segments
    block = program // segments
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, columns)
    params = (param0, param1, param2, param3)
    pitches = (pitch0, pitch1, pitch2, pitch3)
    grads = (grad0, grad1, grad2, grad3)

    total = tl.zeros((1,), tl.float64)
    totals = (total, total, total, total)
    column_total = tl.zeros((ROWS, COLUMNS), tl.float32)
    column_totals = (column_total, column_total, column_total, column_total)
    first_row = block.to(tl.int64) * row_steps * ROWS
    for step in range(row_steps):
        row = first_row + step * ROWS + tl.arange(0, ROWS)
        row_valid = row < rows
        row_scale = operands.row_scale(weight, upstream, scale, row, row_valid, ROWS)
        row_counts = operands.kept(weight, row, row_valid)
        row_total = tl.zeros((ROWS, COLUMNS // 4), tl.float64)
        row_totals = (row_total, row_total, row_total, row_total)
        for at in range(begin, end, COLUMNS):
            column = at + tl.arange(0, COLUMNS)
            # One truth for ALIGN elements, so that masked loads and stores stay whole.
            column_valid = column // ALIGN < columns // ALIGN
            valid = row_valid[:, None] & column_valid[None, :]
            p = ()
            for i in tl.static_range(COUNT):
                p = p + (
                    operands.load(
                        params[i], row, pitches[i], at, valid, row_valid, column_valid,
                        codes.SHAPE & OPERANDS >> 8 * i, ROWS, COLUMNS, ALIGN,
                    ),
                )  # fmt: skip
            x = None
            if target is not None:
                x = operands.load(
                    target, row, target_pitch, at, valid, row_valid, column_valid,
                    codes.FULL, ROWS, COLUMNS, ALIGN,
                )  # fmt: skip
            e, g0, g1, g2, g3 = likelihoods.terms(TERM, p, x)
            # The results are chosen, never multiplied: what is unobserved may be NaN.
            counts = valid
            if weight is not None:
                counts = counts & row_counts[:, None]
            if mask is not None:
                pointers = operands.full_pointers(mask, row, mask_pitch, at, COLUMNS, ALIGN)
                counts = counts & (tl.load(pointers, mask=valid, other=0) != 0)
            row_total += operands.quads(tl.where(counts, e, 0.0), ROWS, COLUMNS)

            slopes = (g0, g1, g2, g3)
            new_rows = ()
            new_columns = ()
            for i in tl.static_range(4):
                new_row, new_column = take_gradient(
                    slopes[i], counts, valid, row, row_scale, at, columns, grads[i], row_totals[i], column_totals[i],
                    codes.BYTE & OPERANDS >> 8 * i, ROWS, COLUMNS, ALIGN,
                )  # fmt: skip
                new_rows = new_rows + (new_row,)
                new_columns = new_columns + (new_column,)
            row_totals = new_rows
            column_totals = new_columns

        energy = tl.sum(row_total, 1)
        if PER_ROW:
            tl.store(sums + row * segments + segment, energy, mask=row_valid)
        else:
            if weight is not None:
                energy *= tl.load(weight + row, mask=row_valid, other=0.0).to(tl.float64)
            total += tl.sum(energy, 0)
        new_totals = ()
        for i in tl.static_range(4):
            new_total = take_row_total(
                row_totals[i], row_scale, totals[i], sums, region, row * segments + segment, row_valid,
                codes.BYTE & OPERANDS >> 8 * i,
            )  # fmt: skip
            new_totals = new_totals + (new_total,)
        totals = new_totals

    if not PER_ROW:
        tl.store(sums + program + tl.arange(0, 1), total)
    for i in tl.static_range(4):
        leave_totals(
            totals[i], column_totals[i], sums, region, program, column_sums, column_region, block, begin, columns,
            codes.BYTE & OPERANDS >> 8 * i, COLUMNS,
        )  # fmt: skip


@triton.jit
def sum_of_row(sums, row, row_valid, segments, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Row `row`'s total (float64 [ROWS]) of its partial sums at [row, segment]."""
    total = tl.zeros((ROWS, SEGMENTS), tl.float64)
    for at in range(0, segments, SEGMENTS):
        segment = at + tl.arange(0, SEGMENTS)
        valid = row_valid[:, None] & (segment < segments)[None, :]
        total += tl.load(sums + (row * segments)[:, None] + segment[None, :], mask=valid, other=0.0)
    return tl.sum(total, 1)


@triton.jit
def sum_of_all(sums, count, BLOCK: tl.constexpr):
    """The total of sums[0] .. sums[count - 1]."""
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, count, BLOCK):
        index = at + tl.arange(0, BLOCK)
        total += tl.load(sums + index, mask=index < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def row_gradient(
    sums, region, segments, grad, row_scale, row, row_valid,
    CODE: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    if (codes.WANTED | codes.SHAPE) & CODE == codes.WANTED | codes.ROW:
        start = sums + (CODE // codes.REGION) * region
        total = sum_of_row(start, row, row_valid, segments, ROWS, SEGMENTS)
        value = (total * row_scale.to(tl.float64)).to(tl.float32)
        tl.store(grad + row, operands.narrow(value, grad.dtype.element_ty), mask=row_valid)


@triton.jit
def scalar_gradient(sums, region, programs, grad, CODE: tl.constexpr, BLOCK: tl.constexpr):
    if (codes.WANTED | codes.SHAPE) & CODE == codes.WANTED | codes.SCALAR:
        value = sum_of_all(sums + (CODE // codes.REGION) * region, programs, BLOCK).to(tl.float32)
        tl.store(grad, operands.narrow(value, grad.dtype.element_ty))


@triton.jit
def column_gradient(
    tile, column_sums, column_region, blocks, columns, grad,
    CODE: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tile `tile` of this operand's gradient, if there is one. Returns tile less the number of its tiles."""
    if (codes.WANTED | codes.SHAPE) & CODE == codes.WANTED | codes.COLUMN:
        tiles = tl.cdiv(columns, COLUMNS)
        if (tile >= 0) & (tile < tiles):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            valid = column < columns
            start = column_sums + (CODE // codes.REGION) * column_region
            total = tl.zeros((BLOCKS, COLUMNS), tl.float64)
            for at in range(0, blocks, BLOCKS):
                block = at + tl.arange(0, BLOCKS)
                pointers = start + block.to(tl.int64)[:, None] * columns + column[None, :]
                part = tl.load(pointers, mask=(block < blocks)[:, None] & valid[None, :], other=0.0)
                total += part.to(tl.float64)
            value = tl.sum(total, 0).to(tl.float32)
            tl.store(grad + column, operands.narrow(value, grad.dtype.element_ty), mask=valid)
        tile -= tiles
    return tile


@triton.jit(
    do_not_specialize=[
        "energy_region", "energy_column_region", "energy_segments", "energy_programs", "energy_blocks",
        "energy_columns", "kl_region", "kl_column_region", "kl_segments", "kl_programs", "kl_blocks", "kl_columns",
        "rows", "row_tiles",
    ],
    do_not_specialize_on_alignment=[
        "free", "energy", "kl", "weight", "energy_upstream", "kl_upstream", "energy_sums", "energy_column_sums",
        "kl_sums", "kl_column_sums", "grad0", "grad1", "grad2", "grad3", "grad4", "grad5", "grad6",
    ],
)  # fmt: skip
def finalize_kernel(
    free, energy, kl, weight, energy_upstream, kl_upstream,
    energy_sums, energy_region: tl.int64, energy_column_sums, energy_column_region: tl.int64,
    energy_segments: tl.int32, energy_programs: tl.int32, energy_blocks: tl.int32, energy_columns: tl.int32,
    kl_sums, kl_region: tl.int64, kl_column_sums, kl_column_region: tl.int64,
    kl_segments: tl.int32, kl_programs: tl.int32, kl_blocks: tl.int32, kl_columns: tl.int32,
    grad0, grad1, grad2, grad3, grad4, grad5, grad6,
    rows: tl.int64, row_tiles: tl.int32, scale: tl.float64, beta: tl.float64, divisor: tl.float64,
    ENERGY: tl.constexpr, KL: tl.constexpr, PER_ROW: tl.constexpr, TOTALS: tl.constexpr,
    ROWS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Free energy, energy and KL ([rows] each if PER_ROW, else one number), and all gradients but the full ones.

    Programs: `row_tiles` for rows, then, if TOTALS, one for what is a single number, then those for columns.
    ENERGY, KL: the operands of each.
    """
    program = tl.program_id(0)
    params = (grad0, grad1, grad2)
    latent = (grad3, grad4, grad5, grad6)
    if program < row_tiles:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row_valid = row < rows
        if PER_ROW:
            factor = tl.full((ROWS,), 1.0, tl.float64)
            if weight is not None:
                factor = tl.load(weight + row, mask=row_valid, other=0.0).to(tl.float64)
            of_energy = tl.zeros((ROWS,), tl.float64)
            of_kl = tl.zeros((ROWS,), tl.float64)
            if energy_sums is not None:
                of_energy = factor * sum_of_row(energy_sums, row, row_valid, energy_segments, ROWS, SEGMENTS)
            if kl_sums is not None:
                of_kl = factor * sum_of_row(kl_sums, row, row_valid, kl_segments, ROWS, SEGMENTS)
            of_both = of_energy + tl.full((), beta, tl.float64) * of_kl
            tl.store(free + row, of_both.to(tl.float32), mask=row_valid)
            tl.store(energy + row, of_energy.to(tl.float32), mask=row_valid)
            tl.store(kl + row, of_kl.to(tl.float32), mask=row_valid)
        if energy_sums is not None:
            by = operands.row_scale(weight, energy_upstream, scale, row, row_valid, ROWS)
            for i in tl.static_range(3):
                row_gradient(
                    energy_sums, energy_region, energy_segments, params[i], by, row, row_valid,
                    codes.BYTE & ENERGY >> 8 * i, ROWS, SEGMENTS,
                )  # fmt: skip
        if kl_sums is not None:
            by = operands.row_scale(weight, kl_upstream, scale, row, row_valid, ROWS)
            for i in tl.static_range(4):
                row_gradient(
                    kl_sums, kl_region, kl_segments, latent[i], by, row, row_valid,
                    codes.BYTE & KL >> 8 * i, ROWS, SEGMENTS,
                )  # fmt: skip
    else:
        tile = program - row_tiles
        if TOTALS:
            if tile == 0:
                of_energy = tl.full((), 0.0, tl.float64)
                of_kl = tl.full((), 0.0, tl.float64)
                if energy_sums is not None:
                    if not PER_ROW:
                        of_energy = sum_of_all(energy_sums, energy_programs, BLOCK)
                    for i in tl.static_range(3):
                        scalar_gradient(
                            energy_sums,
                            energy_region,
                            energy_programs,
                            params[i],
                            codes.BYTE & ENERGY >> 8 * i,
                            BLOCK,
                        )
                if kl_sums is not None:
                    if not PER_ROW:
                        of_kl = sum_of_all(kl_sums, kl_programs, BLOCK)
                    for i in tl.static_range(4):
                        scalar_gradient(
                            kl_sums, kl_region, kl_programs, latent[i], codes.BYTE & KL >> 8 * i, BLOCK
                        )
                if not PER_ROW:
                    by = tl.full((), divisor, tl.float64)
                    of_energy = of_energy / by
                    of_kl = of_kl / by
                    tl.store(free, (of_energy + tl.full((), beta, tl.float64) * of_kl).to(tl.float32))
                    tl.store(energy, of_energy.to(tl.float32))
                    tl.store(kl, of_kl.to(tl.float32))
            tile -= 1
        if energy_column_sums is not None:
            for i in tl.static_range(3):
                tile = column_gradient(
                    tile, energy_column_sums, energy_column_region, energy_blocks, energy_columns, params[i],
                    codes.BYTE & ENERGY >> 8 * i, BLOCKS, COLUMNS,
                )  # fmt: skip
        if kl_column_sums is not None:
            for i in tl.static_range(4):
                tile = column_gradient(
                    tile, kl_column_sums, kl_column_region, kl_blocks, kl_columns, latent[i],
                    codes.BYTE & KL >> 8 * i, BLOCKS, COLUMNS,
                )  # fmt: skip
