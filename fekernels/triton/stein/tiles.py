"""The Stein direction of rbf and imq by tensor cores, d <= 128: no n x n matrix.

A float32 is the sum of two float16, to 22 bits, after a multiplication by a power of two that makes the largest of its
kind (a column of V, all of X, the kernel's values) nearly the largest float16. Products high high + high low + low high
then have float32's accuracy, like three TF32 products, at twice their rate and half their memory (Ootomo & Yokota 2022,
arXiv:2203.03341). What is 2^18 times smaller than the largest of its kind keeps 22 bits, what is smaller still an
absolute error of 2^-40 of the largest. A single product of high parts has TF32's 11 bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fekernels.triton.stein import kernels as stein

TOP = tl.constexpr(15)  # values are scaled to below 2^15; float16 ends just below 2^16
UNIT = tl.constexpr(2.0**-15)


@triton.jit
def power_for(bound):
    """(2^e, 2^-e) that brings `bound` to [2^14, 2^15), as far as both are normal floats."""
    exponent = (bound.to(tl.int32, bitcast=True) >> 23 & 255) - 127
    shift = tl.minimum(tl.maximum(14 - exponent, -126), 126)
    up = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    down = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def split(value):
    """(high, low), float16."""
    high = value.to(tl.float16)
    return high, (value - high.to(tl.float32)).to(tl.float16)


@triton.jit
def prepare_kernel(
    particles, scores, bandwidth, statistics, x_high, x_low, v_high, v_low, norms, constants, column_scale,
    n, d, padded, chunks, beta, c, temperature,
    KERNEL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Scaled halves of the centred particles and of V = S - (2 T/h) X (rbf) or S, padded with zeros to [padded, D].

    norms [B, padded]: |x|^2 in units of the exponent, infinite for what is padding. They are made of the halves, as the
    inner products will be, so that the distance is that of the rounded particles and small where particles are near.
    constants [B, 2]: what an inner product counts in the same units, and what a unit of scaled particles is.
    column_scale [B, D]: what a unit of V's columns is.
    """
    columns = tl.arange(0, D)
    column_valid = columns < d
    batch = tl.program_id(1).to(tl.int64)
    h = tl.load(bandwidth + batch)
    inverse = stein.inverse_bandwidth(h)

    chunk = tl.arange(0, CHUNKS)
    valid = (chunk < chunks)[:, None] & column_valid[None, :]
    pointers = statistics + (batch * 4 * chunks + chunk[:, None]) * d + columns[None, :]
    step = chunks * d
    mean = tl.sum(tl.load(pointers, mask=valid, other=0.0), 0) / n
    least = tl.min(tl.load(pointers + step, mask=valid, other=stein.INFINITY), 0)
    most = tl.max(tl.load(pointers + 2 * step, mask=valid, other=-stein.INFINITY), 0)
    largest = tl.max(tl.load(pointers + 3 * step, mask=valid, other=0.0), 0)
    reach = tl.where(column_valid, tl.maximum(most - mean, mean - least), 0.0)
    x_up, x_down = power_for(tl.max(reach, 0))
    pull = 0.0
    if KERNEL == stein.RBF:
        pull = 2.0 * temperature * inverse
    v_up, v_down = power_for(largest + pull * reach)

    unit = inverse * x_down * x_down
    if KERNEL == stein.RBF:
        unit *= stein.LOG2E
    else:
        unit /= c * c
    if tl.program_id(0) == 0:
        tl.store(constants + batch * 2, 2.0 * unit)
        tl.store(constants + batch * 2 + 1, x_down)
        tl.store(column_scale + batch * D + columns, v_down)

    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (rows < n)[:, None] & column_valid[None, :]
    offsets = (batch * n + rows)[:, None] * d + columns[None, :]
    x = tl.load(particles + offsets, mask=valid, other=0.0).to(tl.float32) - mean[None, :]
    x = tl.where(valid, x, 0.0)
    s = tl.load(scores + offsets, mask=valid, other=0.0).to(tl.float32)
    xh, xl = split(x * x_up)
    vh, vl = split((s - pull * x) * v_up[None, :])
    offsets = (batch * padded + rows)[:, None] * D + columns[None, :]
    tl.store(x_high + offsets, xh)
    tl.store(v_high + offsets, vh)
    high = xh.to(tl.float32)
    squares = high * high
    if x_low is not None:
        tl.store(x_low + offsets, xl)
        tl.store(v_low + offsets, vl)
        squares += 2.0 * high * xl.to(tl.float32)
    norm = tl.where(rows < n, tl.sum(squares, 1) * unit, stein.INFINITY)
    tl.store(norms + batch * padded + rows, norm)


@triton.jit
def product(a_high, a_low, b_high, b_low, SPLIT: tl.constexpr):
    """a b, from halves. The sum starts at 0: a long sum in a tensor core's accumulator loses digits."""
    total = tl.dot(a_high, b_high, input_precision="tf32")
    if SPLIT:
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
    return total


