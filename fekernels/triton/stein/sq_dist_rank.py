"""Order statistics of the squared distances between pairs of particles by Triton; the truth: fekernels.reference.stein.

Not negative, floating numbers are ordered as their bits are. A pass over all pairs counts those below a range of 256
bins and those in each bin; the bin with the rank is the next pass's range, until a bin is one number. What the host
launches does not depend on the data, so that it never waits and a CUDA graph can hold it: passes find in device
memory whether there is still something to do. Four always suffice from the whole range. A sample of pairs, or a hint,
gives one so narrow that mostly two do; if the rank is not in it, the search begins anew with the whole.

Few particles' distances are all made and sorted instead.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fekernels.reference.stein import sq_dist_rank as reference
from fekernels.triton import numerics
from fekernels.triton.launch import on_device_of
from fekernels.triton.stein import kernels as stein

BINS = tl.constexpr(256)  # a histogram by warp votes, as Triton makes it, takes time in proportion
FIRST_SHIFT = tl.constexpr(23)  # of the whole range: 2^31 = 256 << 23
PASSES = 5  # one in vain and four
SAMPLE = 1 << 18  # pairs: 6 standard errors of a quantile are then about 256 << 8 numbers
SAMPLED_FROM = 4096  # particles; below, two more passes are cheaper than sorting a sample
WIDTH = 6  # standard errors from end to end of the sampled range
SORTED = 256  # particles, or four times the dimensions, up to which all pairs are sorted if there is memory
MOST_SORTED = 4096  # particles, however many dimensions
MOST_SEGMENTS = 16  # of the columns, for the sake of balance: rows have pairs right of the diagonal only


@triton.jit
def key_of(t):
    """An int32 that is ordered as t >= 0 is, NaN last."""
    return t.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def distance_kernel(columns, partial, n, d, part, M: tl.constexpr):
    """partial [parts, B, n, n], i < j: squared distances over part of the dimensions. Grid: tiles, parts, problems."""
    batch = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(n, M)
    i = tl.program_id(0) // tiles * M + tl.arange(0, M)[:, None]
    j = tl.program_id(0) % tiles * M + tl.arange(0, M)[None, :]
    t = tl.zeros((M, M), tl.float32)
    begin = tl.program_id(1) * part
    for e in range(begin, tl.minimum(begin + part, d)):
        column = columns + (batch * d + e) * n
        difference = tl.load(column + i, mask=i < n, other=0.0) - tl.load(column + j, mask=j < n, other=0.0)
        t = tl.fma(difference, difference, t)
    offsets = ((tl.program_id(1) * tl.num_programs(2) + batch) * n + i) * n + j
    tl.store(partial + offsets, t, mask=(i < j) & (j < n))


@triton.jit
def pair_keys_kernel(partial, keys, n, parts, size: tl.int64, BLOCK: tl.constexpr):
    """keys [B, n, n] of the sums over the parts, in order; the largest there is where i >= j."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = (at < size) & (at // n % n < at % n)
    t = tl.load(partial + at, mask=valid, other=0.0)
    for part in range(1, parts):
        t += tl.load(partial + part * size + at, mask=valid, other=0.0)
    tl.store(keys + at, tl.where(valid, key_of(t), 0x7FFFFFFF), mask=at < size)


@triton.jit
def sample_kernel(columns, keys, n, d, count, BLOCK: tl.constexpr):
    """keys [B, count] of pairs picked by counters."""
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = (index ^ index).to(tl.uint32)
    word, other, _, _ = numerics.philox(index.to(tl.uint32), zero, zero, zero, 0x5E1EC7ED, 0)
    i = (word % n.to(tl.uint32)).to(tl.int64)
    j = (i + 1 + (other % (n - 1).to(tl.uint32)).to(tl.int64)) % n
    t = tl.zeros((BLOCK,), tl.float32)
    for e in range(0, d):
        column = columns + (batch * d + e) * n
        difference = tl.load(column + tl.minimum(i, j)) - tl.load(column + tl.maximum(i, j))
        t = tl.fma(difference, difference, t)
    tl.store(keys + batch * count + index, key_of(t))


