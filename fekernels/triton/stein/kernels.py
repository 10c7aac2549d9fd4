"""What the Stein kernels share: the radial functions, sums over columns, sizes.

The contract and its truth are in fekernels.reference.stein.svgd_direction; the formulas in docs/svgd.md.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from fekernels._catalogue.stein import CODES, KERNELS, Distance

RBF = tl.constexpr(CODES["rbf"])
IMQ = tl.constexpr(CODES["imq"])
LAPLACE = tl.constexpr(CODES["laplace"])
MATERN32 = tl.constexpr(CODES["matern32"])
# Whose tiles of tensor-core products `tiles` writes out; the others go by strips.
TILED = (RBF.value, IMQ.value)

LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # a bandwidth below has no inverse, and counts as 0
INFINITY = tl.constexpr(float("inf"))

# Rounding is bounded, not fixed to the last bit as in the noise, so that products and sums may become an fma. Said
# explicitly: Triton 3.10 changes the default.
OPTIONS = {"enable_fp_fusion": True}

DIRECT = 8  # dimensions up to which differences take fewer instructions per pair than the tiles' exponents and halves

MOST_PROBLEMS = 65_535  # of a launch: CUDA's limit of a grid's second and third dimension
MOST_CHUNKS = 64  # of rows, that sums over columns are made of


def power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def large_shared_memory(tensor: Tensor) -> bool:
    """Whether a program has 227 KB: Hopper and data-centre Blackwell. Others have 99 KB or a little more."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] in (9, 10)


def at_zero(kernel: int, beta: float, c: float) -> float:
    """phi(0)."""
    return KERNELS[kernel].at_zero(beta, c)[0]


def native(kernel: int, particles: Tensor) -> bool:
    """Whether these kernels compute it: the reference has the others, and float64."""
    return KERNELS[kernel].native and particles.dtype != torch.float64


def takes_differences(kernel: int, d: int) -> bool:
    """Whether all problems go by differences of the particles as they are given; else those of a sharp bandwidth do."""
    return d <= DIRECT or KERNELS[kernel].distance is Distance.ROOT


@triton.jit
def inverse_bandwidth(h):
    """1/h, and 0 for h = 0."""
    return tl.where(h < SMALLEST, 0.0, 1.0 / tl.maximum(h, SMALLEST))


@triton.jit
def scaled(t, h, inverse):
    """u = t/h; at h = 0 infinite but for t = 0. inverse: `inverse_bandwidth` of h, a scalar."""
    return tl.where(t > 0, t * tl.where(h < SMALLEST, INFINITY, inverse), 0.0)


@triton.jit
def rbf(u):
    k = tl.exp2(u * -LOG2E)
    return k, 2.0 * k, 4.0 * k


@triton.jit
def imq(u, beta, c):
    base = c * c + u
    k = tl.exp2(beta * tl.log2(base))
    p1 = -2.0 * beta * k / base
    return k, p1, 2.0 * (1.0 - beta) * p1 / base


@triton.jit
def laplace(u):
    """Both derivatives are 0 at u = 0."""
    s = tl.sqrt(u)
    k = tl.exp2(s * -LOG2E)
    # At infinity k is 0, and so must be both quotients.
    inverse = tl.where(u > 0, 1.0 / tl.where(u > 0, s, 1.0), 0.0)
    p1 = k * inverse
    return k, p1, p1 * inverse * (inverse + 1.0)


@triton.jit
def matern32(u):
    """The second derivative, which diverges, is 0 at u = 0."""
    s = tl.sqrt(3.0 * u)
    decay = tl.exp2(s * -LOG2E)
    k = tl.where(decay > 0, (1.0 + s) * decay, 0.0)  # s may be infinite
    return k, 3.0 * decay, tl.where(u > 0, 9.0 * decay / tl.where(u > 0, s, 1.0), 0.0)


@triton.jit
def radial(u, KERNEL: tl.constexpr, beta, c):
    """phi(u), -2 phi'(u) and 4 phi''(u). u may be infinite."""
    if KERNEL == RBF:
        return rbf(u)
    elif KERNEL == IMQ:
        return imq(u, beta, c)
    elif KERNEL == LAPLACE:
        return laplace(u)
    else:
        tl.static_assert(KERNEL == MATERN32)
        return matern32(u)


@triton.jit
def column_statistics_kernel(
    particles, scores, statistics, n, d, chunk,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a chunk of rows: each column's sum, minimum and maximum of the particles, and largest absolute score.

    statistics: [B, 4, chunks, d].
    """
    columns = tl.program_id(0) * D + tl.arange(0, D)
    column_valid = columns < d
    batch = tl.program_id(2).to(tl.int64)
    total = tl.zeros((D,), tl.float32)
    least = tl.full((D,), INFINITY, tl.float32)
    most = tl.full((D,), -INFINITY, tl.float32)
    largest = tl.zeros((D,), tl.float32)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, n)
    for row in range(begin, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        valid = (rows < end)[:, None] & column_valid[None, :]
        offsets = (batch * n + rows)[:, None] * d + columns[None, :]
        x = tl.load(particles + offsets, mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
        least = tl.minimum(least, tl.min(tl.where(valid, x, INFINITY), 0))
        most = tl.maximum(most, tl.max(tl.where(valid, x, -INFINITY), 0))
        if scores is not None:
            s = tl.load(scores + offsets, mask=valid, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(s), 0))
    chunks = tl.num_programs(1)
    pointers = statistics + (batch * 4 * chunks + tl.program_id(1)) * d + columns
    step = chunks * d
    tl.store(pointers, total, mask=column_valid)
    tl.store(pointers + step, least, mask=column_valid)
    tl.store(pointers + 2 * step, most, mask=column_valid)
    tl.store(pointers + 3 * step, largest, mask=column_valid)


def column_statistics(particles: Tensor, scores: Tensor | None) -> Tensor:
    """[B, 4, chunks, d]. The chunks depend on n alone, so that a problem's mean does not depend on the others'."""
    batch, n, d = particles.shape
    chunk = max(triton.cdiv(n, MOST_CHUNKS), 32)
    width = min(power_of_two(d), 128)
    chunks = triton.cdiv(n, chunk)
    statistics = torch.empty(batch, 4, chunks, d, dtype=torch.float32, device=particles.device)
    column_statistics_kernel[(triton.cdiv(d, width), chunks, batch)](
        particles, scores, statistics, n, d, chunk, D=width, ROWS=2048 // width, num_warps=4, **OPTIONS
    )  # fmt: skip
    return statistics
