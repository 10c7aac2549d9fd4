"""Calls of the reparameterised sample's kernels: one table of cases, their operands, and what is right in float64."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fekernels.reference import random
from tests.support.free_energy import DTYPES, placed
from tests.support.free_energy_kernels import Kernels
from tests.support.pairwise import pairwise

SHAPES = ((1, 1), (5, 3), (7, 20), (130, 20), (70, 9), (33, 130), (300, 8), (0, 4), (3, 0))
OFFSETS = (0, 3, 7, (1 << 33) + 1)  # rows before the first
# Seed, stream and step, each up to its end; streams to which the samples' numbers are added with a carry.
KEYS = ((0, 0, 0), (-0x123456789ABCDEF, 2**32 - 3, 17), ((1 << 63) - 1, (1 << 31) + 1, 2**32 - 1))
LATENT_SAMPLE = 3  # the noise's purpose


@dataclass(frozen=True)
class Case:
    """A sample and its gradients. In the first row are log-variances whose e^(v/2) over- and underflows."""

    shape: tuple[int, int]
    samples: int
    mean: torch.dtype
    logvar: torch.dtype
    key: tuple[int, int, int]
    offset: int
    layout: str

    @functools.cached_property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """mean, logvar, and the gradient from above."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        mean, logvar = (torch.randn(self.shape, generator=generator) for _ in range(2))
        extreme = torch.tensor([-300.0, -170.0, 100.0, 170.0])
        if len(logvar) > 1:
            logvar[0, :4] = extreme[: logvar.shape[1]]
        above = torch.randn((self.samples, *self.shape), generator=generator)
        return mean.to(self.mean), logvar.to(self.logvar), above.to(self.mean)

    def run(self, kernels: Kernels) -> list[Tensor]:
        """[samples, gradient of mean, gradient of logvar]."""
        mean, logvar, above = (placed(t.to(kernels.device), self.layout) for t in self.operands)
        z = kernels.reparameterize(mean, logvar, *self.key, self.offset, self.samples)
        return [z, *kernels.reparameterize_backward(above, logvar, *self.key, self.offset)]

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """In float64, and the sums of the sizes of what is added up."""
        mean, logvar, above = (t.double() for t in self.operands)
        seed, stream, step = self.key
        rows, latents = self.shape
        eps = torch.empty(self.samples, rows * latents)
        for k, sample in enumerate(eps):
            random.philox_normal(
                sample, seed, (stream + k) % 2**32, step, self.offset * latents, LATENT_SAMPLE
            )
        eps = eps.view(self.samples, rows, latents).double()
        sd = torch.exp(logvar / 2)
        size = 1 + eps.abs()  # the noise's error is of the order of 1 where it is small
        return (
            [mean + sd * eps, above.sum(0), (above * eps).sum(0) * sd / 2],
            [mean.abs() + sd * size, above.abs().sum(0), (above.abs() * size).sum(0) * sd / 2],
        )


CASES = [
    Case(*row)
    for row in pairwise(
        shape=SHAPES, samples=(1, 2, 3), mean=DTYPES, logvar=DTYPES, key=KEYS, offset=OFFSETS,
        layout=("packed", "shifted"),
    )
]  # fmt: skip
