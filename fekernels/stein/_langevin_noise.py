"""Langevin noise beside the Stein direction, the same on every device by `fe.random`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels import random
from fekernels._catalogue.random import LANGEVIN_NOISE
from fekernels._catalogue.stein import KERNELS
from fekernels._checks import number
from fekernels.ops.stein.gram_matrix import gram_matrix
from fekernels.ops.stein.particles import Kernel

__all__ = ["Noise", "make_noise"]

NAMES = ("independent", "kernel")
STREAM = 0
# Of phi(0), added to the diagonal before the factorisation: rounding leaves eigenvalues of -1e-12 n at most where
# particles nearly coincide, and 1e-8 / n more variance along single particles is below every other error.
JITTER = 1e-8


@dataclass(frozen=True, eq=False)
class Noise:
    """What is added to h phi: h a s + sqrt(2 h T) C^(1/2) xi, with C = a I, or C = K/n + a I for "kernel"."""

    kind: str
    rate: float

    def check(self, function: str, optimizer: Optimizer) -> None:
        """The step must be x - lr grad and nothing else."""
        plain = isinstance(optimizer, torch.optim.SGD) and not any(
            group["momentum"] or group["weight_decay"] or group["maximize"]
            for group in optimizer.param_groups
        )
        if not plain:
            raise ValueError(
                f"{function}: optimizer must be plain descent with noise={self.kind!r}: 'sgd', or torch.optim.SGD "
                f"without momentum, weight_decay and maximize; got {type(optimizer).__name__}"
            )

    def kick(
        self,
        x: Tensor,
        kernel: Kernel,
        bandwidth: Tensor,
        temperature: float,
        lr: float,
        seed: int,
        step: int,
        first: int = 0,
    ) -> Tensor:
        """The random part of step `step` (1 the first), [n, d], of particles number `first` and so on."""
        offset = first * x.shape[1]
        xi = random.normal(
            x.shape,
            seed=seed,
            stream=STREAM,
            step=step,
            offset=offset,
            purpose=LANGEVIN_NOISE,
            device=x.device,
        )
        scale = math.sqrt(2 * lr * temperature)
        if self.kind == "independent":
            return (xi * (scale * math.sqrt(self.rate))).to(x.dtype)
        factor = torch.linalg.cholesky(self._covariance(x.double(), kernel, bandwidth.double()))
        return (factor @ xi.double() * scale).to(x.dtype)

    def _covariance(self, x: Tensor, kernel: Kernel, bandwidth: Tensor) -> Tensor:
        k = gram_matrix(x, kernel, bandwidth)
        k.diagonal().mul_(1 + JITTER)
        covariance = k / len(x)
        covariance.diagonal().add_(self.rate)
        return covariance


def make_noise(
    function: str, kind: object, rate: object, kernel: Kernel, kernel_batch: int | None, alone: bool
) -> Noise | None:
    """The noise that `noise` and `noise_rate` mean for this kernel; ``alone``: all particles are in this process."""
    if kind is None:
        if rate is not None:
            raise ValueError(f"{function}: noise_rate must be None without noise; got {rate}")
        return None
    if not isinstance(kind, str) or kind not in NAMES:
        raise ValueError(f"{function}: noise must be None or one of {list(NAMES)}; got {kind!r}")
    row = KERNELS[kernel.code]
    if kind == "kernel" and row.distance is None:
        raise ValueError(
            f"{function}: noise='kernel' must have a radial kernel; got {row.name!r}, where SVGD's repulsion is not "
            "the whole divergence of the kernel matrix"
        )
    if kind == "kernel" and kernel_batch is not None:
        raise ValueError(
            f"{function}: noise='kernel' must have the whole kernel matrix; got kernel_batch={kernel_batch}"
        )
    default = 0.0 if kind == "kernel" else 1.0
    rate = default if rate is None else number(function, "noise_rate", rate)
    if kind == "kernel" and not alone:
        raise ValueError(
            f"{function}: noise='kernel' must have all particles in one process, whose covariance is factorised; "
            "got a process_group (noise='independent' has no such need)"
        )
    return Noise(str(kind), rate)
