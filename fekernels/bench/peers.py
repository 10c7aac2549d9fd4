"""What users of PyTorch run today instead: plain lines and torch's own, family by family.

Other packages stand in ``packages.py``. What has no lines here is timed beside the reference backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from fekernels.bench.timing import Contestant

__all__ = [
    "ADAM",
    "ADAM_FOREACH",
    "ADAM_WITH_NOISE",
    "DIRECTIONS",
    "ENERGIES",
    "LR",
    "PLAIN_SGLD",
    "PSGLD",
    "TEMPERATURE",
    "adam",
    "compiled_adam",
    "plain_sgld",
    "psgld",
    "with_noise",
]

# Optimizers: contestants over given parameters.

ADAM, ADAM_FOREACH = "Adam(fused=True)", "Adam(foreach=True)"
ADAM_WITH_NOISE = "Adam(fused=True) + randn_like + add_"
PLAIN_SGLD = "add_(g).add_(randn_like)"
PSGLD = "pSGLD, tensor operations"

LR = 1e-3
TEMPERATURE = 1e-4
NOISE_SIZE = math.sqrt(2 * TEMPERATURE * LR)


def adam(params: list[Parameter], foreach: bool = False) -> torch.optim.Adam:
    """PyTorch's Adam, fused; or as it runs on a CPU by default, one operator after another over lists of tensors."""
    return torch.optim.Adam(params, lr=LR, fused=not foreach, foreach=foreach)


