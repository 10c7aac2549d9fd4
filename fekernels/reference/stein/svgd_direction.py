"""The Stein variational direction in plain PyTorch (Liu & Wang 2016, arXiv:1608.04471), by blocks of rows.

With u = |x_i - x_j|^2 / h, k = phi(u) and g = p1(u)/h = -2 phi'(u)/h,

    phi_i = (1/n) [phi(0) S_i + sum_{j != i} k_ij S_j + T sum_{j != i} g_ij (x_i - x_j)].

The self-pair, which is S_i and no repulsion, stays out of the matrix products. Memory: O(n d + block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._catalogue.stein import KERNELS, LINEAR, Distance
from fekernels.reference.stein.kernels import (
    APART,
    centred,
    coincide,
    difference_products,
    over_bandwidth,
    problems,
    radial,
    repulsion,
    row_blocks,
    square_distances,
    wide_bandwidth,
)

__all__ = [
    "plain_centred",
    "plain_direction",
    "plain_distances",
    "svgd_direction",
    "svgd_direction_backward",
    "svgd_direction_rows",
]


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
    """phi [B, n, d] in the type of ``particles``; bandwidth [B]. ``precision`` is for tensor cores."""
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
    """phi[:, begin:end] of ``svgd_direction``, to the bit: of the same blocks of rows, those with any of these."""
    if kernel == LINEAR:
        return _linear(particles, scores, temperature)[:, begin:end]
    batch, n, _ = particles.shape
    diagonal, _ = KERNELS[kernel].at_zero(beta, c)
    phi = torch.empty_like(particles)
    for part in problems(batch, n):
        x, s, h = (
            centred(particles[part]),
            scores[part].double(),
            wide_bandwidth(bandwidth[part]).view(-1, 1, 1),
        )
        for rows in row_blocks(n):
            if rows.stop <= begin or rows.start >= end:
                continue
            t = square_distances(x[:, rows], x)
            u, divisor = over_bandwidth(t, h)
            k, p1 = radial(kernel, u, beta, c, 1)
            k.diagonal(rows.start, 1, 2).zero_()
            total = torch.baddbmm(diagonal * s[:, rows], k, s)
            if temperature:
                # Coincident particles, oneself among them, do not repel: exactly, not up to rounding times 1/h.
                g = torch.where(t == 0, 0.0, p1 / divisor)
                total += temperature * repulsion(g, x[:, rows], x)
            phi[part, rows] = (total / n).to(phi.dtype)
    return phi if (begin, end) == (0, n) else phi[:, begin:end].clone()


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
    """Gradients of <grad, phi> by [particles, scores, bandwidth]; an empty one where the bit of ``needs`` is not set.

    With a = G_i.S_j + G_j.S_i, b = (G_i - G_j).(x_i - x_j) and M = -(1/2n) [(p1/h) a + T (p2/h^2) b]:

        dS_i = (1/n) [phi(0) G_i + sum k G_j]
        dX_i = (T/n) sum g_ij (G_i - G_j) + 2 sum M_ij (x_i - x_j)
        dh   = sum_{i<j} (1/n) [(u p1/2h) a + T ((u p2/2 - p1)/h^2) b]
    """
    if kernel == LINEAR:
        return _linear_backward(grad, particles, scores, bandwidth, temperature, needs)
    batch, n, _ = particles.shape
    diagonal, _ = KERNELS[kernel].at_zero(beta, c)
    operands = (particles, scores, bandwidth)
    dx, ds, dh = (torch.zeros_like(o) if needs >> i & 1 else o.new_empty(0) for i, o in enumerate(operands))
    for part in problems(batch, n):
        x, s, h = (
            centred(particles[part]),
            scores[part].double(),
            wide_bandwidth(bandwidth[part]).view(-1, 1, 1),
        )
        g_all = grad[part].double()
        by_bandwidth = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        for rows in row_blocks(n):
            xi, si, gi = x[:, rows], s[:, rows], g_all[:, rows]
            t = square_distances(xi, x)
            u, divisor = over_bandwidth(t, h)
            k, p1, p2 = radial(kernel, u, beta, c, 2)
            for each in (k, p1, p2):
                each.diagonal(rows.start, 1, 2).zero_()
            if needs & 2:
                ds[part, rows] = (torch.baddbmm(diagonal * gi, k, g_all) / n).to(ds.dtype)
            if not needs & 5:
                continue
            r1, r2 = p1 / divisor, temperature * (p2 / divisor / divisor)
            a = gi @ s.mT + si @ g_all.mT
            b = difference_products(xi, gi, x, g_all)
            b = torch.where(t == 0, 0.0, b)  # exactly: at a small h its factor is huge
            if needs & 1:
                m = (r1 * a + r2 * b) / -(2 * n)
                by_x = (temperature / n) * repulsion(r1, gi, g_all) + 2 * repulsion(m, xi, x)
                dx[part, rows] = by_x.to(dx.dtype)
            if needs & 4:
                by_k = torch.where(r1 == 0, 0.0, u * r1) * a / 2
                by_g = torch.where(r2 == 0, 0.0, u * r2) / 2 - temperature * r1 / divisor
                by_bandwidth += (by_k + by_g * b).sum((1, 2)) / (2 * n)
        if needs & 4:
            dh[part] = by_bandwidth.to(dh.dtype)
    return [dx, ds, dh]


def _in_compute_dtype(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def _thin(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a (b^T c), the products in the order that makes the smaller matrix between them."""
    n, d = a.shape[1:]
    return a @ (b.mT @ c) if d < n else (a @ b.mT) @ c


