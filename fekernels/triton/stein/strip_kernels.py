"""The kernels of `strips`: of operands padded to whole tiles, so that no load needs a mask."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fekernels.triton.stein import kernels as stein

DIRECTION = tl.constexpr(0)
BACKWARD = tl.constexpr(1)
DISCREPANCY = tl.constexpr(2)


@triton.jit
def mean_kernel(statistics, mean, n, d, chunks, D: tl.constexpr, CHUNKS: tl.constexpr):
    """mean [B, d] of `column_statistics`. Grid: blocks of columns, problems."""
    columns = tl.program_id(0) * D + tl.arange(0, D)
    batch = tl.program_id(1).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    pointers = statistics + (batch * 4 * chunks + chunk[:, None]) * d + columns[None, :]
    sums = tl.load(pointers, mask=(chunk < chunks)[:, None] & (columns < d)[None, :], other=0.0)
    tl.store(mean + batch * d + columns, tl.sum(sums, 0) / n, mask=columns < d)


@triton.jit
def sharp_kernel(norms, bandwidth, sharp, n, pitch, scale, BLOCK: tl.constexpr):
    """sharp [B], int32: whether h is below 1/64 of the mean of n squared norms [B, pitch], or counts as 0.

    An inner product's rounding, 1e-7 of a norm, would then be more than 1e-5 of t/h, and that of a particle times the
    sum of its weights as much of what pushes it. scale: of norms that are in units of h already, or 0. Grid: problems.
    """
    batch = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(norms + batch * pitch + at, mask=at < n, other=0.0).to(tl.float64)
    h = tl.load(bandwidth + batch)
    limit = tl.where(scale > 0, scale, h).to(tl.float64) * 64.0 * n
    found = (tl.sum(total, 0) > limit) | (h < stein.SMALLEST)
    tl.store(sharp + batch, found.to(tl.int32))


@triton.jit
def pad_kernel(source, mean, chosen, out, n, d, padded, width, ROWS: tl.constexpr, D: tl.constexpr):
    """out [B, padded, width]: source [B, n, d] as float32, less the mean [B, d]; and 0 beside it.

    chosen [B]: problems to do this for. Grid: tiles, problems.
    """
    batch = tl.program_id(1).to(tl.int64)
    tiles = width // D
    rows = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % tiles * D + tl.arange(0, D)
    valid = (rows < n)[:, None] & (columns < d)[None, :]
    pointers = source + (batch * n + rows)[:, None] * d + columns[None, :]
    value = tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
    if mean is not None:
        value -= tl.load(mean + batch * d + columns, mask=columns < d, other=0.0)[None, :]
        value = tl.where(valid, value, 0.0)
    pointers = out + (batch * padded + rows)[:, None] * width + columns[None, :]
    if chosen is None:
        tl.store(pointers, value)
    else:
        if tl.load(chosen + batch) != 0:
            tl.store(pointers, value)


@triton.jit
def row_products_kernel(x, y, out, width, ROWS: tl.constexpr, D: tl.constexpr):
    """out [rows]: inner products of the rows of x and y [rows, width]. Grid: blocks of rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * width + tl.arange(0, D)[None, :]
    total = tl.zeros((ROWS, D), tl.float32)
    for begin in range(0, width, D):
        total += tl.load(x + offsets + begin) * tl.load(y + offsets + begin)
    tl.store(out + rows, tl.sum(total, 1))


