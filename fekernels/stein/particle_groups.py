"""Mini-batch kernels: particles dealt at random into groups, each of which moves by itself.

Source: Li, Li, Liu, Liu & Lu 2020, "A stochastic version of Stein variational gradient descent for efficient sampling",
arXiv:1902.03394.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fekernels import random
from fekernels._catalogue.random import LANGEVIN_NOISE
from fekernels._catalogue.stein import KERNELS
from fekernels.ops.stein.particles import compute_dtype, which_kernel
from fekernels.ops.stein.svgd_direction import svgd_direction
from fekernels.stein.median import pairwise_sq_dist_median

__all__ = [
    "group_bandwidth",
    "group_direction",
    "group_medians",
    "mean_bandwidth",
    "part_direction",
    "random_groups",
]

STREAM = 1  # the noise of the same seed is stream 0


def random_groups(n: int, size: int, seed: int, step: int, device: torch.device) -> list[Tensor]:
    """Indices of n >= 2 particles dealt into groups of at most `size` (3 where 2 does not go into n).

    Returns:
        One or two tensors int64 [groups, members]: the numbers of members differ by one at most, none is below 2.
    """
    words = random.bits((n,), seed=seed, stream=STREAM, step=step, purpose=LANGEVIN_NOISE, device=device)
    order = torch.argsort(words, stable=True)
    count = min(-(-n // size), n // 2)
    members, larger = divmod(n, count)
    split = larger * (members + 1)
    parts = order[:split].view(larger, members + 1), order[split:].view(count - larger, members)
    return [part for part in parts if len(part)]


def group_medians(x: Tensor, index: Tensor) -> Tensor:
    """[groups]: the medians of the squared distances of the pairs of each group, of indices [groups, members]."""
    if not len(index):
        return x.new_empty(0, dtype=compute_dtype(x))
    return pairwise_sq_dist_median(x[index], include_diagonal=False)


def mean_bandwidth(medians: list[Tensor], n: int) -> Tensor:
    return torch.cat(medians).mean() / math.log(n + 1)


def group_bandwidth(x: Tensor, groups: list[Tensor]) -> Tensor:
    """The mean over the groups of the median squared distance of their pairs, over log(n + 1); one element."""
    return mean_bandwidth([group_medians(x, index) for index in groups], len(x))


def part_direction(x: Tensor, scores: Tensor, index: Tensor, kernel: object, **settings: Any) -> Tensor:
    """[groups, members, d]: what moves the particles ``index`` [groups, members] of n; see `group_direction`."""
    n, m = len(x), index.shape[1]
    code, beta, c = which_kernel("svgd_direction", kernel)
    diagonal, _ = KERNELS[code].at_zero(beta, c)
    own = diagonal * scores[index]
    within = svgd_direction(x[index], scores[index], kernel=kernel, **settings)
    return ((own + (n - 1) / (m - 1) * (m * within - own)) / n).to(x.dtype)


def group_direction(
    x: Tensor, scores: Tensor, groups: list[Tensor], kernel: object, **settings: Any
) -> Tensor:
    """[n, d], whose mean over all deals is the direction of all particles.

    The others of a group stand for all n - 1 others, hence the factor (n - 1) / (m - 1); the pair of a particle with
    itself is in every group, and keeps its weight.
    """
    phi = torch.empty_like(x)
    for index in groups:
        phi[index] = part_direction(x, scores, index, kernel, **settings)
    return phi
