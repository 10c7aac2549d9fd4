"""z = mean + exp(logvar/2) eps in plain PyTorch (Kingma & Welling 2014), eps from Philox, purpose 3.

Sample k takes stream + k, element (b, j) the normal of index (offset + b) Z + j: a batch split changes nothing. Bit for
bit what the compiled kernels give, but float64 operands, which no kernel takes, are computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._catalogue.random import LATENT_SAMPLE
from fekernels.reference.functions import exp
from fekernels.reference.random import MASK, fma, philox_normal

__all__ = ["reparameterize", "reparameterize_backward"]


def noise(like: Tensor, seed: int, stream: int, step: int, offset: int) -> Tensor:
    """The float32 normals of one sample, [B, Z] like ``like``."""
    eps = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    philox_normal(eps, seed, stream & MASK, step, offset * like.shape[1], LATENT_SAMPLE)
    return eps


def standard_deviation(logvar: Tensor) -> Tensor:
    return torch.exp(0.5 * logvar) if logvar.dtype == torch.float64 else exp(0.5 * logvar.float())


def reparameterize(
    mean: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int, samples: int
) -> Tensor:
    """z [samples, B, Z] in the type of ``mean``; mean and logvar [B, Z]."""
    z = torch.empty((samples, *mean.shape), dtype=mean.dtype, device=mean.device)
    sd = standard_deviation(logvar.double() if mean.dtype == torch.float64 else logvar)
    for k in range(samples):
        eps = noise(mean, seed, stream + k, step, offset)
        z[k] = mean + sd * eps if mean.dtype == torch.float64 else fma(sd.float(), eps, mean.float())
    return z


def reparameterize_backward(
    grad: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int
) -> list[Tensor]:
    """[d_mean, d_logvar] [B, Z] from grad [samples, B, Z], summed over the samples in their order."""
    double = torch.float64 in (grad.dtype, logvar.dtype)
    g = grad.double() if double else grad.float()
    d_mean, weighted = (torch.zeros(logvar.shape, dtype=g.dtype, device=g.device) for _ in range(2))
    for k in range(g.shape[0]):
        eps = noise(logvar, seed, stream + k, step, offset)
        d_mean = g[k] if k == 0 else d_mean + g[k]
        weighted = weighted + g[k] * eps if double else fma(g[k], eps, weighted)
    d_logvar = 0.5 * standard_deviation(logvar).to(g.dtype) * weighted
    return [d_mean.to(grad.dtype), d_logvar.to(logvar.dtype)]