@triton.jit
def inner_kernel(
    x, y, products, part_step: tl.int64, first_row, pitch, width, strip, part,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """products [parts, (some), B, strip, pitch]: x_i.y_j + y_i.x_j, without y x_i.x_j; x and y [B, pitch, width].

    Over `part` of the dimensions. Grid: tiles of the strip, parts, problems. A sum over D dimensions is a tensor
    core's, the sum of these is not: its accumulator would lose digits.
    """
    tiles = pitch // N
    batch = tl.program_id(2).to(tl.int64)
    at_row = tl.program_id(0) // tiles * M
    at_column = tl.program_id(0) % tiles * N
    own = (batch * pitch + first_row + at_row) * width
    other = (batch * pitch + at_column) * width
    rows = tl.arange(0, M)[:, None] * width + tl.arange(0, D)[None, :]
    columns = tl.arange(0, N)[:, None] * width + tl.arange(0, D)[None, :]
    total = tl.zeros((M, N), tl.float32)
    begin = tl.program_id(1) * part
    for dimension in range(begin, tl.minimum(begin + part, width), D):
        xi = tl.load(x + (own + dimension) + rows)
        xj = tl.load(x + (other + dimension) + columns)
        if y is None:
            total += tl.dot(xi, tl.trans(xj), input_precision=PRECISION)
        else:
            yi = tl.load(y + (own + dimension) + rows)
            yj = tl.load(y + (other + dimension) + columns)
            both = tl.dot(yi, tl.trans(xj), input_precision=PRECISION)
            total += tl.dot(xi, tl.trans(yj), both, input_precision=PRECISION)
    offsets = (batch * strip + at_row) * pitch + at_column
    tile = tl.arange(0, M)[:, None] * pitch + tl.arange(0, N)[None, :]
    tl.store(products + tl.program_id(1) * part_step + offsets + tile, total)


@triton.jit
def rounded(w, PRECISION: tl.constexpr):
    """What a tensor core makes of a weight, so that sums over rows are those of what the products see."""
    if PRECISION == "tf32":
        return ((w.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    else:
        return w


@triton.jit
def sum_parts(pointer, step, parts, valid):
    total = tl.load(pointer, mask=valid, other=0.0)
    for part in range(1, parts):
        total += tl.load(pointer + part * step, mask=valid, other=0.0)
    return total


@triton.jit
def pairs_kernel(
    x, other, apart, norms, inner, bandwidth, products, weights, totals, tile_count, first_row, n, d, pitch, width,
    strip, parts, beta, c, temperature,
    KERNEL: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """weights [1 to 3, B, strip, pitch], 0 for a pair with itself and beyond n.

    DIRECTION: k and g. BACKWARD: k, g and M = dL/dt, and in totals [B, tiles] each tile's share of dL/dh.
    DISCREPANCY: kp. Where a problem is to be taken `apart` [B], distances and (x_i - x_j).(y_i - y_j), y the scores or
    the upstream gradient, come from differences of x and other [B, pitch, width] as they are given. So where h = 0,
    when particles coincide if all their coordinates are the same, and only k is not 0. Grid: tiles of the
    strip, problems.
    """
    tiles = tl.cdiv(pitch, N)
    batch = tl.program_id(1).to(tl.int64)
    at_row = tl.program_id(0) // tiles * M + tl.arange(0, M)
    rows = first_row + at_row
    others = tl.program_id(0) % tiles * N + tl.arange(0, N)
    size = tl.cast(strip, tl.int64) * pitch
    problems = tl.num_programs(1)
    offsets = batch * size + at_row.to(tl.int64)[:, None] * pitch + others[None, :]
    valid = (others < pitch)[None, :]
    count: tl.constexpr = 1 if MODE == DIRECTION else 3
    step = count * problems * size
    xx = sum_parts(products + offsets, step, parts, valid)
    row_norm = tl.load(norms + batch * pitch + rows)
    norm = tl.load(norms + batch * pitch + others, mask=others < pitch, other=0.0)
    t = tl.maximum((row_norm[:, None] + norm[None, :]) - 2.0 * xx, 0.0)
    h = tl.load(bandwidth + batch)
    inverse = stein.inverse_bandwidth(h)
    if MODE == DIRECTION:
        across = t
    else:
        yx = sum_parts(products + 2 * problems * size + offsets, step, parts, valid)
        row_inner = tl.load(inner + batch * pitch + rows)
        own_inner = tl.load(inner + batch * pitch + others, mask=others < pitch, other=0.0)
        across = (row_inner[:, None] + own_inner[None, :]) - yx
    if tl.load(apart + batch) != 0:
        t = tl.zeros((M, N), tl.float32)
        across = tl.zeros((M, N), tl.float32)
        own_offsets = (batch * pitch + rows) * width
        others_offsets = (batch * pitch + others) * width
        for e in range(0, d):
            difference = (
                tl.load(x + own_offsets + e)[:, None]
                - tl.load(x + others_offsets + e, mask=others < pitch)[None, :]
            )
            t = tl.fma(difference, difference, t)
            if MODE != DIRECTION:
                yi = tl.load(other + own_offsets + e)
                yj = tl.load(other + others_offsets + e, mask=others < pitch)
                across = tl.fma(difference, yi[:, None] - yj[None, :], across)
    u = stein.scaled(t, h, inverse)
    k, p1, p2 = stein.radial(u, KERNEL, beta, c)
    pair = (rows[:, None] != others[None, :]) & (rows < n)[:, None] & (others < n)[None, :]
    k = tl.where(pair, k, 0.0)
    g = tl.where(pair, p1 * inverse, 0.0)
    if MODE == DIRECTION:
        tl.store(weights + offsets, rounded(k, PRECISION), mask=valid)
        tl.store(weights + problems * size + offsets, rounded(g, PRECISION), mask=valid)
    else:
        yz = sum_parts(products + problems * size + offsets, step, parts, valid)
        # Where u is infinite p2 is 0, and so is their product.
        p2 = tl.where(pair, p2, 0.0)
        up2 = tl.where(p2 > 0, u * p2, 0.0)
        if MODE == DISCREPANCY:
            kp = k * yz + g * (across + d) - up2 * inverse
            tl.store(weights + offsets, kp, mask=valid)
        else:
            m = (g * yz + (temperature * inverse * inverse) * p2 * across) * (-0.5 / n)
            tl.store(weights + offsets, rounded(k, PRECISION), mask=valid)
            tl.store(weights + problems * size + offsets, rounded(g, PRECISION), mask=valid)
            tl.store(weights + 2 * problems * size + offsets, rounded(m, PRECISION), mask=valid)
            if totals is not None:
                # Each pair is counted twice.
                ug = tl.where(g > 0, u * g, 0.0)
                share = 0.5 * ug * yz + (temperature * inverse) * (0.5 * up2 * inverse - g) * across
                total = tl.sum(tl.reshape(share, (M * N,)).to(tl.float64), 0) * (0.5 / n)
                tl.store(totals + batch * tile_count + first_row // M * tiles + tl.program_id(0), total)


@triton.jit
def row_sums_kernel(weights, sums, rows, pitch: tl.int64, M: tl.constexpr, N: tl.constexpr):
    """Sums over the rows of `weights` [rows, pitch]."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    total = tl.zeros((M, N), tl.float32)
    pointers = weights + row[:, None] * pitch + tl.arange(0, N)[None, :]
    valid = (row < rows)[:, None]
    for first in range(0, pitch, N):
        total += tl.load(pointers + first, mask=valid & (first + tl.arange(0, N) < pitch)[None, :], other=0.0)
    tl.store(sums + row, tl.sum(total, 1), mask=row < rows)


@triton.jit
def weigh(
    weights, values, row, column, batch, pitch, width, strip,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """sum_j w_ij v_j, from row `row` of the strip and column `column` of the values [pitch, width] on."""
    weights += (batch * strip + row) * pitch
    weight_tile = tl.arange(0, M)[:, None] * pitch + tl.arange(0, N)[None, :]
    value_tile = tl.arange(0, N)[:, None] * width + tl.arange(0, D)[None, :]
    total = tl.zeros((M, D), tl.float32)
    for first in range(0, pitch, N):
        w = tl.load(weights + first + weight_tile)
        v = tl.load(values + (tl.cast(first, tl.int64) * width + column) + value_tile)
        total += tl.dot(w, v, input_precision=PRECISION)
    return total


@triton.jit
def product_kernel(
    weights, values, apart, row_sums, base, factor, out, first_row, n, d, pitch, width, strip,
    ADD: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A strip of out [B, n, d]: factor * (base v_i + sum_j w_ij v_j); with row_sums, of sum_j w_ij (v_i - v_j).

    apart [B]: whether those differences themselves are summed. ADD: to what `out` holds. Grid: tiles of M rows of the
    strip and D columns, problems.
    """
    batch = tl.program_id(1).to(tl.int64)
    tiles = width // D
    row = tl.program_id(0) // tiles * M
    column = tl.program_id(0) % tiles * D
    values += batch * pitch * width
    total = weigh(weights, values, row, column, batch, pitch, width, strip, PRECISION, M, N, D)
    rows = first_row + row + tl.arange(0, M)
    columns = column + tl.arange(0, D)
    own = tl.load(values + rows.to(tl.int64)[:, None] * width + columns[None, :])
    if row_sums is None:
        total = (own * base + total) * factor
    else:
        total = own * tl.load(row_sums + batch * strip + row + tl.arange(0, M))[:, None] - total
        if tl.load(apart + batch) != 0:
            total = tl.zeros((M, D), tl.float32)
            weight_pointers = weights + (batch * strip + row + tl.arange(0, M)) * pitch
            for first in range(0, n, N):
                some = tl.zeros((M, D), tl.float32)
                for j in range(first, tl.minimum(first + N, n)):
                    value = tl.load(values + tl.cast(j, tl.int64) * width + columns)
                    some += tl.load(weight_pointers + j)[:, None] * (own - value[None, :])
                total += some
        total *= factor
    valid = (rows < n)[:, None] & (columns < d)[None, :]
    pointers = out + (batch * n + rows)[:, None] * d + columns[None, :]
    if ADD:
        total += tl.load(pointers, mask=valid, other=0.0)
    tl.store(pointers, total, mask=valid)


@triton.jit
def quadratic_kernel(
    weights, coefficients, totals, first_row, m, pitch, width, strip, blocks, step: tl.int64,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """totals [B, blocks, m], float64: the M rows' sums of a_i a_j w_ij, for each column a of the coefficients.

    Grid: blocks of M rows of the strip, of D columns, problems. step: between problems' coefficients
    [pitch, width].
    """
    batch = tl.program_id(2).to(tl.int64)
    coefficients += batch * step
    row = tl.program_id(0) * M
    column = tl.program_id(1) * D
    total = weigh(weights, coefficients, row, column, batch, pitch, width, strip, "tf32x3", M, N, D)
    columns = column + tl.arange(0, D)
    rows = first_row + row + tl.arange(0, M)
    own = tl.load(coefficients + rows.to(tl.int64)[:, None] * width + columns[None, :])
    share = own.to(tl.float64) * total.to(tl.float64)
    offsets = (batch * blocks + first_row // M + tl.program_id(0)) * m + columns
    tl.store(totals + offsets, tl.sum(share, 0), mask=columns < m)


@triton.jit
def total_kernel(totals, out, count, m, BLOCK: tl.constexpr, D: tl.constexpr):
    """out [B, m] of totals [B, count, m], in a fixed order. Grid: blocks of columns, problems."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * D + tl.arange(0, D)
    total = tl.zeros((BLOCK, D), tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid = (at < count)[:, None] & (columns < m)[None, :]
        total += tl.load(totals + (batch * count + at)[:, None] * m + columns[None, :], mask=valid, other=0.0)
    tl.store(out + batch * m + columns, tl.sum(total, 0), mask=columns < m)
