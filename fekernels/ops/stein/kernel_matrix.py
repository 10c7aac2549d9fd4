"""The Stein kernel as a matrix, and Stein thinning: the few draws of many that stand best for the target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fekernels._catalogue.stein import KERNELS
from fekernels._checks import floating, integer, same_device
from fekernels.ops.stein.bandwidths import bandwidths, is_median, positive_bandwidth
from fekernels.ops.stein.kernel_stein_discrepancy import gather, stein_kernel
from fekernels.ops.stein.particles import (
    Kernel,
    check_particles,
    check_scores,
    compute_dtype,
    flatten,
    transformed,
)
from fekernels.reference.stein import kernel_matrix as reference

__all__ = ["kernel_matrix", "thinning"]

MEDIAN_OF = 1000  # particles that thinning's median is of: that of all takes n^2 d operations


def _positive(function: str, h: Tensor, found: Kernel, bandwidth: object) -> None:
    if KERNELS[found.code].default_bandwidth is not None:
        positive_bandwidth(function, h, is_median(function, bandwidth), wait=True)


def kernel_matrix(
    particles: Tensor,
    scores: Tensor,
    others: Tensor | None = None,
    other_scores: Tensor | None = None,
    *,
    kernel: object = "imq",
    bandwidth: Tensor | float | str = "median",
) -> Tensor:
    """The Stein kernel kp(x, y) of every particle with every other; its mean over all pairs is the squared discrepancy.

    kp = k s.s' + grad_y k . s + grad_x k . s' + div_x grad_y k, with the scores s and s' at x and y. Over draws y from
    the target its mean is 0 for every x. Made by plain PyTorch in float64, in blocks of rows: no temporary grows with
    n m but the result.

    Args:
        particles: [..., n, d]; leading dimensions are problems of their own.
        scores: grad log p at the particles, of their shape.
        others: [..., m, d], of the same problems; None stands for the particles themselves.
        other_scores: grad log p at the others, of their shape; given where they are.
        kernel: as ``kernel_stein_discrepancy``.
        bandwidth: h, as in ``kernel_stein_discrepancy``: > 0. "median" is that of the particles, whatever the others.

    Returns:
        [..., n, m], float32, float64 for float64 operands. Differentiable, under torch.func and in forward mode too.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong value, shape or device; one of others and other_scores without the other; a bandwidth of 0.
    """
    function = "kernel_matrix"
    found = stein_kernel(function, kernel)
    check_scores(function, scores, check_particles(function, particles))
    if (others is None) != (other_scores is None):
        given = "other_scores" if others is None else "others"
        raise ValueError(f"{function}: others and other_scores must be given together; got {given} alone")
    both = None if others is None else _others(function, particles, others, other_scores)
    x, s, h = gather(function, particles, scores, found, bandwidth, positive=False)
    y, r = both or (x, s)
    if x.shape[1] and y.shape[1]:
        _positive(function, h, found, bandwidth)
    batch, dtype = particles.shape[:-2], compute_dtype(x, s, y, r)
    if not x.shape[0] * x.shape[1]:
        return h.new_zeros((*batch, x.shape[1], y.shape[1]), dtype=dtype)
    matrix = reference.kernel_matrix(x, s, y, r, h, *found, transformed())
    return matrix.to(dtype).reshape(*batch, x.shape[1], y.shape[1])


def _others(function: str, particles: Tensor, others: object, other_scores: object) -> tuple[Tensor, Tensor]:
    """Checked, as [B, m, d]."""
    tensor = floating(function, "others", others)
    same_device(function, "others", tensor, particles.device)
    *batch, _, d = particles.shape
    if tensor.dim() != particles.dim() or [*tensor.shape[:-2], tensor.shape[-1]] != [*batch, d]:
        raise ValueError(
            f"{function}: others must have shape ({', '.join(map(str, [*batch, 'm', d]))}) like particles; got "
            f"{tuple(tensor.shape)}"
        )
    scores = floating(function, "other_scores", other_scores)
    if scores.shape != tensor.shape:
        raise ValueError(
            f"{function}: other_scores must have shape {tuple(tensor.shape)} like others; got {tuple(scores.shape)}"
        )
    same_device(function, "other_scores", scores, particles.device)
    return flatten(tensor), flatten(scores)


@torch.no_grad()
def thinning(
    particles: Tensor,
    scores: Tensor,
    m: int,
    *,
    kernel: object = "imq",
    bandwidth: Tensor | float | str = "median",
) -> Tensor:
    """Stein thinning: the m of n draws that together have the least kernelised Stein discrepancy, found greedily.

    Unlike every k-th draw, or random ones, the picks also leave out a burn-in and make up for a chain that stays too
    long in places, since they are held against the target's scores and not against the chain. Each next pick is the i
    with the least kp(i, i)/2 + sum_{picked j} kp(i, j); it may be one that was picked already. O(n m d) operations and
    O(n d) memory, by plain PyTorch in float64 on the particles' device, which nothing waits for after the checks.

    Args:
        particles: [..., n, d], n >= 1: draws, in any order; leading dimensions are problems of their own. Where
            coordinates differ much in size, divide each by its standard deviation, and multiply its score by that.
        scores: grad log p at the particles, of their shape. Of p itself, with no minibatch noise: a draw is not to be
            picked for its noise.
        m: how many to pick, >= 1; more than n is possible.
        kernel: as ``kernel_stein_discrepancy``; that of the default also sees samples that drift away.
        bandwidth: h > 0, as in ``kernel_stein_discrepancy``; "median" is that of at most 1,000 particles, evenly
            spaced.

    Returns:
        [..., m], int64: indices of the picks, in their order; the first k of them are the answer for m = k.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong value, shape or device; no particle; particles or scores that are not finite; a bandwidth
            of 0.

    Source: Riabiz et al. 2022, arXiv:2005.03952, algorithm 1.
    """
    function = "thinning"
    found = stein_kernel(function, kernel)
    count = integer(function, "m", m, 1, 1 << 31)
    tensor = check_particles(function, particles)
    x, s = flatten(tensor), flatten(check_scores(function, scores, tensor))
    n, batch = x.shape[1], tensor.shape[:-2]
    if not n:
        raise ValueError(f"{function}: particles must be at least 1; got shape {tuple(tensor.shape)}")
    for name, values in (("particles", x), ("scores", s)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{function}: {name} must be finite; got a NaN or an infinity")
    some = x[:, :: math.ceil(n / MEDIAN_OF)]
    h = bandwidths(function, bandwidth, found.code, some, tensor, compute_dtype(x, s))
    if n > 1 or not is_median(function, bandwidth):
        _positive(function, h, found, bandwidth)
    else:
        h = torch.ones_like(h)  # of one particle, which is every pick
    return reference.thinning(x, s, h, count, *found).reshape(*batch, count)
