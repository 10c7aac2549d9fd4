"""What the Stein operations share in plain PyTorch: radial kernels and their derivatives, distances, blocks of rows.

All of it is computed in float64 whatever the operands are: repulsion is a difference of sums that nearly cancel where
the bandwidth is far below the particles' spread, and the reference is what other backends are held against. Up to 8
dimensions it is a sum of differences, which float64 particles have need of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.stein import KERNELS

__all__ = [
    "centred",
    "difference_products",
    "problems",
    "radial",
    "repulsion",
    "row_blocks",
    "square_distances",
]

PAIRS = 1 << 19  # of a block: 4 MB per float64 temporary, whatever n is
ROWS = 16  # of a block at least: fewer make matrix products slow
DIRECT = 16  # dimensions up to which distances by differences are as fast as by inner products
APART = 8  # up to which what particles push each other by is summed from differences: `repulsion`


def rbf(u: Tensor, beta: float, c: float, order: int) -> list[Tensor]:
    k = torch.exp(-u)
    return [factor * k if factor > 1 else k for factor in (1, 2, 4, 8)[: order + 1]]


def imq(u: Tensor, beta: float, c: float, order: int) -> list[Tensor]:
    base = c * c + u
    values = [base**beta]
    for i in range(order):
        values.append(values[i] * (2 * (i - beta)) / base)
    return values


def laplace(u: Tensor, beta: float, c: float, order: int) -> list[Tensor]:
    """p1 and p2 diverge at u = 0, where they count as 0; p3 is not needed, since the discrepancy is infinite."""
    zero = u == 0
    s = torch.sqrt(torch.where(zero, 1.0, u))
    k = torch.exp(-s)
    p1 = k / s
    p2 = p1 / s * (1 + 1 / s)  # k (1 + s)/s^3, which is 0 and no NaN at s = inf
    return [torch.where(zero, at, value) for at, value in ((1.0, k), (0.0, p1), (0.0, p2))][: order + 1]


def matern32(u: Tensor, beta: float, c: float, order: int) -> list[Tensor]:
    """p2 and p3 diverge at u = 0, where they count as 0: what they are multiplied by vanishes faster."""
    zero = u == 0
    s = torch.sqrt(torch.where(zero, 1.0, 3 * u))
    decay = torch.exp(-s)
    p2 = 9 * decay / s
    p3 = 3 * p2 / s * (1 + 1 / s)
    # 1 + s is infinite where u is
    values = torch.where(decay == 0, 0.0, (1 + s) * decay), 3 * decay, p2, p3
    return [torch.where(zero, at, v) for at, v in zip((1.0, 3.0, 0.0, 0.0), values, strict=True)][: order + 1]


# By code, of the radial kernels.
FORMULAS: tuple[Callable[[Tensor, float, float, int], list[Tensor]], ...] = tuple(
    globals()[row.name] for row in KERNELS if row.distance is not None
)


def radial(kernel: int, u: Tensor, beta: float, c: float, order: int) -> list[Tensor]:
    """[phi, p1, p2, p3][: order + 1] at u = t/h >= 0, where p_k = (-2)^k times the k-th derivative of phi.

    So for k = phi(|x - y|^2 / h) the gradient is -(p1/h)(x - y), and p1, p2, p3 are positive.
    """
    return FORMULAS[kernel](u, beta, c, order)


def centred(particles: Tensor) -> Tensor:
    """float64, less the mean over the particles where an offset common to all would cost digits of inner products."""
    x = particles.double()
    return x if x.shape[-1] <= DIRECT else x - x.mean(-2, keepdim=True)


def repulsion(weights: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """sum_j w_ij (x_i - x_j) [B, r, d], of weights [B, r, n], rows [B, r, d] and x [B, n, d].

    Of few dimensions from differences: folded, (sum_j w_ij) x_i - sum_j w_ij x_j, it loses to rounding where particles
    lie in clusters far apart, or where the weight grows without bound as they come close (laplace).
    """
    if x.shape[-1] > APART:
        return weights.sum(2, keepdim=True) * rows - weights @ x
    pairs = zip(rows.unbind(2), x.unbind(2), strict=True)
    sums = [(weights * (own.unsqueeze(2) - other.unsqueeze(1))).sum(2) for own, other in pairs]
    return torch.stack(sums, 2) if sums else torch.zeros_like(rows)


def difference_products(
    xi: Tensor, yi: Tensor, x: Tensor, y: Tensor, products: Tensor | None = None
) -> Tensor:
    """(x_i - x_j).(y_i - y_j) [..., r, n], of few dimensions from differences. products: x_j.y_j, where known."""
    if x.shape[-1] > APART:
        own_rows = (yi * xi).sum(-1).unsqueeze(-1)
        own = ((y * x).sum(-1) if products is None else products).unsqueeze(-2)
        return own_rows + own - yi @ x.mT - xi @ y.mT
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for one, other, own, its in zip(*(t.unbind(-1) for t in (xi, x, yi, y)), strict=True):
        total = total + (one.unsqueeze(-1) - other.unsqueeze(-2)) * (own.unsqueeze(-1) - its.unsqueeze(-2))
    return total.expand(*xi.shape[:-1], x.shape[-2])


def _direct_distances(rows: Tensor, x: Tensor) -> Tensor:
    return torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist").square()


class _SquareDistances(torch.autograd.Function):
    """|x_i - y_j|^2 from differences, by ``torch.cdist``, whose own derivatives are wrong under vmap (torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(rows, x)
        return _direct_distances(rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, x = ctx.saved_tensors
        return 2 * repulsion(grad, rows, x), 2 * repulsion(grad.mT, x, rows)


def square_distances(rows: Tensor, x: Tensor, own: Tensor | None = None, transformed: bool = False) -> Tensor:
    """t [B, r, n] from centred float64 rows [B, r, d] and x [B, n, d]; 0 exactly where two particles coincide.

    own: x.x [B, n], where known. transformed: under torch.func or in forward mode, which take plain operations alone.
    """
    if x.shape[-1] <= DIRECT and transformed:
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for one, other in zip(rows.unbind(-1), x.unbind(-1), strict=True):
            total = total + (one.unsqueeze(-1) - other.unsqueeze(-2)).square()
        return total.expand(*rows.shape[:-1], x.shape[-2])
    if x.shape[-1] <= DIRECT:
        wanted = torch.is_grad_enabled() and (rows.requires_grad or x.requires_grad)
        distances: Tensor = _SquareDistances.apply(rows, x) if wanted else _direct_distances(rows, x)
        return distances
    own = x.square().sum(-1) if own is None else own
    squares = rows.square().sum(-1).unsqueeze(-1) + own.unsqueeze(-2)
    t = torch.baddbmm(squares, rows, x.mT, alpha=-2)
    return torch.where(coincide(t, squares), 0.0, t)


def coincide(t: Tensor, squares: Tensor) -> Tensor:
    """Where t, a difference of numbers as large as ``squares``, is no more than their rounding."""
    return t <= 2.0**-46 * squares


def problems(batch: int, n: int) -> Iterator[slice]:
    """The batch in parts: as many problems at once as fill a block, else one by one."""
    step = max(1, PAIRS // max(1, n * n))
    for begin in range(0, batch if n else 0, step):
        yield slice(begin, min(batch, begin + step))


def row_blocks(n: int) -> Iterator[slice]:
    """The rows of one problem in blocks: all of a small one's."""
    step = n if n * n <= PAIRS else max(ROWS, PAIRS // n)
    for begin in range(0, n, max(1, step)):
        yield slice(begin, min(n, begin + step))


def wide_bandwidth(bandwidth: Tensor) -> Tensor:
    """float64, 0 where it counts as 0: below the smallest normal number of its own type, which has no inverse there."""
    return torch.where(bandwidth < torch.finfo(bandwidth.dtype).tiny, 0.0, bandwidth.double())


def over_bandwidth(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """u = t/h and what p1 is divided by, h [B, 1, 1]. At h = 0: u = 0 where t = 0, else inf; p1 / inf = 0."""
    return torch.where(t == 0, 0.0, t / h), torch.where(h == 0, torch.inf, h)
