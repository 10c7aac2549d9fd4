"""The kernel's matrix of few particles, whole, by plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._catalogue.stein import KERNELS
from fekernels.ops.stein.particles import Kernel
from fekernels.reference.stein.kernels import over_bandwidth, radial

__all__ = ["gram_matrix"]


def gram_matrix(x: Tensor, kernel: Kernel, bandwidth: Tensor) -> Tensor:
    """k(x_i, x_j) [n, n] of a radial kernel, its diagonal exact; x [n, d] and a bandwidth of one element, float64."""
    t = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square_()
    u, _ = over_bandwidth(t, bandwidth)
    (k,) = radial(kernel.code, u, kernel.beta, kernel.c, 0)
    value, _ = KERNELS[kernel.code].at_zero(kernel.beta, kernel.c)
    k.diagonal().fill_(value)
    return k
