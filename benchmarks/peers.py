"""What users of PyTorch run today instead of these optimizers and of the free energy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from benchmarks.harness import Contestant
from fekernels.bench.free_energy import PEERS, Loss, kl
from fekernels.bench.optimizers import (
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
    "ENERGIES",
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


# The free energies that no goal names, as models' code has them: means over the batch, without some constants.


def continuous_bernoulli(logit: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """By torch.distributions, whose normaliser is a Taylor series near a half."""
    density = torch.distributions.ContinuousBernoulli(logits=logit, validate_args=False)
    return -density.log_prob(x).sum(1).mean() + kl(mean, logvar)


def categorical(logits: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    energy = F.cross_entropy(logits.movedim(-1, 1), x, reduction="none").sum(1)
    return energy.mean() + kl(mean, logvar)


def laplace(r: Tensor, s: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return ((x - r).abs() * torch.exp(-s) + s).sum(1).mean() + kl(mean, logvar)


def student_t(r: Tensor, s: Tensor, nu: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    density = torch.distributions.StudentT(nu, r, torch.exp(0.5 * s), validate_args=False)
    return -density.log_prob(x).sum(1).mean() + kl(mean, logvar)


def poisson(log_rate: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return F.poisson_nll_loss(log_rate, x, reduction="none").sum(1).mean() + kl(mean, logvar)


def zero_inflated_negative_binomial(
    mu: Tensor, theta: Tensor, pi: Tensor, x: Tensor, mean: Tensor, logvar: Tensor
) -> Tensor:
    """As scvi-tools computes it: both cases of every element, chosen by multiplication."""
    eps = 1e-8
    softplus_pi = F.softplus(-pi)
    log_theta, log_sum = torch.log(theta + eps), torch.log(theta + mu + eps)
    pi_theta_log = -pi + theta * (log_theta - log_sum)
    zero = (x < eps).to(x.dtype) * (F.softplus(pi_theta_log) - softplus_pi)
    counts = (
        -softplus_pi
        + pi_theta_log
        + x * (torch.log(mu + eps) - log_sum)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )
    return -(zero + (x > eps).to(x.dtype) * counts).sum(1).mean() + kl(mean, logvar)


ENERGIES: dict[str, Loss] = {
    **PEERS,
    "continuous_bernoulli": continuous_bernoulli,
    "categorical": categorical,
    "laplace": laplace,
    "student_t": student_t,
    "poisson": poisson,
    "zero_inflated_negative_binomial": zero_inflated_negative_binomial,
}
