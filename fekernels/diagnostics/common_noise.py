"""Whether two chains got the same noise: then they agree wherever they are, and R-hat is of one chain with itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Together", "moving_together"]

CHANCE = 1e-6  # of a warning, where chains are independent
# Correlation: of minibatches that chains share, gradients must be three times as noisy as the draws.
STRONG = 0.75
LEAST = math.asin(STRONG) * 2 / math.pi  # the same of signs, for normal numbers
LOOKED_AT = 1 << 18  # draws of weights
WEIGHTS, DRAWS, PAIRS = 256, 4096, 8


class Together(NamedTuple):
    """Two chains, and the correlation of their changes."""

    first: int
    second: int
    correlation: float

    def __str__(self) -> str:
        return (
            f"chains {self.first} and {self.second} move together (correlation {self.correlation:.4f} of their "
            "changes): they got the same noise, or are losses of the same minibatches. They agree wherever they are, "
            "so R-hat and effective sample sizes say nothing. Independent runs need a seed each (seed=rank), or take "
            "fe.Chains"
        )


@torch.no_grad()
def moving_together(draws: Tensor) -> Together | None:
    """Those of [chains, draws, weights] whose changes go the same way, if any do.

    What is compared are the signs of second differences, over the last draws and some weights of all: the courses of
    slow chains look alike by chance, and those of a common descent by its trend, but neither turns the same way at the
    same draws. With nu the number of signs, by the correlations between weights and between draws (Bartlett's formula)
    those of as many independent ones, a correlation of at least s has probability

        P <= max((1 - s^2)^(nu/2) / (s nu B(1/2, nu/2)), 2^-nu)

    for independent chains, and P times the number of pairs must be below 1e-6. So some 60 draws of one weight are
    needed, and fewer of many. Negative correlations (antithetic chains) are not looked for.
    """
    chains, count, weights = draws.shape
    if chains < 2 or count < 4 or not weights:
        return None
    count = min(count, DRAWS)
    many = max(1, min(WEIGHTS, weights, LOOKED_AT // (chains * count)))
    at = torch.linspace(0, weights - 1, many, dtype=torch.float64).round().long().to(draws.device)
    values = draws[:, -count:].index_select(2, at)
    values = values.to(torch.float32 if draws.device.type == "mps" else torch.float64)
    signs = values.diff(n=2, dim=1).nan_to_num(0.0, 0.0, 0.0).sign().float()
    signs = signs[:, :, (signs != 0).any(0).any(0)]
    flat = signs.flatten(1)
    if not flat.numel():
        return None
    inner = (flat @ flat.T).cpu().double()
    size = inner.diag().clamp_min(1.0).sqrt()
    found = (inner / size[:, None] / size).triu(1)
    strongest = found.flatten().topk(min(PAIRS, chains * chains)).indices.tolist()
    pairs = chains * (chains - 1) / 2
    for i, j in (divmod(index, chains) for index in strongest):
        s = float(found[i, j])
        if s < LEAST:
            return None
        nu = (
            float(size[i] * size[j])
            / signs.shape[2]
            * _weights(signs[i], signs[j])
            / _draws(signs[i], signs[j])
        )
        if _chance(s, nu) * pairs < CHANCE:
            return Together(i, j, math.sin(math.pi / 2 * min(s, 1.0)))
    return None


def _weights(a: Tensor, b: Tensor) -> float:
    """How many independent weights vary as much: w^2 over the sum of what the correlations of both chains share."""
    draws, weights = a.shape
    shared = float(((a.T @ a) * (b.T @ b)).sum()) / draws**2
    return min(max(weights**2 / max(shared, 1e-300), 1.0), float(weights))


def _draws(a: Tensor, b: Tensor) -> float:
    """By how much the correlation of signs in time multiplies the variance of their product's mean, and half more: of
    chains that oscillate it is estimated too small now and then."""
    draws = len(a)
    spectra = [torch.fft.rfft(each, 2 * draws, dim=0).abs().square().sum(1) for each in (a.cpu(), b.cpu())]
    (one, other) = (torch.fft.irfft(each)[: max(draws // 2, 1)] for each in spectra)
    shared = float((one[1:] / one[0] * other[1:] / other[0]).sum())
    return 1.5 * max(2.0, 1 + 2 * shared)


def _chance(s: float, nu: float) -> float:
    log_beta = math.lgamma(0.5) + math.lgamma(nu / 2) - math.lgamma((nu + 1) / 2)
    tail = nu / 2 * math.log1p(-s * s) - math.log(s * nu) - log_beta if s < 1 else -math.inf
    return math.exp(max(tail, -nu * math.log(2)))
