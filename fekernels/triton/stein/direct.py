"""The Stein direction of particles in few dimensions: squared differences, a thread per pair, no tensor cores.

Operands come by columns, [B, d, n], so that neighbouring threads read neighbouring particles. A tile's sums stay apart,
one per thread, until a stretch of particles is done: then they are added up, which also keeps float32 sums over a
million particles to their last digits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment

import triton
import triton.language as tl

from fekernels.triton.stein import kernels as stein


@triton.jit
def load_columns(base, step, index, valid, D: tl.constexpr):
    """A tuple of D tiles: column c of the particles `index`, where there are such."""
    columns = ()
    for c in tl.static_range(D):
        columns = columns + (tl.load(base + c * step + index, mask=valid, other=0.0),)
    return columns


@triton.jit
def zeros(M: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((M, N), tl.float32),)
    return values


@triton.jit
def add_over_tile(totals, tiles, COUNT: tl.constexpr):
    """totals ([M, 1] each) and the sums over the columns of each tile."""
    values = ()
    for c in tl.static_range(COUNT):
        values = values + (totals[c] + tl.sum(tiles[c], 1)[:, None],)
    return values


@triton.jit
def pair_distances(xi, xj, apart, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Squared distances [M, N]; infinite where not `apart`."""
    t = tl.zeros((M, N), tl.float32)
    for c in tl.static_range(D):
        difference = xi[c] - xj[c]
        t = tl.fma(difference, difference, t)
    return tl.where(apart, t, stein.INFINITY)


@triton.jit
def inner(a, b, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Inner products [M, N] of the rows of two tuples of columns."""
    total = tl.zeros((M, N), tl.float32)
    for c in tl.static_range(D):
        total += a[c] * b[c]
    return total


@triton.jit
def direction_kernel(
    particles, scores, bandwidth, out, partial, n, first_block, per_split, beta, c, diagonal, temperature,
    KERNEL: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """phi, or if there is `partial` [splits, B, n, D] the sum over a part of the other particles.

    Grid: blocks of M rows from `first_block` on, parts, problems.
    """
    batch = tl.program_id(2).to(tl.int64)
    step = tl.full((), 0, tl.int64) + n
    particles += batch * D * step
    scores += batch * D * step
    i = (first_block + tl.program_id(0)) * M + tl.arange(0, M)[:, None]
    i_valid = i < n
    xi = load_columns(particles, step, i, i_valid, D)
    h = tl.load(bandwidth + batch)
    inverse = stein.inverse_bandwidth(h)
    totals = zeros(M, 1, D)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, n)
    for stretch in range(begin, end, STRETCH):
        sums = zeros(M, N, D)
        for first in range(stretch, tl.minimum(stretch + STRETCH, end), N):
            j = first + tl.arange(0, N)[None, :]
            j_valid = j < end
            xj = load_columns(particles, step, j, j_valid, D)
            sj = load_columns(scores, step, j, j_valid, D)
            t = pair_distances(xi, xj, (i != j) & j_valid, D, M, N)
            k, p1, _ = stein.radial(stein.scaled(t, h, inverse), KERNEL, beta, c)
            g = p1 * (inverse * temperature)
            new = ()
            for e in tl.static_range(D):
                repelled = g * (xi[e] - xj[e]) + sums[e]
                new = new + (k * sj[e] + repelled,)
            sums = new
        totals = add_over_tile(totals, sums, D)
    offsets = (batch * n + i) * D
    if partial is not None:
        offsets += tl.program_id(1) * tl.num_programs(2).to(tl.int64) * n * D
        for e in tl.static_range(D):
            tl.store(partial + offsets + e, totals[e], mask=i_valid)
    else:
        si = load_columns(scores, step, i, i_valid, D)
        for e in tl.static_range(D):
            tl.store(out + offsets + e, (diagonal * si[e] + totals[e]) / n, mask=i_valid)
