"""The Stein variational direction by Triton, in O(n d) memory. The contract is that of fekernels.reference.stein.

Three algorithms, by the dimension: differences (d <= 8), tiles of tensor-core products (d <= 128, of kernels that have
such), and else strips of the kernel matrix, as many rows at once as leave the memory O(n d). Which one, and into how
many parts the sums go, depends on the kernel, n and d alone, and whether inner products do on a problem's own
bandwidth: its result is the same in any batch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fekernels._catalogue.stein import PRECISIONS
from fekernels.reference.stein import svgd_direction as reference
from fekernels.triton.launch import on_device_of
from fekernels.triton.stein import direct, tiles
from fekernels.triton.stein import kernels as stein
from fekernels.triton.stein.strip_kernels import BACKWARD, DIRECTION
from fekernels.triton.stein.strips import Strips, find_sharp, total

TILES = 128  # up to which the halves of a block's particles and of the next ones fit in shared memory
# About four per multiprocessor of the largest GPUs; with fewer blocks of rows sums go into parts.
PROGRAMS = 512
PADDING = 128  # rows, a multiple of every M and N

# M, N by d: as many pairs per thread as the sums of all columns leave registers for.
DIRECT_TILE = {d: (32, 32) if d <= 3 else (16, 32) for d in range(1, stein.DIRECT + 1)}
DIRECT_WARPS = 4
STRETCH = 4096  # particles that a thread's sums go over, one in N each


def tile_configuration(large: bool, width: int, both: bool) -> tuple[int, int, int, int]:
    """M, N, warps and stages of the pipeline, by padded d.

    Large enough where a program has 227 KB of shared memory (`large`), that reading the others' halves from L2 takes
    longer than the products; as much as fits in registers. both: with SUM_K and SUM_G.
    """
    if large:
        return (128, 64, 8, 2 if width == 128 else 3)
    return (32 if both and width == 64 else 64, 32, 8 if width == 128 else 4, 2)


def parts(blocks: int, n: int, step: int) -> tuple[int, int]:
    """(how many parts, particles of each): of sums over n particles, for that many blocks of rows."""
    count = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(n, 4 * step))
    each = triton.cdiv(triton.cdiv(n, count), step) * step
    return triton.cdiv(n, each), each


Rows = tuple[int, int]  # of a problem, those from the first to before the second


def blocks_of(rows: Rows, size: int) -> tuple[int, int]:
    """The first block with any of these rows, and how many: the others' are not computed."""
    begin, end = rows
    first = begin // size
    return first, triton.cdiv(end, size) - first


