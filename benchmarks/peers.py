"""What users of PyTorch run today instead of these optimizers."""

from __future__ import annotations

import math

import torch
from torch.nn import Parameter

from benchmarks.harness import Contestant
from fekernels._bench_cases import (
    ADAM,
    ADAM_WITH_NOISE,
    LR,
    NOISE_SIZE,
    PLAIN_SGLD,
    TEMPERATURE,
    adam,
    plain_sgld,
)

__all__ = [
    "ADAM",
    "ADAM_WITH_NOISE",
    "LR",
    "NOISE_SIZE",
    "PLAIN_SGLD",
    "TEMPERATURE",
    "adam",
    "others",
    "plain_sgld",
]


def foreach_adam(params: list[Parameter]) -> Contestant:
    """PyTorch's Adam as it runs on a CPU by default: one operator after another over lists of tensors."""
    return Contestant("Adam(foreach=True)", torch.optim.Adam(params, lr=LR, foreach=True).step)


def eager_psgld(params: list[Parameter]) -> Contestant:
    """Preconditioned SGLD (Li et al. 2016) as papers' code has it: plain tensor operations, a parameter at a time."""
    averages = [torch.zeros_like(param) for param in params]
    beta, eps = 0.99, 1e-5

    @torch.no_grad()
    def step() -> None:
        for param, average in zip(params, averages, strict=True):
            grad = param.grad
            assert grad is not None
            average.mul_(beta).addcmul_(grad, grad, value=1 - beta)
            denominator = average.sqrt().add_(eps)
            param.addcdiv_(grad, denominator, value=-LR)
            param.addcdiv_(
                torch.randn_like(param), denominator.sqrt_(), value=math.sqrt(2 * TEMPERATURE * LR)
            )

    return Contestant("pSGLD, tensor operations", step)


def others(params: list[Parameter]) -> list[Contestant]:
    """Peers that the goals do not name, for scale."""
    return [foreach_adam(params), eager_psgld(params)]
