"""Bounds of the evidence from several samples per data point: IWAE, its doubly reparameterised gradient, Renyi's.

Sources: Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519); Tucker, Lawson, Gu & Maddison 2019 (arXiv:1810.04152);
Li & Turner 2016 (arXiv:1602.02311).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from fekernels._checks import integer, number
from fekernels._runtime.ranks import group_of
from fekernels.losses._checks import floating_tensor

__all__ = ["importance_weighted_bound"]

ESTIMATORS = ("iwae", "dreg", "renyi")
HOOKED = "_fekernels_dreg"


def importance_weighted_bound(
    log_w: Tensor,
    dim: int = 0,
    estimator: str = "iwae",
    z: Tensor | None = None,
    alpha: float | None = None,
    process_group: Any = None,
) -> Tensor:
    """Bound of log p(x) from K importance weights per data point, reduced over ``dim``: a lower one but for alpha < 0.

    ``log_w[k] = log p(x, z_k) - log q(z_k | x)`` for z_k ~ q. Train on the negative mean of the result.

    * ``"iwae"``: log mean_k w_k. The gradient of each log w_k is weighted by softmax(log w)_k.
    * ``"dreg"``: the same value. The gradient of the encoder, which comes through ``z``, is weighted by the squares of
      softmax(log w): unbiased for the IWAE bound, with a signal-to-noise ratio that grows with K instead of falling.
      The decoder's gradient is IWAE's. For this log_w must depend on the encoder through ``z`` alone: evaluate
      log q with *detached* encoder parameters, and pass the very tensor ``z`` that log_w was computed from, ::

          z = mean + (logvar / 2).exp() * eps                               # [K, B, Z]
          log_q = normal_log_prob(z, mean.detach(), logvar.detach())        # [K, B]
          log_w = log_p(x, z) - log_q
          loss = -importance_weighted_bound(log_w, estimator="dreg", z=z).mean()

      A hook on ``z`` scales *everything* that flows back through it, so z must serve this bound only, once.
    * ``"renyi"``: log mean_k w_k^(1 - alpha), divided by 1 - alpha. alpha = 0 is IWAE, alpha = 1 its limit, the ELBO
      mean_k log w_k, alpha = -inf the largest weight (VR-max). For alpha in [0, 1] its expectation is a lower bound of
      log p(x), the tighter the more samples. For alpha < 0 it is **no lower bound**: it rises with K, from the ELBO at
      K = 1 to an upper bound of log p(x), and where between the two it is nobody knows. For alpha > 1 it lies below the
      ELBO, and powers of weights with a negative exponent have no finite variance in general, so that few samples
      decide it. A warning says so (Li & Turner 2016, theorems 1 and 2).

    Args:
        log_w: Floating, K weights along ``dim``.
        dim: The dimension of the samples.
        estimator: "iwae", "dreg" or "renyi".
        z: For "dreg": the reparameterised samples, of log_w's shape with any further (latent) dimensions behind it.
        alpha: For "renyi": a number, or an infinity.
        process_group: A ``ProcessGroup`` or a DeviceMesh of one dimension over whose ranks the samples of the same data
            points are split, each with as many as it has, none even; None is no group. The bound is then that of all
            the samples, on every rank, by two all-reduces of its shape. Every rank must call. Gradients are this rank's
            part times the number of ranks, for DDP or FSDP to average. ``fe.distributed.share`` splits K: sample k
            takes its noise from stream k on whatever rank.

    Returns:
        The bound, of log_w's shape without ``dim``; float32 for bfloat16 and float16.

    Raises:
        TypeError: an argument of a wrong type or dtype. ValueError: a wrong value or shape.

    Warns:
        UserWarning: alpha < 0, no lower bound; alpha > 1, no finite variance in general.
    """
    function = "importance_weighted_bound"
    floating_tensor(function, "log_w", log_w)
    dim = integer(function, "dim", dim)
    if not -log_w.dim() <= dim < log_w.dim():
        raise ValueError(f"{function}: dim must be a dimension of log_w {tuple(log_w.shape)}; got {dim}")
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        raise ValueError(
            f"{function}: estimator must be one of {', '.join(map(repr, ESTIMATORS))}; got {estimator!r}"
        )
    group = group_of(function, process_group)
    if group is None and log_w.shape[dim] == 0:
        raise ValueError(f"{function}: log_w must hold at least one sample along dim {dim}; got none")
    if (alpha is not None) != (estimator == "renyi"):
        raise ValueError(f"{function}: alpha belongs to estimator='renyi'; got alpha={alpha}, {estimator!r}")
    if log_w.dtype in (torch.bfloat16, torch.float16):
        log_w = log_w.float()

    order = None if alpha is None else _order(function, alpha)
    if estimator == "dreg":
        _check_samples(function, log_w, z)
    if group is not None:
        from fekernels.losses.importance_bounds_over_ranks import bound_over_ranks

        bound, weights = bound_over_ranks(function, log_w, dim, order, group)
    elif order is not None:
        return _renyi(log_w, dim, order)
    else:
        bound, weights = torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim]), None
    if estimator == "dreg":
        assert z is not None
        _scale_gradient(z, torch.softmax(log_w.detach(), dim) if weights is None else weights)
    return bound


def _order(function: str, alpha: float) -> float:
    alpha = number(function, "alpha", alpha, least=-math.inf, infinite=True)
    why = ""
    if alpha < 0:
        why = "is no lower bound of log p(x): it tends to an upper bound as the samples grow in number"
    elif alpha > 1:
        why = "lies below the ELBO, by weights that have no finite variance in general"
    if why:
        message = f"{function}: estimator 'renyi' with alpha={alpha:g} {why}; take alpha in [0, 1]"
        warnings.warn(message, stacklevel=3)
    return alpha


def _check_samples(function: str, log_w: Tensor, z: Tensor | None) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{function}: estimator='dreg' needs z, the samples; got {type(z).__name__}")
    floating_tensor(function, "z", z)
    if z.shape[: log_w.dim()] != log_w.shape:
        raise ValueError(f"{function}: z must have shape {(*log_w.shape, '...')}; got {tuple(z.shape)}")
    if torch.is_grad_enabled() and z.requires_grad and hasattr(z, HOOKED):
        raise ValueError(f"{function}: z already carries the hook of an earlier 'dreg' bound; draw it again")


def _scale_gradient(z: Tensor, weights: Tensor) -> None:
    """Multiply what flows back into z by softmax(log w), so that with IWAE's own factor the weight is squared."""
    if not (torch.is_grad_enabled() and z.requires_grad):
        return
    setattr(z, HOOKED, True)
    weights = weights.view(*weights.shape, *(1,) * (z.dim() - weights.dim()))
    z.register_hook(lambda gradient: gradient * weights.to(gradient.dtype))


def _renyi(log_w: Tensor, dim: int, alpha: float) -> Tensor:
    """log mean exp(t log w) / t for t = 1 - alpha, to the last digits also where t is tiny."""
    t = 1 - alpha
    if t == 0:
        return log_w.mean(dim)
    if math.isinf(t):
        return log_w.amax(dim) if t > 0 else log_w.amin(dim)
    # Less its greatest value the exponent never overflows; of small exponents expm1 keeps what division by t needs.
    top = (log_w.amax(dim, keepdim=True) if t > 0 else log_w.amin(dim, keepdim=True)).detach()
    top = torch.where(top.isfinite(), top, 0.0)
    exponent = t * (log_w - top)
    less_one = torch.expm1(exponent).mean(dim)
    near = less_one > -0.5
    log_mean = torch.where(
        near,
        torch.log1p(torch.where(near, less_one, 0.0)),
        torch.logsumexp(exponent, dim) - math.log(log_w.shape[dim]),
    )
    return log_mean / t + top.squeeze(dim)