def compiled_adam(frozen: bool, backend: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Adam's step, without its bias corrections, as one loop that torch.compile makes of plain lines.

    Of parameter, gradient and both moments; ``frozen``: the second one is read, not written.
    """

    def step(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        exp_avg.lerp_(grad, 0.1)
        if not frozen:
            exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
        param.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(1e-8), value=-LR)

    return torch.compile(step, dynamic=False, backend=backend)


def with_noise(optimizer: torch.optim.Adam, params: list[Parameter]) -> Contestant:
    """The fused Adam with the noise that a user of it would add."""

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        for param in params:
            param.add_(torch.randn_like(param), alpha=NOISE_SIZE)

    return Contestant(ADAM_WITH_NOISE, step)


def plain_sgld(params: list[Parameter]) -> Contestant:
    """SGLD as it is written without a fused step."""

    @torch.no_grad()
    def step() -> None:
        for param in params:
            assert param.grad is not None
            param.add_(param.grad, alpha=-LR).add_(torch.randn_like(param), alpha=NOISE_SIZE)

    return Contestant(PLAIN_SGLD, step)


def psgld(params: list[Parameter]) -> Contestant:
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
            param.addcdiv_(torch.randn_like(param), denominator.sqrt_(), value=NOISE_SIZE)

    return Contestant(PSGLD, step)


# Free energies: (*params, target, mean, logvar) -> scalar. Means over the batch of sums over the event, as ours;
# constants left out where models' code leaves them out.

Loss = Callable[..., Tensor]


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(1).mean()


def mse(r: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return F.mse_loss(r, x, reduction="none").sum(1).mean() + kl(mean, logvar)


def bernoulli(logit: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    energy = F.binary_cross_entropy_with_logits(logit, x, reduction="none").sum(1).mean()
    return energy + kl(mean, logvar)


def gaussian(r: Tensor, s: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (s + (r - x).pow(2) * torch.exp(-s)).sum(1).mean() + kl(mean, logvar)


def negative_binomial(mu: Tensor, theta: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """As scvi-tools computes it: logarithms kept from 0 by 1e-8, three lgamma per element."""
    eps = 1e-8
    log_sum = torch.log(theta + mu + eps)
    log_p = (
        theta * (torch.log(theta + eps) - log_sum)
        + x * (torch.log(mu + eps) - log_sum)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )
    return -log_p.sum(1).mean() + kl(mean, logvar)


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
    """With log x!, as ours: F.poisson_nll_loss leaves it out, or takes two terms of Stirling's series for it."""
    energy = torch.exp(log_rate) - x * log_rate + torch.lgamma(x + 1)
    return energy.sum(1).mean() + kl(mean, logvar)


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


def gamma(mu: Tensor, shape: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    density = torch.distributions.Gamma(shape, shape / mu, validate_args=False)
    return -density.log_prob(x).sum(1).mean() + kl(mean, logvar)


ENERGIES: dict[str, Loss] = {
    "mse": mse,
    "bernoulli": bernoulli,
    "gaussian": gaussian,
    "negative_binomial": negative_binomial,
    "continuous_bernoulli": continuous_bernoulli,
    "categorical": categorical,
    "laplace": laplace,
    "student_t": student_t,
    "poisson": poisson,
    "zero_inflated_negative_binomial": zero_inflated_negative_binomial,
    "gamma": gamma,
}

# Stein: (x, s, h) -> result, of particles and scores [..., n, d] and a bandwidth. ``plain`` is the fastest that we
# could make of it, ``written`` what papers' code has.

Direction = Callable[[Tensor, Tensor, float], Tensor]


def over_h(x: Tensor, h: float) -> Tensor:
    """-|x_i - x_j|^2 / h by one matrix product, n x n; with leading dimensions too."""
    r = x.square().sum(-1) / -h
    if x.dim() == 2:
        t = torch.addmm(r, x, x.mT, alpha=2 / h)
    else:
        t = torch.baddbmm(r.unsqueeze(-2), x, x.mT, alpha=2 / h)
    return t.add_(r.unsqueeze(-1))


def plain(x: Tensor, s: Tensor, h: float) -> Tensor:
    """(1/n) [K (S - (2/h) X) + (2/h) r X], as who cares for speed writes it: two products, one n x n, in place."""
    n = x.shape[-2]
    k = over_h(x, h).exp_()
    if x.dim() == 2 and n < x.shape[1]:  # the fewest passes over X and S, which are what is large
        weights = k.sum(1).diag().sub_(k).mul_(2 / (h * n))
        return (weights @ x).addmm_(k, s, alpha=1 / n)
    phi = k @ torch.sub(s, x, alpha=2 / h)
    return phi.addcmul_(k.sum(-1, keepdim=True), x, value=2 / h).div_(n)


def written(x: Tensor, s: Tensor, h: float) -> Tensor:
    """The formula as papers' code has it."""
    k = torch.exp(-torch.cdist(x, x).square() / h)
    return (k @ s + (2 / h) * (k.sum(1, keepdim=True) * x - k @ x)) / x.shape[0]


def imq(x: Tensor, s: Tensor, h: float) -> Tensor:
    """(1 + t/h)^(-1/2), of repulsion k^3 / h."""
    k = over_h(x, h).neg_().add_(1).rsqrt_()
    g = k.pow(3).div_(h)
    return (k @ s).addcmul_(g.sum(1, keepdim=True), x).sub_(g @ x).div_(x.shape[0])


def laplace_kernel(x: Tensor, s: Tensor, h: float) -> Tensor:
    """exp(-sqrt(t/h)), of repulsion k / (sqrt(t/h) h), 0 between a particle and itself."""
    root = over_h(x, h).neg_().clamp_(min=0).sqrt_().fill_diagonal_(0)
    k = root.neg().exp_()
    g = (k / root).div_(h).fill_diagonal_(0)
    return (k @ s).addcmul_(g.sum(1, keepdim=True), x).sub_(g @ x).div_(x.shape[0])


def matern32(x: Tensor, s: Tensor, h: float) -> Tensor:
    """(1 + r) exp(-r) with r = sqrt(3t/h), of repulsion 3 exp(-r) / h."""
    root = over_h(x, h / 3).neg_().clamp_(min=0).sqrt_()
    g = root.neg().exp_()
    k = root.add_(1).mul_(g)
    g.mul_(3 / h)
    return (k @ s).addcmul_(g.sum(1, keepdim=True), x).sub_(g @ x).div_(x.shape[0])


DIRECTIONS: dict[str, Direction] = {"rbf": plain, "imq": imq, "laplace": laplace_kernel, "matern32": matern32}


def discrepancy(x: Tensor, s: Tensor, h: float) -> Tensor:
    """Two n x n matrices, two products (Liu, Lee & Jordan 2016): U-statistic, rbf."""
    n, d = x.shape
    u = over_h(x, h)
    k = u.exp()
    rows = k.sum(1, keepdim=True)
    psi = (k @ torch.sub(s, x, alpha=4 / h)).addcmul_(rows, x, value=4 / h)
    total = (s * psi).sum() + (2 * d / h) * (rows.sum() - n) + (4 / h) * torch.dot(k.view(-1), u.view(-1))
    return (total - s.square().sum()) / (n * (n - 1))


def cdist_median(x: Tensor) -> Tensor:
    """The bandwidth of Liu & Wang 2016 as their code has it: the median of a whole n x n matrix."""
    return torch.cdist(x, x).square().view(-1).median() / math.log(x.shape[0] + 1)


def bare(x: Tensor, s: Tensor) -> Callable[[], object]:
    """The two matrix products that no n x n formula avoids, and nothing else."""
    k, phi = torch.empty(x.shape[0], x.shape[0]), torch.empty_like(s)
    return lambda: (torch.mm(x, x.mT, out=k), torch.mm(k, s, out=phi))