@triton.jit(do_not_specialize=["low_at", "high_at", "rank"])
def start_kernel(
    sorted_keys, hint, state, counts, number, ranks, rank: tl.int64, low_at: tl.int64, high_at: tl.int64,
    count: tl.int64,
):  # fmt: skip
    """state [B, ranks, 3]: the first range's beginning, the shift that makes a bin of a key, the rank. Counts to 0.

    low_at, high_at: positions in the sorted sample, or outside for the ends of the whole range.
    """
    batch = tl.program_id(0).to(tl.int64)
    low = tl.full((), 0, tl.int64)
    high = tl.full((), 0x7FFFFFFF, tl.int64)
    if sorted_keys is not None:
        if low_at >= 0:
            low = tl.load(sorted_keys + batch * count + low_at).to(tl.int64)
        if high_at < count:
            high = tl.load(sorted_keys + batch * count + high_at).to(tl.int64)
    if hint is not None:
        middle = key_of(tl.load(hint + batch * ranks + number).to(tl.float32)).to(tl.int64)
        low = tl.maximum(middle - 0x8000, 0)
        high = low + 0xFFFF
    shift = tl.full((), 0, tl.int64)
    while ((high - low) >> shift) >= BINS:
        shift += 1
    slot = batch * ranks + number
    tl.store(state + slot * 3, low)
    tl.store(state + slot * 3 + 1, shift)
    tl.store(state + slot * 3 + 2, rank)
    tl.store(counts + slot * 2 * BINS + tl.arange(0, 2 * BINS), tl.zeros((2 * BINS,), tl.int64))


@triton.jit
def first_of_its_kind(state, batch, number, ranks):
    """The smallest number of a rank that has the same range: one histogram serves both."""
    low = tl.load(state + (batch * ranks + number) * 3)
    shift = tl.load(state + (batch * ranks + number) * 3 + 1)
    found = number
    for other in range(0, number):
        other_low = tl.load(state + (batch * ranks + other) * 3)
        other_shift = tl.load(state + (batch * ranks + other) * 3 + 1)
        if (other_low == low) & (other_shift == shift):
            found = tl.minimum(found, other)
    return found