@triton.jit
def finish_kernel(
    scores, partial, out, n, elements: tl.int64, count, diagonal,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """phi from the partial sums [count, elements], in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < elements
    total = tl.load(partial + at, mask=valid, other=0.0)
    for part in range(1, count):
        total += tl.load(partial + part * elements + at, mask=valid, other=0.0)
    score = tl.load(scores + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + at, (diagonal * score + total) / n, mask=valid)


def finish(scores: Tensor, partial: Tensor, out: Tensor, diagonal: float) -> None:
    """Fills `out` from partial sums [parts, *out.shape]."""
    finish_kernel[(triton.cdiv(out.numel(), 1024),)](
        scores, partial, out, out.shape[1], out.numel(), partial.shape[0], diagonal, BLOCK=1024,
        num_warps=4, **stein.OPTIONS,
    )  # fmt: skip


@triton.jit
def apart_kernel(
    particles, scores, bandwidth, sharp, out, n, d, first_block, beta, c, diagonal, temperature,
    KERNEL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """phi of the problems that are `sharp` [B], from differences of the particles as they are given, D columns.

    So where h = 0, as when most particles coincide: the mean over those that coincide with it, exactly. Returns at
    once for any other problem: the host need not know which. Grid: blocks of rows from `first_block` on, problems.
    """
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(sharp + batch) != 0:
        rows = (first_block + tl.program_id(0)) * M + tl.arange(0, M)
        columns = tl.arange(0, D)
        origin = batch * n
        h = tl.load(bandwidth + batch)
        inverse = stein.inverse_bandwidth(h)
        total = tl.zeros((M, D), tl.float32)
        for first in range(0, n, N):
            others = first + tl.arange(0, N)
            t = tl.zeros((M, N), tl.float32)
            for e in range(0, d):
                xi = tl.load(particles + (origin + rows) * d + e, mask=rows < n, other=0.0).to(tl.float32)
                xj = tl.load(particles + (origin + others) * d + e, mask=others < n, other=0.0).to(tl.float32)
                difference = xi[:, None] - xj[None, :]
                t = tl.fma(difference, difference, t)
            pair = (rows[:, None] != others[None, :]) & (others < n)[None, :]
            k, p1, _ = stein.radial(stein.scaled(t, h, inverse), KERNEL, beta, c)
            k = tl.where(pair, k, 0.0)
            g = tl.where(pair, p1 * (inverse * temperature), 0.0)
            valid = (others < n)[:, None] & (columns < d)[None, :]
            offsets = (origin + others)[:, None] * d + columns[None, :]
            s = tl.load(scores + offsets, mask=valid, other=0.0).to(tl.float32)
            total += tl.dot(k, s, input_precision="tf32x3")
            for e in range(0, d):
                xi = tl.load(particles + (origin + rows) * d + e, mask=rows < n, other=0.0).to(tl.float32)
                xj = tl.load(particles + (origin + others) * d + e, mask=others < n, other=0.0).to(tl.float32)
                pushed = tl.sum(g * (xi[:, None] - xj[None, :]), 1)
                total += tl.where((columns == e)[None, :], pushed[:, None], 0.0)
        valid = (rows < n)[:, None] & (columns < d)[None, :]
        offsets = (origin + rows)[:, None] * d + columns[None, :]
        s = tl.load(scores + offsets, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + offsets, (diagonal * s + total) / n, mask=valid)


def by_differences(
    particles: Tensor, scores: Tensor, bandwidth: Tensor, out: Tensor, rows: Rows, kernel: int, beta: float, c: float,
    temperature: float,
) -> None:  # fmt: skip
    batch, n, d = particles.shape
    x, s = (
        t.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).contiguous()
        for t in (particles, scores)
    )
    m, width = DIRECT_TILE[d]
    blocks = triton.cdiv(n, m)
    diagonal = stein.at_zero(kernel, beta, c)
    count, each = parts(blocks, n, width)
    partial = torch.empty(count, *out.shape, dtype=torch.float32, device=out.device) if count > 1 else None
    first, some = blocks_of(rows, m)
    direct.direction_kernel[(some, count, batch)](
        x, s, bandwidth, out, partial, n, first, each, beta, c, diagonal, temperature,
        KERNEL=kernel, D=d, M=m, N=width, STRETCH=STRETCH, num_warps=DIRECT_WARPS, **stein.OPTIONS,
    )  # fmt: skip
    if partial is not None:
        finish(scores, partial, out, diagonal)


def by_tiles(
    particles: Tensor, scores: Tensor, bandwidth: Tensor, out: Tensor, rows: Rows, kernel: int, beta: float, c: float,
    temperature: float, precision: int,
) -> None:  # fmt: skip
    batch, n, d = particles.shape
    device = particles.device
    width = max(stein.power_of_two(d), 16)
    rbf = kernel == stein.RBF.value
    launches = [(True, False)] if rbf else [(True, True)] if width < 128 else [(True, False), (False, True)]
    m, step, warps, stages = tile_configuration(
        stein.large_shared_memory(particles), width, (True, True) in launches
    )
    padded = triton.cdiv(n, PADDING) * PADDING
    split = PRECISIONS[precision].halves == 2
    statistics = stein.column_statistics(particles, scores)
    halves = torch.empty(4 if split else 2, batch, padded, width, dtype=torch.float16, device=device)
    x_high, v_high, x_low, v_low = halves if split else (*halves, None, None)
    norms = torch.empty(batch, padded, dtype=torch.float32, device=device)
    constants = torch.empty(batch, 2, dtype=torch.float32, device=device)
    column_scale = torch.empty(batch, width, dtype=torch.float32, device=device)
    tiles.prepare_kernel[(padded // 32, batch)](
        particles, scores, bandwidth, statistics, x_high, x_low, v_high, v_low, norms, constants, column_scale,
        n, d, padded, statistics.shape[2], beta, c, temperature,
        KERNEL=kernel, D=width, ROWS=32, CHUNKS=stein.MOST_CHUNKS, num_warps=4, **stein.OPTIONS,
    )  # fmt: skip
    blocks = triton.cdiv(n, m)
    count, each = parts(blocks, padded, step)
    sums = [
        torch.empty(count, batch, padded, width, dtype=torch.float32, device=device)
        for _ in range(1 if rbf else 2)
    ]
    sums_x = sums[1] if len(sums) > 1 else None
    row_sums = torch.empty(count, batch, padded, dtype=torch.float32, device=device)
    first, some = blocks_of(rows, m)
    for sum_k, sum_g in launches:
        tiles.tile_direction_kernel[(some, count, batch)](
            x_high, x_low, v_high, v_low, norms, constants, sums[0], sums_x, row_sums, padded, each, beta,
            KERNEL=kernel, SPLIT=split, SUM_K=sum_k, SUM_G=sum_g, D=width, M=m, N=step, STAGES=stages, FIRST=first,
            num_warps=warps, **stein.OPTIONS,
        )  # fmt: skip
    tiles.finish_tiles_kernel[(padded // 32, batch)](
        x_high, x_low, scores, bandwidth, constants, column_scale, sums[0], sums_x, row_sums, out,
        n, d, padded, count, beta, c, stein.at_zero(kernel, beta, c), temperature,
        KERNEL=kernel, D=width, ROWS=32, num_warps=4, **stein.OPTIONS,
    )  # fmt: skip
    # Halves of centred particles, and their inner products, have too few digits for a sharp bandwidth.
    sharp = torch.empty(batch, dtype=torch.int32, device=device)
    find_sharp(norms, bandwidth, sharp, n, math.log2(math.e) if rbf else 1 / (c * c))
    first, some = blocks_of(rows, 32)
    apart_kernel[(some, batch)](
        particles, scores, bandwidth, sharp, out, n, d, first, beta, c, stein.at_zero(kernel, beta, c), temperature,
        KERNEL=kernel, M=32, N=32, D=width, num_warps=4, **stein.OPTIONS,
    )  # fmt: skip


def by_strips(
    particles: Tensor, scores: Tensor, bandwidth: Tensor, out: Tensor, rows: Rows, kernel: int, beta: float, c: float,
    temperature: float, precision: int,
) -> None:  # fmt: skip
    n = particles.shape[1]
    strips = Strips(
        DIRECTION.value, particles, scores, None, bandwidth, kernel, beta, c, temperature, precision
    )
    result = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    for first, blocks in strips.of_rows(*rows):
        strips.product(first, blocks, result, 0, strips.scores, 1 / n, stein.at_zero(kernel, beta, c))
        strips.product(first, blocks, result, 1, strips.x, temperature / n, add=True)
    if result is not out:
        out.copy_(result)


def svgd_direction(
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    kernel: int,
    beta: float,
    c: float,
    temperature: float,
    precision: int = 0,
) -> Tensor:
    """phi [B, n, d] in the type of ``particles``, as the function of this name in fekernels.reference."""
    call = kernel, beta, c, temperature, precision
    return svgd_direction_rows(particles, scores, bandwidth, *call, 0, particles.shape[1])


def svgd_direction_rows(
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    kernel: int,
    beta: float,
    c: float,
    temperature: float,
    precision: int,
    begin: int,
    end: int,
) -> Tensor:
    """phi[:, begin:end] of ``svgd_direction``, to the bit: no row's sums depend on which others are computed."""
    call = kernel, beta, c, temperature, precision
    if not stein.native(kernel, particles):
        return reference.svgd_direction_rows(particles, scores, bandwidth, *call, begin, end)
    out = torch.empty_like(particles)
    if not particles.numel() or begin >= end:
        return out[:, begin:end]
    if particles.shape[0] > stein.MOST_PROBLEMS:
        operands = (particles, scores, bandwidth)
        portions = zip(*(t.split(stein.MOST_PROBLEMS) for t in operands), strict=True)
        return torch.cat([svgd_direction_rows(x, s, h, *call, begin, end) for x, s, h in portions])
    d = particles.shape[2]
    arguments = (particles, scores, bandwidth, out, (begin, end), kernel, beta, c, temperature)
    with on_device_of(particles):
        if d <= stein.DIRECT:
            by_differences(*arguments)
        elif d <= TILES and kernel in stein.TILED:
            by_tiles(*arguments, precision)
        else:
            by_strips(*arguments, precision)
    return out if (begin, end) == (0, particles.shape[1]) else out[:, begin:end].clone()


def svgd_direction_backward(
    grad: Tensor,
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    kernel: int,
    beta: float,
    c: float,
    temperature: float,
    precision: int,
    needs: int,
) -> list[Tensor]:
    """Gradients of <grad, phi> by particles, scores and bandwidth, as the reference's function of this name."""
    operands = (particles, scores, bandwidth)
    if not stein.native(kernel, particles):
        return reference.svgd_direction_backward(
            grad, *operands, kernel, beta, c, temperature, precision, needs
        )
    found = [torch.empty_like(t) if needs >> i & 1 else t.new_empty(0) for i, t in enumerate(operands)]
    if not particles.numel():
        return [t.zero_() for t in found]
    if particles.shape[0] > stein.MOST_PROBLEMS:
        portions = zip(*(t.split(stein.MOST_PROBLEMS) for t in (grad, *operands)), strict=True)
        results = [
            svgd_direction_backward(g, x, s, h, kernel, beta, c, temperature, precision, needs)
            for g, x, s, h in portions
        ]
        return [torch.cat(part) for part in zip(*results, strict=True)]
    n = particles.shape[1]
    # Two products are added up.
    result = (
        found[0] if particles.dtype == torch.float32 else torch.empty_like(particles, dtype=torch.float32)
    )
    with on_device_of(particles):
        strips = Strips(
            BACKWARD.value, particles, scores, grad, bandwidth, kernel, beta, c, temperature, precision, bool(needs & 4)
        )  # fmt: skip
        assert strips.grad is not None
        for first, blocks in strips:
            if needs & 1:
                strips.product(first, blocks, result, 1, strips.grad, temperature / n)
                strips.product(first, blocks, result, 2, strips.x, 2.0, add=True)
            if needs & 2:
                strips.product(first, blocks, found[1], 0, strips.grad, 1 / n, stein.at_zero(kernel, beta, c))
        if needs & 1 and result is not found[0]:
            found[0] = result.to(particles.dtype)
        if strips.totals is not None:
            found[2] = total(strips.totals, bandwidth.dtype).view(-1)
    return found
