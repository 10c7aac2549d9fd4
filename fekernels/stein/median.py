"""Median bandwidths, exact and in O(n d) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._checks import floating, one_of, same_device
from fekernels.ops.stein.particles import check_particles, compute_dtype, flatten
from fekernels.ops.stein.sq_dist_rank import Pick, log, median_ranks, median_sq_dist, middle_two, select

__all__ = ["at_least", "by_convention", "check_convention", "median_bandwidth", "pairwise_sq_dist_median"]

CONVENTIONS = ("liu_wang", "pairs", "blackjax", "numpyro")


def _hint(function: str, hint: object, particles: Tensor) -> Tensor | None:
    if hint is None:
        return None
    tensor = floating(function, "hint", hint)
    if tensor.shape != particles.shape[:-2]:
        raise ValueError(
            f"{function}: hint must have shape {tuple(particles.shape[:-2])}, the batch of particles; got"
            f" {tuple(tensor.shape)}"
        )
    same_device(function, "hint", tensor, particles.device)
    return tensor.detach().reshape(-1).to(compute_dtype(particles))


def at_least(function: str, n: int, least: int, why: str) -> None:
    if n < least:
        raise ValueError(f"{function}: particles must be at least {least} ({why}); got {n}")


def pairwise_sq_dist_median(
    particles: Tensor, include_diagonal: bool = True, *, hint: Tensor | None = None
) -> Tensor:
    """The median of \\|x_i - x_j\\|^2 over all n^2 pairs, or over those with i < j; exact.

    Args:
        particles: [..., n, d], float32, bfloat16, float16 (distances in float32) or float64.
        include_diagonal: whether the n zeros count, and every other pair twice.
        hint: an earlier result, of the same shape. Saves time where it is about right; never changes the result.

    Returns:
        [...], float32 or float64; the mean of the two middle values of an even count. It has no gradient.

    Raises:
        TypeError, ValueError: as elsewhere; ValueError for no particles, and for one without the diagonal.
    """
    function = "pairwise_sq_dist_median"
    particles = check_particles(function, particles)
    if not isinstance(include_diagonal, bool):
        raise TypeError(f"{function}: include_diagonal must be a bool; got {type(include_diagonal).__name__}")
    at_least(function, particles.shape[-2], *((1, "n") if include_diagonal else (2, "n, for a pair")))
    near = _hint(function, hint, particles)
    return median_sq_dist(flatten(particles), include_diagonal, near).reshape(particles.shape[:-2])


def median_bandwidth(
    particles: Tensor, convention: str = "liu_wang", *, hint: Tensor | None = None
) -> Tensor:
    """A bandwidth h, as in exp(-\\|x - y\\|^2 / h), from the median distance between particles; exact.

    Args:
        particles: [..., n, d], float32, bfloat16, float16 (distances in float32) or float64.
        convention: "liu_wang": median of all n^2 squared distances, the diagonal included, / log(n + 1): the code of
            Liu & Wang 2016. "pairs": the lower median of the squared distances of pairs / log(n + 1).
            "blackjax": (median distance of pairs)^2 / log(n). "numpyro": (median of all n^2 distances)^2 / log(n).
        hint: the bandwidth of an earlier, similar set, of the same convention and shape. Saves time where it is about
            right; never changes the result.

    Returns:
        [...], float32 or float64. Medians of even counts are the mean of the two middle values, but in "pairs". No
        gradient flows through it.

    Raises:
        TypeError, ValueError: as elsewhere; ValueError for too few particles: none, or one where there is no pair or
            log(n) = 0 (all but "liu_wang", which gives 0).
    """
    function = "median_bandwidth"
    particles = check_particles(function, particles)
    convention = check_convention(function, convention, particles.shape[-2])
    near = _hint(function, hint, particles)
    return by_convention(flatten(particles), convention, near).reshape(particles.shape[:-2])


def check_convention(function: str, convention: object, n: int) -> str:
    """Its name, where n particles have such a median."""
    name = one_of(function, "convention", convention, CONVENTIONS)
    if name == "liu_wang":
        at_least(function, n, 1, "n")
    else:
        at_least(function, n, 2, f"n, for convention {name!r}")
    return name


def by_convention(x: Tensor, convention: str, near: Tensor | None = None, pick: Pick = select) -> Tensor:
    """[B]: the bandwidth of particles [B, n, d]; ``pick`` as in `median_sq_dist`."""
    n = x.shape[1]
    scale = log(n if convention in ("blackjax", "numpyro") else n + 1, x)
    if near is not None:
        near = near * scale
    if convention == "liu_wang":
        return median_sq_dist(x, True, near, pick) / scale
    if convention == "pairs":
        near = None if near is None else near.unsqueeze(1)
        return pick(x, median_ranks(n, False)[:1], near)[:, 0] / scale
    if convention == "numpyro" and not torch.compiler.is_compiling() and n == 2:
        # The distances are 0, 0, r, r.
        return pick(x, [0], None)[:, 0] / 4 / scale
    near = None if near is None else near.unsqueeze(1).expand(-1, 2)
    middle = middle_two(x, convention == "numpyro", near, pick).sqrt()
    return (middle / 2).sum(1).square() / scale