def _linear(particles: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """phi_i = (1/n) sum_j (x_i.x_j + 1) S_j + T x_i; the diagonal included, the particles not centred."""
    if not particles.numel():
        return torch.empty_like(particles)
    with torch.autocast(particles.device.type, enabled=False):
        x, s = _in_compute_dtype(particles, scores)
        phi = (_thin(x, x, s) + s.sum(1, keepdim=True)) / x.shape[1] + temperature * x
    return phi.to(particles.dtype)


def _linear_backward(
    grad: Tensor, particles: Tensor, scores: Tensor, bandwidth: Tensor, temperature: float, needs: int
) -> list[Tensor]:
    dx, ds, dh = particles.new_empty(0), scores.new_empty(0), bandwidth.new_empty(0)
    with torch.autocast(particles.device.type, enabled=False):
        g, x, s = _in_compute_dtype(grad, particles, scores)
        n = max(1, x.shape[1])
        if needs & 1:
            dx = ((_thin(g, s, x) + _thin(s, g, x)) / n + temperature * g).to(particles.dtype)
        if needs & 2:
            ds = ((_thin(x, x, g) + g.sum(1, keepdim=True)) / n).to(scores.dtype)
        if needs & 4:
            dh = torch.zeros_like(bandwidth)
    return [dx, ds, dh]


def plain_direction(
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    kernel: int,
    beta: float,
    c: float,
    temperature: float,
) -> Tensor:
    """The same with whole n x n matrices and out-of-place operations: for derivatives of any order, and vmap."""
    x, s, n = particles.double(), scores.double(), max(1, particles.shape[-2])
    if kernel == LINEAR:
        phi = ((x @ x.mT) @ s + s.sum(-2, keepdim=True)) / n + temperature * x
        return phi.to(particles.dtype)
    x = plain_centred(x)
    diagonal, _ = KERNELS[kernel].at_zero(beta, c)
    k, g = plain_kernel(x, wide_bandwidth(bandwidth), kernel, beta, c, 1)
    phi = diagonal * s + k @ s + temperature * plain_repulsion(g, x)
    return (phi / n).to(particles.dtype)


def plain_repulsion(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j w_ij (x_i - x_j) [..., n, d], as `repulsion`."""
    if x.shape[-1] > APART:
        return weights.sum(-1, keepdim=True) * x - weights @ x
    return (weights.unsqueeze(-1) * (x.unsqueeze(-2) - x.unsqueeze(-3))).sum(-2)


def plain_centred(x: Tensor) -> Tensor:
    """Less the mean where inner products are taken; differences are of the particles as they are given."""
    return x if x.shape[-1] <= APART else x - x.mean(-2, keepdim=True)


def plain_distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances [..., n, n], differentiable any number of times, and where two particles coincide."""
    if x.shape[-1] <= APART:
        t = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)
        return t, t == 0
    squares = x.square().sum(-1)
    squares = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    t = squares - 2 * (x @ x.mT)
    return t, coincide(t, squares)


def plain_kernel(
    x: Tensor, bandwidth: Tensor, kernel: int, beta: float, c: float, order: int
) -> list[Tensor]:
    """[k, p1/h, p2/h^2, ...][: order + 1] as n x n matrices with a diagonal of 0; x [B, n, d] centred, float64."""
    t, zero = plain_distances(x)
    off = 1 - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    h = bandwidth[:, None, None]
    safe = torch.where(h == 0, 1.0, h)
    # Only at h = 0 and where the root is taken, as of the kink of laplace, is a coincidence told from a small distance:
    # elsewhere it has second derivatives.
    apart = torch.where(zero, 0.0, t)
    values = radial(
        kernel, (apart if KERNELS[kernel].distance is Distance.ROOT else t) / safe, beta, c, order
    )
    diagonal, _ = KERNELS[kernel].at_zero(beta, c)
    values = [torch.where(h == 0, diagonal * zero, values[0])] + [
        torch.where(h == 0, 0.0, value / safe**i) for i, value in enumerate(values[1:], 1)
    ]
    return [value * off for value in values]
