"""The relevance of a context to a query as a negative free energy, with the two parts of its uncertainty."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fekernels._checks import boolean, floating, integer, number, same_device
from fekernels.losses import gaussian_kl, importance_weighted_bound, monte_carlo_kl, reparameterize

__all__ = [
    "Calibration",
    "TENSORS",
    "LinearLogit",
    "Relevance",
    "combine",
    "free_energy_of",
    "gaussian_nodes",
    "relevance_of",
]

# Gauss-Hermite nodes of the logit's Gaussian. The error of a sigmoid's mean grows with the logit's standard deviation:
# 1e-7 at 2, 2e-5 at 3, 2e-3 at 6.
NODES = 32

TENSORS = ("score", "probability", "epistemic", "aleatoric", "kl", "logit")

Logit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Platt's map of logits, l -> scale * l + shift, under which probabilities are those of held-out pairs.

    ``sharpness`` is a further scale, for the choice of one context among several.
    """

    scale: float = 1.0
    shift: float = 0.0
    sharpness: float = 1.0


@dataclass(frozen=True)
class Relevance:
    """What a model holds of the relevance of contexts to queries; every tensor of one shape, [B] or [Q, C].

    Attributes:
        score: -F, in nats: E_q[log sigmoid(l)] - T KL, or its importance-weighted bound. Rank by it.
        probability: E_q[sigmoid(l)], calibrated where the model is.
        epistemic: Var_q[sigmoid(l)], what is not known of the intent z behind the query: zero if it were.
        aleatoric: E_q[sigmoid(l) (1 - sigmoid(l))], what a known intent leaves open.
        kl: KL(q(z | query, context) || p(z)) in nats, before the temperature.
        logit: E_q[l], calibrated like the probability. It is F("irrelevant") - F("relevant"): the KL of both is one.
        sharpness: of ``choice``, from the calibration.
    """

    score: Tensor
    probability: Tensor
    epistemic: Tensor
    aleatoric: Tensor
    kl: Tensor
    logit: Tensor
    sharpness: float = 1.0

    @property
    def total_variance(self) -> Tensor:
        """Of the answer "relevant": probability (1 - probability), the sum of the epistemic and the aleatoric."""
        return self.probability * (1 - self.probability)

    @property
    def choice(self) -> Tensor:
        """Probability of each context to be the relevant one, where exactly one of C is: [Q, C], rows sum to 1.

        A softmax of ``logit`` times ``sharpness``: at the log-odds l, that c is relevant and no other has probability
        sigmoid(l_c) prod_j sigmoid(-l_j) over the others, in proportion to exp(l_c). How sure a model is of what it
        ranks first is the largest of a row; each pair's own variance is small too where it is sure that *nothing*
        is relevant.
        """
        if self.logit.dim() != 2:
            raise ValueError(
                "Relevance.choice: tensors must have shape (queries, contexts), as an index gives them; "
                f"got {tuple(self.logit.shape)}"
            )
        return torch.softmax(self.sharpness * self.logit, 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Relevance:
        """``function`` of every tensor: ``relevance.map(lambda t: t[0].cpu())``."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in TENSORS}
        return replace(self, **changed)


def relevance_of(
    logit: Logit,
    mean: Tensor,
    logvar: Tensor,
    *,
    seed: int,
    samples: int = 16,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    shared_noise: bool = False,
    temperature: float = 1.0,
    importance_weighted: bool = False,
    calibration: Calibration | None = None,
) -> Relevance:
    """The relevance of B pairs whose intent is z ~ q = N(mean, e^logvar), with the prior N(0, I); differentiable.

    With the energy E(z) = -log sigmoid(l(z)) of the answer "relevant", the score is the negative free energy
    -F = E_q[-E] - T KL(q || p), below T log E_p[exp(-E/T)] for every q: at T = 1 the log evidence of that answer. The
    posterior that attains it is p exp(-E/T): wide at a high T, which explores what else might be meant, and at T -> 0
    the one intent that explains the pair best.

    Args:
        logit: l, from z [K, B, Z] to [K, B].
        mean, logvar: [B, Z].
        seed, step, stream, offset: of the noise, as in ``fe.reparameterize``.
        samples: K. 16 give the probability to .1 at most, and less where q is narrow.
        shared_noise: the same noise for all pairs, so that the result of a pair does not depend on which others there
            are, and differences between pairs are not noise. For scoring; training wants noise of each pair's own.
        temperature: T, >= 0; > 0 for the importance-weighted bound.
        importance_weighted: the score is T log mean_k exp(-E(z_k)/T + log p(z_k) - log q(z_k)) (Burda et al. 2016),
            which tightens towards T log E_p[exp(-E/T)] as K grows.
        calibration: of probability and variances; the score is the model's own with or without it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_gaussian("relevance_of", mean, logvar)
    temperature, importance_weighted = check_bound("relevance_of", temperature, importance_weighted)
    z = draw(mean, logvar, samples, seed, step, stream, offset, shared_noise)
    logits = checked_logits("relevance_of", logit(z), z)
    kl = gaussian_kl(mean, logvar)
    ratio = monte_carlo_kl(mean, logvar, z) if importance_weighted else None
    weights = logits.new_full((len(logits),), 1 / len(logits))
    return combine(logits, weights, kl, ratio, temperature, calibration)


def free_energy_of(
    logits: Tensor, relevant: Tensor, kl: Tensor, ratio: Tensor | None, temperature: float
) -> Tensor:
    """F of the answers [B] (True: relevant) at the logits [K, B] of samples of q: [B], in nats.

    Args:
        ratio: log q - log p of the samples, [K, B], for the importance-weighted bound; None for the free energy itself.
    """
    log_p = logsigmoid(torch.where(relevant, logits, -logits))
    return -_bound(log_p, logits.new_full((len(logits),), 1 / len(logits)), kl, ratio, temperature)


def _bound(log_p: Tensor, weights: Tensor, kl: Tensor, ratio: Tensor | None, temperature: float) -> Tensor:
    if ratio is None:
        return torch.tensordot(weights, log_p, 1) - temperature * kl
    return temperature * importance_weighted_bound(log_p / temperature - ratio)


def combine(
    logits: Tensor,
    weights: Tensor,
    kl: Tensor,
    ratio: Tensor | None,
    temperature: float,
    calibration: Calibration | None,
) -> Relevance:
    """Means over K samples, or nodes of a quadrature: ``logits`` [K, B], ``weights`` [K] that sum to 1, ``kl`` [B]."""
    score = _bound(logsigmoid(logits), weights, kl, ratio, temperature)
    sharpness = 1.0 if calibration is None else calibration.sharpness
    if calibration is not None:
        logits = calibration.scale * logits + calibration.shift
    p = torch.sigmoid(logits)
    probability = torch.tensordot(weights, p, 1)
    # The variance over the weighted samples, not an estimate of q's: so the parts add up to p (1 - p) for any K.
    epistemic = torch.tensordot(weights, (p - probability).square(), 1)
    aleatoric = torch.tensordot(weights, p * torch.sigmoid(-logits), 1)
    logit = torch.tensordot(weights, logits, 1)
    return Relevance(score, probability, epistemic, aleatoric, kl, logit, sharpness)


@functools.cache
def _rule() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes.tolist(), (weights / weights.sum()).tolist()


def gaussian_nodes(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [K, B] and weights [K] with which sums are expectations under N(mean, variance), both [B]."""
    nodes, weights = (mean.new_tensor(column) for column in _rule())
    shape = (-1, *(1,) * mean.dim())
    # A context of no words has no variance, where the root has no derivative.
    deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    return mean + deviation * nodes.view(shape), weights


class LinearLogit(nn.Module):
    """l(z, context) = <z, A c> + bias: how far the intent points to where the context lies.

    A is the identity where widths are equal and a matrix to be learned otherwise, times a learned scale. Under a
    Gaussian z this logit is Gaussian itself, so ``RelevanceModel`` scores with it by quadrature, without noise
    (``moments``).

    Args:
        latent_dim: of z.
        context_dim: of a context's vector.
        scale: of the inner product when training starts.
        bias: of the logit when training starts; the log-odds that nothing known of a pair leaves it.
    """

    def __init__(self, latent_dim: int, context_dim: int, *, scale: float = 1.5, bias: float = -4.0) -> None:
        super().__init__()
        name = "LinearLogit"
        latent_dim = integer(name, "latent_dim", latent_dim, 1)
        context_dim = integer(name, "context_dim", context_dim, 1)
        self.log_scale = nn.Parameter(torch.tensor(number(name, "scale", scale, above=0.0)).log())
        self.bias = nn.Parameter(torch.tensor(number(name, "bias", bias, least=-float("inf"))))
        self.map: nn.Module = (
            nn.Identity() if latent_dim == context_dim else nn.Linear(context_dim, latent_dim, bias=False)
        )

    __call__: Callable[..., Tensor]  # torch says Any of every module's

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """z [K, B, Z], contexts' vectors [B, H] -> [K, B]."""
        return self.log_scale.exp() * (z * self.map(context)).sum(-1) + self.bias

    def moments(self, mean: Tensor, variance: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of l under z ~ N(mean, variance): [..., Z], [..., Z] and vectors [..., H] -> [...]."""
        direction, scale = self.map(context), self.log_scale.exp()
        return (
            scale * (mean * direction).sum(-1) + self.bias,
            scale.square() * (variance * direction.square()).sum(-1),
        )


def draw(
    mean: Tensor,
    logvar: Tensor,
    samples: int,
    seed: int,
    step: int,
    stream: int,
    offset: int,
    shared_noise: bool,
) -> Tensor:
    """z [K, B, Z]."""
    samples = integer("relevance_of", "samples", samples, 1)
    key: dict[str, int] = {"seed": seed, "step": step, "stream": stream, "offset": offset, "samples": samples}
    if not boolean("relevance_of", "shared_noise", shared_noise):
        return reparameterize(mean, logvar, **key)
    zero = torch.zeros(1, mean.shape[1], device=mean.device)  # noise is float32 in every dtype
    return mean + torch.exp(0.5 * logvar) * reparameterize(zero, zero, **key).to(mean.dtype)


def check_gaussian(function: str, mean: Any, logvar: Any) -> None:
    floating(function, "mean", mean)
    floating(function, "logvar", logvar)
    same_device(function, "logvar", logvar, mean.device)
    if mean.dim() != 2:
        raise ValueError(f"{function}: mean must have shape (pairs, latents); got {tuple(mean.shape)}")
    if logvar.shape != mean.shape:
        raise ValueError(
            f"{function}: logvar must have shape {tuple(mean.shape)} like mean; got {tuple(logvar.shape)}"
        )


def check_bound(function: str, temperature: Any, importance_weighted: Any) -> tuple[float, bool]:
    weighted = boolean(function, "importance_weighted", importance_weighted)
    temperature = number(function, "temperature", temperature)
    if weighted and not temperature:
        raise ValueError(f"{function}: temperature must be > 0 for the importance-weighted bound; got 0")
    return temperature, weighted


def checked_logits(function: str, logits: Any, z: Tensor) -> Tensor:
    """Logits of the shape of z without its latents: [K, B, 1], say, would broadcast against the KL to [K, B, B]."""
    floating(function, "logit(z)", logits)
    if logits.shape != z.shape[:-1]:
        raise ValueError(
            f"{function}: logit(z) must have shape {tuple(z.shape[:-1])} for z of {tuple(z.shape)}; "
            f"got {tuple(logits.shape)}"
        )
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
