"""What `SVGD.run` measures and returns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.stein import IMQ, KERNELS
from fekernels.ops.stein.kernel_stein_discrepancy import kernel_stein_discrepancy, stein_kernel
from fekernels.ops.stein.particles import which_kernel

__all__ = ["SVGDResult", "discrepancy_kernel", "endless", "measure"]


@dataclass(frozen=True, eq=False)
class SVGDResult:
    """What `SVGD.run` did.

    Attributes:
        particles: [n, d] where they are now; a copy.
        steps: int64 [k], the number of steps made when each of the following was measured.
        discrepancy: float64 [k], the squared kernel Stein discrepancy (V-statistic) of the particles then; infinite at
            h = 0.
        bandwidth: float64 [k], h of the step that followed.
        log_prob: float64 [k], the mean over the particles of what log_prob returned; NaN with `scores`.
    """

    particles: Tensor
    steps: Tensor
    discrepancy: Tensor
    bandwidth: Tensor
    log_prob: Tensor

    @classmethod
    def of(cls, particles: Tensor, taken: list[int], rows: list[Tensor]) -> SVGDResult:
        columns = torch.stack(rows).cpu() if rows else torch.empty(0, 3, dtype=torch.float64)
        return cls(particles.clone(), torch.tensor(taken, dtype=torch.int64), *columns.unbind(1))

    def __repr__(self) -> str:
        last = f"{float(self.discrepancy[-1]):.4g}" if len(self.discrepancy) else "not measured"
        return f"SVGDResult(particles {tuple(self.particles.shape)}, squared discrepancy {last})"


def discrepancy_kernel(function: str, asked: object, own: object) -> object:
    """`asked`, or the sampler's own where its discrepancy is finite."""
    if asked is None:
        return own if KERNELS[which_kernel(function, own).code].discrepancy else IMQ.name
    stein_kernel(function, asked)
    return asked


def measure(kernel: object, x: Tensor, scores: Tensor, h: Tensor, log_prob: Tensor | None) -> Tensor:
    """[squared discrepancy, h, mean log_prob], float64; at h = 0 the discrepancy is infinite."""
    row = KERNELS[which_kernel("SVGD", kernel).code]
    zero = row.default_bandwidth is not None and float(h) < torch.finfo(h.dtype).tiny
    squared = torch.full((), math.inf, dtype=torch.float64, device=x.device)
    if not zero:
        squared = kernel_stein_discrepancy(x, scores, kernel=kernel, bandwidth=h, statistic="v").double()
    mean = torch.full_like(squared, math.nan) if log_prob is None else log_prob.double().mean()
    return torch.stack([squared, h.double(), mean])


def endless(function: str, batches: Iterable[Any] | None) -> Iterator[tuple[Any, ...]]:
    """The arguments of each step: the items of `batches`, begun again when they end."""
    if batches is None:
        while True:
            yield ()
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if not count:
            raise ValueError(
                f"{function}: batches must hold an item each time they are gone through (an iterator gives its own "
                "once); got none"
            )
