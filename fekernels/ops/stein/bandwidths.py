"""Bandwidths of the Stein functions: the rule by its name, a number or a tensor, as [B]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fekernels._catalogue.stein import KERNELS
from fekernels._checks import floating, number, same_device
from fekernels.ops.free_energy.broadcasting import broadcasts
from fekernels.ops.stein.particles import dispatched, transformed
from fekernels.ops.stein.sq_dist_rank import liu_wang

__all__ = ["bandwidths", "is_median", "no_bandwidth", "positive_bandwidth"]


def is_median(function: str, bandwidth: object, expected: str = "'median', a number or a tensor") -> bool:
    """Whether this names the rule that a bandwidth is the particles' median.

    Raises:
        ValueError: a string that names nothing.
    """
    if not isinstance(bandwidth, str):
        return False
    if bandwidth != "median":
        raise ValueError(f"{function}: bandwidth must be {expected}; got {bandwidth!r}")
    return True


def bandwidths(
    function: str,
    bandwidth: Tensor | float | str,
    kernel: int,
    x: Tensor,
    particles: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """[B] of ``dtype``, for the particles as they came and as ``x`` [B, n, d]; 1 for a kernel that has no bandwidth."""
    if is_median(function, bandwidth):
        if KERNELS[kernel].default_bandwidth is not None:
            return liu_wang(x).to(dtype)
        bandwidth = 1.0
    return _flat(function, bandwidth, particles, dtype)  # type: ignore[arg-type]


def _flat(function: str, bandwidth: Tensor | float, particles: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor that broadcasts to the batch dimensions, as [B] of ``dtype``.

    A tensor's values are looked at on a CPU only: elsewhere that would wait for the device.
    """
    batch = particles.shape[:-2]
    count = math.prod(batch)
    if not isinstance(bandwidth, Tensor):
        value = number(function, "bandwidth", bandwidth, infinite=True)
        return torch.full((count,), value, dtype=dtype, device=particles.device)
    floating(function, "bandwidth", bandwidth)
    same_device(function, "bandwidth", bandwidth, particles.device)
    if bandwidth.shape != batch and not broadcasts(bandwidth.shape, batch):
        raise ValueError(
            f"{function}: bandwidth must have a shape that broadcasts to the batch {tuple(batch)} of particles; got"
            f" {tuple(bandwidth.shape)}"
        )
    if bandwidth.device.type == "cpu" and _has_values(bandwidth):
        # Of one element directly: a comparison and a reduction would take as long as a small problem.
        least = bandwidth.item() if bandwidth.numel() == 1 else bandwidth.min().item() if count else 0.0
        if not least >= 0:  # NaN too
            raise ValueError(f"{function}: bandwidth must be >= 0; got {least}")
    bandwidth = bandwidth.to(dtype)
    return bandwidth if bandwidth.shape == (count,) else bandwidth.expand(batch).reshape(count)


def _has_values(tensor: Tensor) -> bool:
    """Whether a value can be looked at: not under torch.compile and torch.func, nor of a fake tensor."""
    return not dispatched(tensor) and not transformed()


def no_bandwidth(bandwidth: Tensor) -> Tensor:
    """Where h counts as 0, bool [B]: below the smallest normal number it has no inverse."""
    return bandwidth < torch.finfo(bandwidth.dtype).tiny


def positive_bandwidth(function: str, bandwidth: Tensor, median: bool = False, *, wait: bool = False) -> None:
    """Raise where an h of [B] is 0, which makes a discrepancy infinite: 2 d / h a coincident pair.

    Values are looked at on a CPU, elsewhere only with ``wait``, and never under torch.compile or torch.func.
    """
    if not _has_values(bandwidth) or not (wait or bandwidth.device.type == "cpu"):
        return
    # Of one element directly, as above.
    least = bandwidth.item() if bandwidth.numel() == 1 else bandwidth.min().item() if len(bandwidth) else 1.0
    if least < torch.finfo(bandwidth.dtype).tiny:
        which = f" in problem {int(bandwidth.argmin())}" if len(bandwidth) > 1 else ""
        why = ", the median over particles of which too many coincide: give a number" if median else ""
        raise ValueError(
            f"{function}: bandwidth must be > 0, since the discrepancy grows without bound as it falls; got "
            f"{least:g}{which}{why}"
        )
