"""The kernelised Stein discrepancy in plain PyTorch, by blocks of rows.

    kp(i, j) = k s.s' + g (s - s').(x - y) - (p2/h^2) t + d g,    g = p1/h

with the radial functions of ``kernels.radial``; for the linear kernel (x.y + 1) s.s' + s.x + s'.y + d.

Source: Liu, Lee & Jordan 2016, arXiv:1602.03253; Chwialkowski, Strathmann & Gretton 2016, arXiv:1602.02964.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._catalogue.stein import LINEAR
from fekernels.reference.stein.kernels import (
    centred,
    difference_products,
    over_bandwidth,
    problems,
    radial,
    repulsion,
    row_blocks,
    square_distances,
)
from fekernels.reference.stein.svgd_direction import plain_centred, plain_distances, plain_kernel

__all__ = [
    "kernel_stein_discrepancy",
    "kernel_stein_discrepancy_backward",
    "plain_discrepancy",
    "stein_block",
]


def stein_block(
    xi: Tensor, si: Tensor, x: Tensor, s: Tensor, h: Tensor, kernel: int, beta: float, c: float,
    squares: Tensor | None = None, products: Tensor | None = None, transformed: bool = False,
) -> Tensor:  # fmt: skip
    """kp [B, r, n] of rows [B, r, d] and columns [B, n, d], all float64, centred alike; h [B, 1, 1].

    squares, products: x.x and x.s of the columns, [B, n], for whoever calls this for few rows at a time.
    transformed: as of ``square_distances``.
    """
    d = x.shape[2]
    inner = si @ s.mT
    if kernel == LINEAR:
        products = (s * x).sum(2) if products is None else products
        return (xi @ x.mT + 1) * inner + (si * xi).sum(2).unsqueeze(2) + products.unsqueeze(1) + d
    across = difference_products(xi, si, x, s, products)
    u, divisor = over_bandwidth(square_distances(xi, x, squares, transformed), h)
    k, p1, p2 = radial(kernel, u, beta, c, 2)
    return k * inner + (p1 * (across + d) - _times(u, p2)) / divisor


def kernel_stein_discrepancy(
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    weights: Tensor,
    kernel: int,
    beta: float,
    c: float,
) -> Tensor:
    """sum_{i != j} w_i w_j kp(i, j), float64 [B, m]; weights [1 or B, n, m], bandwidth [B]."""
    batch, n, _ = particles.shape
    sums = torch.zeros(batch, weights.shape[2], dtype=torch.float64, device=particles.device)
    for part in problems(batch, n):
        x, s, h = _operands(particles[part], scores[part], bandwidth[part], kernel)
        w = (weights if weights.shape[0] == 1 else weights[part]).double()
        for rows in row_blocks(n):
            kp = stein_block(x[:, rows], s[:, rows], x, s, h, kernel, beta, c)
            kp.diagonal(rows.start, 1, 2).zero_()
            sums[part] += (w[:, rows] * (kp @ w)).sum(1)
    return sums


def kernel_stein_discrepancy_backward(
    grad: Tensor,
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    weights: Tensor,
    kernel: int,
    beta: float,
    c: float,
    needs: int,
) -> list[Tensor]:
    """Gradients of sum_m grad_m KSD_m by [particles, scores, bandwidth]; empty where the bit of ``needs`` is not set.

    With W_ij = sum_m grad_m w_im w_jm and q = dkp/dt at fixed scores and differences:

        dS_i = 2 sum_j W_ij [k S_j + g (x_i - x_j)],    dX_i = 2 sum_j W_ij [g (S_i - S_j) + 2 q (x_i - x_j)].
    """
    batch, n, d = particles.shape
    operands = (particles, scores, bandwidth)
    dx, ds, dh = (torch.zeros_like(o) if needs >> i & 1 else o.new_empty(0) for i, o in enumerate(operands))
    for part in problems(batch, n):
        x, s, h = _operands(particles[part], scores[part], bandwidth[part], kernel)
        w = (weights if weights.shape[0] == 1 else weights[part]).double()
        by_bandwidth = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        for rows in row_blocks(n):
            xi, si = x[:, rows], s[:, rows]
            inner, across = si @ s.mT, difference_products(xi, si, x, s)
            both = (w[:, rows] * grad[part].double().unsqueeze(1)) @ w.mT
            both.diagonal(rows.start, 1, 2).zero_()
            if kernel == LINEAR:
                k, g = both * (xi @ x.mT + 1), both * inner
                share = both.sum(2, keepdim=True)
                by_s, by_x = k @ s + share * xi, g @ x + share * si
            else:
                u, divisor = over_bandwidth(square_distances(xi, x), h)
                k, p1, p2, p3 = radial(kernel, u, beta, c, 3)
                k, g = both * k, both * p1 / divisor
                by_s = k @ s + repulsion(g, xi, x)
                q = p1 * inner + (p2 * (across + d + 2) - _times(u, p3)) / divisor
                q = both * q / divisor / -2
                by_x = repulsion(g, si, s) + 2 * repulsion(q, xi, x)
                by_h = _times(u, p1) * inner / 2 - p1 * (across + d) / divisor
                by_h += (_times(u, p2) * (across + d + 4) - _times(u, _times(u, p3))) / divisor / 2
                by_bandwidth += (both * by_h / divisor).sum((1, 2))
            if needs & 1:
                dx[part, rows] = (2 * by_x).to(dx.dtype)
            if needs & 2:
                ds[part, rows] = (2 * by_s).to(ds.dtype)
        if needs & 4:
            dh[part] = by_bandwidth.to(dh.dtype)
    return [dx, ds, dh]


def _operands(
    particles: Tensor, scores: Tensor, bandwidth: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor]:
    x = particles.double() if kernel == LINEAR else centred(particles)
    return x, scores.double(), bandwidth.double().view(-1, 1, 1)


def _times(u: Tensor, p: Tensor) -> Tensor:
    """u p, where 0 times infinity, as at h = 0, is 0."""
    return torch.where(p == 0, 0.0, u * p)


def plain_discrepancy(
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    weights: Tensor,
    kernel: int,
    beta: float,
    c: float,
) -> Tensor:
    """The same with whole n x n matrices and out-of-place operations: for derivatives of any order, and vmap."""
    x, s, w, d = particles.double(), scores.double(), weights.double(), particles.shape[-1]
    own = (s * x).sum(-1)
    if kernel == LINEAR:
        off = 1 - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
        kp = off * ((x @ x.mT + 1) * (s @ s.mT) + own.unsqueeze(-1) + own.unsqueeze(-2) + d)
        return (w * (kp @ w)).sum(-2)
    x = plain_centred(x)
    inner, across = s @ s.mT, difference_products(x, s, x, s)
    k, g, g2 = plain_kernel(x, bandwidth.double(), kernel, beta, c, 2)
    t, _ = plain_distances(x)
    kp = k * inner + g * (across + d) - g2 * t
    return (w * (kp @ w)).sum(-2)
