"""The Stein kernel between two sets of particles, and greedy thinning by it, in plain PyTorch without an n x n matrix.

Source: Riabiz et al. 2022, arXiv:2005.03952 (Stein thinning).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._catalogue.stein import LINEAR
from fekernels.reference.stein.kernel_stein_discrepancy import stein_block
from fekernels.reference.stein.kernels import DIRECT, PAIRS

__all__ = ["kernel_matrix", "thinning"]


def _shift(x: Tensor, kernel: int) -> Tensor | float:
    """What ``centred`` takes off, for both sets alike; a kernel that is not radial depends on where the origin is."""
    return 0.0 if kernel == LINEAR or x.shape[2] <= DIRECT else x.mean(1, keepdim=True)


def kernel_matrix(
    x: Tensor, s: Tensor, y: Tensor, r: Tensor, bandwidth: Tensor, kernel: int, beta: float, c: float,
    transformed: bool = False,
) -> Tensor:  # fmt: skip
    """kp [B, n, m], float64, of particles x and y with scores s and r, by blocks of rows.

    transformed: as of ``square_distances``.
    """
    x, s, y, r = (tensor.double() for tensor in (x, s, y, r))
    shift, h = _shift(y, kernel), bandwidth.double().view(-1, 1, 1)
    x, y = x - shift, y - shift
    rows = max(1, PAIRS // max(1, x.shape[0] * y.shape[1]))
    parts = zip(x.split(rows, 1), s.split(rows, 1), strict=True)
    blocks = [stein_block(xi, si, y, r, h, kernel, beta, c, transformed=transformed) for xi, si in parts]
    return torch.cat(blocks, 1)


def thinning(
    x: Tensor, s: Tensor, bandwidth: Tensor, count: int, kernel: int, beta: float, c: float
) -> Tensor:
    """Picks, int64 [B, count]: each i has the least kp(i, i)/2 + sum_{picked j} kp(i, j).

    The sums run in float64, so that thousands of picks leave no trace of their rounding.
    """
    batch, n, d = x.shape
    x, s = x.double(), s.double()
    x, h = x - _shift(x, kernel), bandwidth.double().view(-1, 1, 1)
    each = (x.reshape(-1, 1, d), s.reshape(-1, 1, d)) * 2
    squares, products = x.square().sum(2), (x * s).sum(2)
    running = stein_block(*each, h.repeat_interleave(n, 0), kernel, beta, c).view(batch, n) / 2
    picks = torch.empty(batch, count, dtype=torch.int64, device=x.device)
    problem = torch.arange(batch, device=x.device)
    for i in range(count):
        pick = picks[:, i] = running.argmin(1)
        own = x[problem, pick].unsqueeze(1), s[problem, pick].unsqueeze(1)
        running += stein_block(*own, x, s, h, kernel, beta, c, squares, products).squeeze(1)
    return picks