@triton.jit
def tile_direction_kernel(
    x_high, x_low, v_high, v_low, norms, constants, sums, sums_x, row_sums,
    padded, per_split, beta,
    KERNEL: tl.constexpr, SPLIT: tl.constexpr, SUM_K: tl.constexpr, SUM_G: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """sums [parts, B, padded, D] of k V; but for rbf, sums_x of g X; row_sums [parts, B, padded] of g. All scaled.

    rbf's g is a multiple of k, and the product with X a part of that with V: SUM_G is for the others, together with
    SUM_K or, where registers are short, in a launch of its own.

    Grid: blocks of M rows from FIRST on, parts of the others, problems. Every program owns its rows and goes over
    others in order. FIRST is compiled in, and a rank has one: as an argument it takes registers that there are not, on
    sm_80 and for two programs a multiprocessor on sm_90.
    """
    batch = tl.program_id(2).to(tl.int64)
    origin = batch * padded * D
    x_high += origin
    v_high += origin
    if SPLIT:
        x_low += origin
        v_low += origin
    norms += batch * padded
    multiplier = tl.load(constants + batch * 2)
    first_row = (FIRST + tl.program_id(0)) * M
    rows = first_row + tl.arange(0, M)
    columns = tl.arange(0, D)
    own = first_row.to(tl.int64) * D
    own_tile = tl.arange(0, M)[:, None] * D + columns[None, :]
    tile = tl.arange(0, N)[:, None] * D + columns[None, :]

    xi_high = tl.load(x_high + own + own_tile)
    xi_low = xi_high
    if SPLIT:
        xi_low = tl.load(x_low + own + own_tile)
    own_norm = tl.load(norms + rows)
    if KERNEL == stein.RBF:
        own_norm = own_norm * -1.0 + TOP
    total = tl.zeros((M, D), tl.float32)
    total_x = tl.zeros((M, D), tl.float32)
    total_row = tl.zeros((M,), tl.float32)

    begin = tl.program_id(1) * per_split
    for j in tl.range(begin, tl.minimum(begin + per_split, padded), N, num_stages=STAGES):
        offsets = tl.cast(j, tl.int64) * D
        xj_high = tl.load(x_high + offsets + tile)
        xj_low = xj_high
        if SPLIT:
            xj_low = tl.load(x_low + offsets + tile)
        inner = product(xi_high, xi_low, tl.trans(xj_high), tl.trans(xj_low), SPLIT)
        others = j + tl.arange(0, N)
        norm = tl.load(norms + others)
        apart = rows[:, None] != others[None, :]
        if KERNEL == stein.RBF:
            exponent = (inner * multiplier + own_norm[:, None]) - norm[None, :]
            k = tl.where(apart, tl.exp2(tl.minimum(exponent, TOP)), 0.0)
            g = k
        else:
            u = tl.maximum((own_norm[:, None] - inner * multiplier) + norm[None, :], 0.0)
            k = tl.where(apart, tl.exp2(beta * tl.log2(1.0 + u) + TOP), 0.0)
            g = k / (1.0 + u)
        # The row's sum is that of the rounded values which the product has seen: it is multiplied by the particle's
        # distance from the centre, of which the product has the negative.
        if SUM_K:
            k_high, k_low = split(k)
            vj_high = tl.load(v_high + offsets + tile)
            vj_low = vj_high
            if SPLIT:
                vj_low = tl.load(v_low + offsets + tile)
            total += product(k_high, k_low, vj_high, vj_low, SPLIT)
            if KERNEL == stein.RBF:
                total_row += tl.sum(k if SPLIT else k_high.to(tl.float32), 1)
        if SUM_G:
            g_high, g_low = split(g)
            total_x += product(g_high, g_low, xj_high, xj_low, SPLIT)
            total_row += tl.sum(g if SPLIT else g_high.to(tl.float32), 1)

    part = (tl.program_id(1) * tl.num_programs(2).to(tl.int64) + batch) * padded
    if SUM_K:
        tl.store(sums + part * D + own + own_tile, total)
    if SUM_G:
        tl.store(sums_x + part * D + own + own_tile, total_x)
    if SUM_G or KERNEL == stein.RBF:
        tl.store(row_sums + part + rows, total_row)


@triton.jit
def finish_tiles_kernel(
    x_high, x_low, scores, bandwidth, constants, column_scale, sums, sums_x, row_sums, out,
    n, d, padded, parts, beta, c, diagonal, temperature,
    KERNEL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """phi from the sums of `tile_direction_kernel`, the parts in order. Grid: blocks of rows, problems."""
    batch = tl.program_id(1).to(tl.int64)
    inverse = stein.inverse_bandwidth(tl.load(bandwidth + batch))
    x_down = tl.load(constants + batch * 2 + 1)
    columns = tl.arange(0, D)
    v_down = tl.load(column_scale + batch * D + columns)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = (batch * padded + rows)[:, None] * D + columns[None, :]
    xi = tl.load(x_high + offsets).to(tl.float32)
    if x_low is not None:
        xi += tl.load(x_low + offsets).to(tl.float32)
    total = tl.zeros((ROWS, D), tl.float32)
    total_x = tl.zeros((ROWS, D), tl.float32)
    total_row = tl.zeros((ROWS,), tl.float32)
    step = tl.num_programs(1).to(tl.int64) * padded
    for part in range(parts):
        total += tl.load(sums + part * step * D + offsets)
        if KERNEL != stein.RBF:
            total_x += tl.load(sums_x + part * step * D + offsets)
        total_row += tl.load(row_sums + part * step + batch * padded + rows)
    value = total * (v_down * (UNIT * diagonal))[None, :]
    if KERNEL == stein.RBF:
        value += xi * ((2.0 * temperature * inverse) * x_down * UNIT * total_row)[:, None]
    else:
        strength = (-2.0 * beta * temperature * UNIT) * inverse * diagonal / (c * c)
        value += (xi * total_row[:, None] - total_x) * (strength * x_down)
    valid = (rows < n)[:, None] & (columns < d)[None, :]
    offsets = (batch * n + rows)[:, None] * d + columns[None, :]
    s = tl.load(scores + offsets, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + offsets, (diagonal * s + value) / n, mask=valid)
