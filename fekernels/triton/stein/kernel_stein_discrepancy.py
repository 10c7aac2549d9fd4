"""The kernelised Stein discrepancy by Triton, in O(n d) memory: fekernels.reference.stein.kernel_stein_discrepancy.

Strips of kp, then the quadratic form in each column of weights: however many columns, kp is made once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
from torch import Tensor

from fekernels._catalogue.stein import PRECISION_NAMES
from fekernels.reference.stein import kernel_stein_discrepancy as reference
from fekernels.triton.launch import on_device_of
from fekernels.triton.stein import kernels as stein
from fekernels.triton.stein.strip_kernels import DISCREPANCY, quadratic_kernel
from fekernels.triton.stein.strips import ROWS, Strips, padded, tile_width, total

FLOAT32 = PRECISION_NAMES.index("fp32")  # the sum over pairs is far smaller than its terms


def kernel_stein_discrepancy(
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    weights: Tensor,
    kernel: int,
    beta: float,
    c: float,
) -> Tensor:
    """sum_{i != j} w_i w_j kp(i, j), float64 [B, m], as the function of this name in fekernels.reference."""
    if not stein.native(kernel, particles):
        return reference.kernel_stein_discrepancy(particles, scores, bandwidth, weights, kernel, beta, c)
    batch, n, _ = particles.shape
    m = weights.shape[2]
    if not particles.numel() or not m:
        return torch.zeros(batch, m, dtype=torch.float64, device=particles.device)
    if batch > stein.MOST_PROBLEMS:
        operands = (particles, scores, bandwidth, weights.expand(batch, -1, -1))
        portions = zip(*(t.split(stein.MOST_PROBLEMS) for t in operands), strict=True)
        return torch.cat([kernel_stein_discrepancy(x, s, h, w, kernel, beta, c) for x, s, h, w in portions])
    with on_device_of(particles):
        strips = Strips(DISCREPANCY.value, particles, scores, None, bandwidth, kernel, beta, c, 1.0, FLOAT32)
        count = triton.cdiv(n, ROWS)
        totals = torch.empty(batch, count, m, dtype=torch.float64, device=particles.device)
        coefficients = padded(weights, strips.pitch)
        width = tile_width(m)
        for first, blocks in strips:
            quadratic_kernel[(blocks, triton.cdiv(m, width), batch)](
                strips.weights, coefficients, totals, first, m, strips.pitch, coefficients.shape[2], strips.strip,
                count, 0 if weights.shape[0] == 1 else coefficients.stride(0), M=ROWS, N=32, D=width,
                num_warps=4, num_stages=2, **stein.OPTIONS,
            )  # fmt: skip
        return total(totals, torch.float64)