@triton.jit
def count_kernel(
    columns, state, counts, n, d, segment, ranks,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """counts [B, ranks, 2 BINS]: of the range's bins, and behind them at BINS of what is below the range.

    Pairs i < j of M rows with a segment of columns; the distance is a chain of fma over the dimensions, the same
    in every pass. Integers are added atomically: in any order they have the same sum. Grid: row blocks, segments, ranks
    times problems.
    """
    number = tl.program_id(2) % ranks
    batch = (tl.program_id(2) // ranks).to(tl.int64)
    low = tl.load(state + (batch * ranks + number) * 3).to(tl.int32)
    shift = tl.load(state + (batch * ranks + number) * 3 + 1).to(tl.int32)
    first_row = tl.program_id(0) * M
    begin = tl.maximum(tl.program_id(1) * segment, first_row // N * N)
    end = tl.minimum((tl.program_id(1) + 1) * segment, n)
    todo = (begin < end) & (shift >= 0)
    if todo:
        todo = first_of_its_kind(state, batch, number, ranks) == number
    if todo:
        columns += batch * d * n
        i = first_row + tl.arange(0, M)[:, None]
        counted = tl.zeros((BINS,), tl.int32)
        below = tl.zeros((M, N), tl.int32)
        for first in range(begin, end, N):
            j = first + tl.arange(0, N)[None, :]
            t = tl.zeros((M, N), tl.float32)
            for e in range(0, d):
                column = columns + tl.cast(e, tl.int64) * n
                xi = tl.load(column + i, mask=i < n, other=0.0)
                xj = tl.load(column + j, mask=j < n, other=0.0)
                difference = xi - xj
                t = tl.fma(difference, difference, t)
            key = key_of(t)
            valid = (i < j) & (j < end)
            below += (valid & (key < low)).to(tl.int32)
            bin_of = (key - low) >> shift
            inside = valid & (key >= low) & (bin_of < BINS)
            counted += tl.histogram(tl.reshape(bin_of, (M * N,)), BINS, mask=tl.reshape(inside, (M * N,)))
        to = counts + (batch * ranks + number) * 2 * BINS
        tl.atomic_add(to + tl.arange(0, BINS), counted.to(tl.int64), mask=counted > 0, sem="relaxed")
        tl.atomic_add(to + BINS, tl.sum(tl.sum(below.to(tl.int64), 1), 0), sem="relaxed")


@triton.jit
def narrow_kernel(state, counts, ranks):
    """The bin with the rank becomes the range; a shift of -1 says that it was a number. Grid: problems."""
    batch = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    # From the last rank on, as one may look at the state and counts of those before it.
    for back in range(0, ranks):
        number = ranks - 1 - back
        slot = batch * ranks + number
        shift = tl.load(state + slot * 3 + 1)
        if shift >= 0:
            low = tl.load(state + slot * 3)
            rank = tl.load(state + slot * 3 + 2)
            found = counts + (batch * ranks + first_of_its_kind(state, batch, number, ranks)) * 2 * BINS
            counted = tl.load(found + bins)
            rest = rank - tl.load(found + BINS)
            digit = tl.sum((tl.cumsum(counted, 0) <= rest).to(tl.int64), 0)
            inside = (rest >= 0) & (digit < BINS)
            at_end = inside & (shift == 0)
            low = tl.where(inside, low + (digit << shift), 0)
            narrower = tl.where(inside, tl.maximum(shift - 8, 0), FIRST_SHIFT)
            tl.store(state + slot * 3, low)
            tl.store(state + slot * 3 + 1, tl.where(at_end, -1, narrower))


@triton.jit
def clear_kernel(counts, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + offsets, tl.zeros((BLOCK,), tl.int64))


@triton.jit
def result_kernel(state, out, ranks):
    slot = tl.program_id(0).to(tl.int64) * ranks + tl.program_id(1)
    key = tl.load(state + slot * 3).to(tl.int32)
    tl.store(out + slot, key.to(tl.float32, bitcast=True))


def all_keys(columns: Tensor) -> Tensor:
    """[B, n, n] of columns [B, d, n]."""
    batch, d, n = columns.shape
    tiles = triton.cdiv(n, 32) ** 2
    part = triton.cdiv(d, min(triton.cdiv(1024, tiles), triton.cdiv(d, 512)))
    parts = triton.cdiv(d, part)
    partial = torch.empty(parts, batch, n, n, dtype=torch.float32, device=columns.device)
    distance_kernel[(tiles, parts, batch)](columns, partial, n, d, part, M=32, num_warps=4, **stein.OPTIONS)
    keys = torch.empty(batch, n, n, dtype=torch.int32, device=columns.device)
    pair_keys_kernel[(triton.cdiv(keys.numel(), 1024),)](
        partial, keys, n, parts, keys.numel(), BLOCK=1024, num_warps=4, **stein.OPTIONS
    )  # fmt: skip
    return keys


def sq_dist_rank(particles: Tensor, ranks: Sequence[int], hint: Tensor | None = None) -> Tensor:
    """The ``ranks``-th smallest squared distances, as the function of this name in fekernels.reference."""
    if particles.dtype == torch.float64:
        return reference.sq_dist_rank(particles, ranks, hint)
    batch, n, d = particles.shape
    device = particles.device
    number = len(ranks)
    out = torch.empty(batch, number, dtype=torch.float32, device=device)
    if not out.numel():
        return out
    most = max(stein.MOST_PROBLEMS // number, 1)
    if batch > most:
        hints = [None] * triton.cdiv(batch, most) if hint is None else hint.split(most)
        portions = zip(particles.split(most), hints, strict=True)
        return torch.cat([sq_dist_rank(x, ranks, near) for x, near in portions])
    pairs = n * (n - 1) // 2
    with on_device_of(particles):
        columns = particles.transpose(1, 2).to(torch.float32).contiguous()
        if n <= min(4 * d, MOST_SORTED) or (n <= SORTED and batch * n * n <= 1 << 24):
            keys = all_keys(columns).view(batch, n * n).sort(1).values
            for at, rank in enumerate(ranks):
                out[:, at] = keys[:, rank].view(torch.float32)
            return out
        sorted_keys = None
        if hint is not None:
            hint = hint.contiguous()
        elif n >= SAMPLED_FROM:
            keys = torch.empty(batch, SAMPLE, dtype=torch.int32, device=device)
            sample_kernel[(SAMPLE // 256, batch)](
                columns, keys, n, d, SAMPLE, BLOCK=256, num_warps=4, **stein.OPTIONS
            )
            sorted_keys = keys.sort(1).values
        state = torch.empty(batch, number, 3, dtype=torch.int64, device=device)
        counts = torch.empty(batch, number, 2 * BINS.value, dtype=torch.int64, device=device)
        for at, rank in enumerate(ranks):
            middle, reach = SAMPLE * rank // pairs, WIDTH * math.isqrt(SAMPLE) // 4
            start_kernel[(batch,)](
                sorted_keys, hint, state, counts, at, number, rank, middle - reach, middle + reach, SAMPLE,
                num_warps=4, **stein.OPTIONS,
            )  # fmt: skip
        rows = 64
        segments = min(MOST_SEGMENTS, triton.cdiv(n, 8 * rows))
        segment = triton.cdiv(triton.cdiv(n, segments), rows) * rows
        for step in range(PASSES):
            if step:
                clear_kernel[(batch * number,)](counts, BLOCK=2 * BINS.value, num_warps=4, **stein.OPTIONS)
            count_kernel[(triton.cdiv(n, rows), segments, number * batch)](
                columns, state, counts, n, d, segment, number, M=rows, N=rows, num_warps=4, **stein.OPTIONS
            )
            narrow_kernel[(batch,)](state, counts, number, num_warps=4, **stein.OPTIONS)
        result_kernel[(batch, number)](state, out, number, num_warps=1, **stein.OPTIONS)
    return out
