"""KL to priors that have no closed form, from samples; and mixtures for such priors.

Sources: Roeder, Wu & Duvenaud 2017 (sticking the landing, arXiv:1703.09194); Tomczak & Welling 2018 (VampPrior,
arXiv:1705.07120).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fekernels.losses._checks import floating_tensor

__all__ = ["GaussianMixturePrior", "Prior", "VampPrior", "monte_carlo_kl"]

LOG_2PI = math.log(2 * math.pi)


class Prior(Protocol):
    """Anything with the log-density of a latent, summed over its dimensions: [..., Z] -> [...]."""

    def log_prob(self, z: Tensor, /) -> Tensor: ...


def _check(function: str, **tensors: object) -> None:
    for name, value in tensors.items():
        floating_tensor(function, name, value)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def monte_carlo_kl(
    mean: Tensor,
    logvar: Tensor,
    z: Tensor,
    prior: Prior | None = None,
    sticking_the_landing: bool = False,
) -> Tensor:
    """log q(z) - log p(z) at samples z of q = N(mean, exp(logvar)): unbiased for KL(q || p), one value per sample.

    With z = mean + exp(logvar/2) eps and the prior N(0, I) it is the sum over latents of (z^2 - logvar - eps^2)/2. Its
    gradient comes through z (draw it with ``fe.reparameterize``) and through log q; ``sticking_the_landing`` leaves the
    latter out. Its expectation is zero, so the gradient stays unbiased, and it becomes exactly 0 at q = p:

    ========================  =======================  ===============================
    per latent                d mean                   d logvar
    ========================  =======================  ===============================
    full                      z                        z sd eps / 2 - 1/2
    sticking the landing      z - eps / sd             z sd eps / 2 - eps^2 / 2
    ========================  =======================  ===============================

    eps is recovered from z - mean, so a deviation below 1e-7 of the mean loses it in float32.

    Args:
        mean: [B, Z].
        logvar: [B, Z].
        z: Samples, [B, Z] or [..., B, Z].
        prior: With ``log_prob(z)`` summed over the latents; None is N(0, I).
        sticking_the_landing: Leave out the score of q.

    Returns:
        [B] or [..., B]: average over samples, and over the batch, as you need.
    """
    function = "monte_carlo_kl"
    _check(function, mean=mean, logvar=logvar, z=z)
    if mean.dim() < 1 or logvar.shape != mean.shape:
        raise ValueError(
            f"{function}: logvar must have the shape of mean {tuple(mean.shape)}; got {tuple(logvar.shape)}"
        )
    if z.shape[z.dim() - mean.dim() :] != mean.shape:
        raise ValueError(
            f"{function}: z must have shape {('...', *mean.shape)} like mean; got {tuple(z.shape)}"
        )
    m, v, z = _at_least_float32(mean), _at_least_float32(logvar), _at_least_float32(z)
    if sticking_the_landing:
        m, v = m.detach(), v.detach()
    eps = (z - m) * torch.exp(-v / 2)
    if prior is None:
        return ((z * z - eps * eps - v) / 2).sum(-1)
    log_p = prior.log_prob(z)
    if log_p.shape != z.shape[:-1]:
        raise ValueError(
            f"{function}: prior.log_prob must sum over the latents to shape {tuple(z.shape[:-1])} "
            f"(torch.distributions.Independent does); got {tuple(log_p.shape)}"
        )
    return -((eps * eps + v + LOG_2PI) / 2).sum(-1) - log_p


def _mixture_log_prob(z: Tensor, mean: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    scaled = (z.unsqueeze(-2) - mean) * torch.exp(-logvar / 2)  # [..., C, Z]
    components = -((scaled * scaled + logvar + LOG_2PI) / 2).sum(-1)
    return torch.logsumexp(components + log_weights, -1)


def _mixture_sample(
    count: int, mean: Tensor, logvar: Tensor, log_weights: Tensor, generator: torch.Generator | None
) -> Tensor:
    which = torch.multinomial(log_weights.exp(), count, replacement=True, generator=generator)
    eps = torch.randn((count, mean.shape[1]), dtype=mean.dtype, device=mean.device, generator=generator)
    return mean[which] + torch.exp(logvar[which] / 2) * eps


class GaussianMixturePrior(nn.Module):
    """p(z) = sum_c softmax(logits)_c N(z; mean_c, exp(logvar_c)), all of it learnable.

    Args:
        mean: Means of the components, [C, Z].
        logvar: Their log-variances, [C, Z].
        logits: Their log-weights, unnormalised, [C]; None gives equal weights, which are not learned.
    """

    def __init__(self, mean: Tensor, logvar: Tensor, logits: Tensor | None = None) -> None:
        super().__init__()
        _check("GaussianMixturePrior", mean=mean, logvar=logvar)
        if mean.dim() != 2 or mean.shape[0] == 0:
            raise ValueError(
                f"GaussianMixturePrior: mean must have shape (components, latents); got {tuple(mean.shape)}"
            )
        if logvar.shape != mean.shape:
            raise ValueError(
                f"GaussianMixturePrior: logvar must have the shape of mean {tuple(mean.shape)}; "
                f"got {tuple(logvar.shape)}"
            )
        if logits is not None:
            _check("GaussianMixturePrior", logits=logits)
            if logits.shape != mean.shape[:1]:
                raise ValueError(
                    f"GaussianMixturePrior: logits must have shape {tuple(mean.shape[:1])}; got {tuple(logits.shape)}"
                )
        self.mean = nn.Parameter(mean.detach().clone())
        self.logvar = nn.Parameter(logvar.detach().clone())
        self.logits = None if logits is None else nn.Parameter(logits.detach().clone())

    def log_weights(self) -> Tensor:
        logits = self.mean.new_zeros(self.mean.shape[0]) if self.logits is None else self.logits
        return torch.log_softmax(logits, -1)

    def log_prob(self, z: Tensor) -> Tensor:
        """[..., Z] -> [...]."""
        return _mixture_log_prob(z, self.mean, self.logvar, self.log_weights())

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """[count, Z]; no gradient runs through the choice of components."""
        return _mixture_sample(count, self.mean, self.logvar, self.log_weights(), generator)


class VampPrior(nn.Module):
    """p(z) = mean over learned pseudo-inputs u_c of q(z | u_c), the encoder's own posteriors.

    Args:
        pseudo_inputs: Start values, [C, *event]: rows of the training data do well.
        encoder: Gives (mean [C, Z], logvar [C, Z]) of a batch of inputs; its parameters stay the encoder's own and are
            not listed here again.
    """

    def __init__(self, pseudo_inputs: Tensor, encoder: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        _check("VampPrior", pseudo_inputs=pseudo_inputs)
        if pseudo_inputs.dim() < 2 or pseudo_inputs.shape[0] == 0:
            raise ValueError(
                f"VampPrior: pseudo_inputs must have shape (components, *event); got {tuple(pseudo_inputs.shape)}"
            )
        if not callable(encoder):
            raise TypeError(f"VampPrior: encoder must be callable; got {type(encoder).__name__}")
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self._encoder = (encoder,)  # in a tuple, or Module would register it as a child

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mean [C, Z], logvar [C, Z], log_weights [C])."""
        mean, logvar = self._encoder[0](self.pseudo_inputs)
        return mean, logvar, mean.new_full((mean.shape[0],), -math.log(mean.shape[0]))

    def log_prob(self, z: Tensor) -> Tensor:
        """[..., Z] -> [...]; one pass of the encoder over the pseudo-inputs."""
        return _mixture_log_prob(z, *self.components())

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """[count, Z]."""
        return _mixture_sample(count, *self.components(), generator)
