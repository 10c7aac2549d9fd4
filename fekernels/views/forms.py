"""One encoding, one sample and one decoding of a batch, and the four forms of its free energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import NAMES, longest
from fekernels._checks import number, one_of
from fekernels.ops.free_energy.domains import validate_data
from fekernels.ops.free_energy.free_energy import energy, free_energy, gaussian_kl
from fekernels.ops.free_energy.reparameterize import reparameterize

__all__ = [
    "VIEWS",
    "Shared",
    "View",
    "inference",
    "machine_learning",
    "message_passing",
    "physics",
    "share",
]

LOG_2PI = math.log(2 * math.pi)
REDUCTIONS = ("mean", "sum")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

Value = tuple[Tensor, dict[str, Tensor]]
View = Callable[["Shared"], Value]


class Shared(NamedTuple):
    """What all views of a batch start from: one encoding, one sample, one decoding.

    ``params`` are the likelihood's parameters at the sample, the first [B, *event]; ``x`` the data; ``mean`` and
    ``logvar`` q's, [B, *latent]; ``reduction`` "mean" or "sum" over the batch.
    """

    params: tuple[Tensor, ...]
    x: Tensor
    mean: Tensor
    logvar: Tensor
    likelihood: str
    reduction: str = "mean"
    known_energy: Tensor | None = None

    def energy(self) -> Tensor:
        """-log p(x | z), the batch's mean or sum; ``known_energy`` where it has been computed before."""
        if self.known_energy is not None:
            return self.known_energy
        return energy(self.params, self.x, self.likelihood, reduction=self.reduction)

    def latents(self) -> tuple[Tensor, Tensor]:
        """mean and logvar, those of 16 bits in float32, as ``fe.free_energy`` computes with them."""
        mean, logvar = self.mean, self.logvar
        return (
            mean.float() if mean.dtype in SIXTEEN_BITS else mean,
            logvar.float() if logvar.dtype in SIXTEEN_BITS else logvar,
        )

    def reduced(self, per_sample: Tensor) -> Tensor:
        """[B, ...] -> scalar: everything of a sample summed, the batch's mean or sum."""
        total = per_sample.sum()
        return total / len(self.x) if self.reduction == "mean" else total


def share(
    model: Any, x: Tensor, *, seed: int | None = None, step: int = 0, reduction: str = "mean"
) -> Shared:
    """Encode, draw one z, decode.

    Args:
        model: see ``fekernels.views``.
        x: [B, *event].
        seed, step: of z's noise. A seed of None is the model's own noise where it has one (``VAE.noise``), else 0.
        reduction: "mean" or "sum" over the batch.

    Raises:
        TypeError: a model without encode and decode, or whose encode gives no pair of tensors; x is no tensor.
        ValueError: an unknown likelihood or reduction; what encode or decode gives has a wrong shape; on a CPU, data
            outside of the likelihood's domain.
    """
    function = "views"
    for name in ("encode", "decode"):
        if not callable(getattr(model, name, None)):
            raise TypeError(f"{function}: model must have encode and decode; got {type(model).__name__}")
    likelihood = one_of(function, "model.likelihood", getattr(model, "likelihood", "mse"), NAMES)
    one_of(function, "reduction", reduction, REDUCTIONS)
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: x must be a Tensor; got {type(x).__name__}")
    validated = x.is_cpu and not torch.compiler.is_compiling()
    classes = getattr(model, "classes", None)
    at_once = isinstance(classes, int) or not longest(likelihood).classes
    if validated and at_once:
        validate_data(function, likelihood, x, classes if isinstance(classes, int) else 1, name="x")
    mean, logvar = _encoded(function, model, x)
    noise = {"seed": 0 if seed is None else seed, "step": step}
    if seed is None and callable(own := getattr(model, "noise", None)):
        noise = own(x)
    params = model.decode(reparameterize(mean, logvar, **noise))
    params = (params,) if isinstance(params, Tensor) else tuple(params)
    _check_decoded(function, params, x, likelihood)
    if validated and not at_once:  # how many classes there are, the parameters alone know
        validate_data(function, likelihood, x, params[0].shape[-1], name="x")
    if x.is_floating_point() and x.dtype != params[0].dtype:
        x = x.to(params[0].dtype)
    return Shared(params, x, mean, logvar, likelihood, reduction)


def _encoded(function: str, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    found = model.encode(x)
    expected = f"{function}: model.encode must give (mean, logvar), tensors of one shape, a row for each of x"
    if isinstance(found, Tensor) or not isinstance(found, Sequence):
        raise TypeError(f"{expected}; got {_named(found)}")
    if len(found) != 2 or not all(isinstance(each, Tensor) for each in found):
        raise TypeError(f"{expected}; got ({', '.join(map(_named, found))})")
    mean, logvar = found
    if mean.shape != logvar.shape or not mean.dim() or len(mean) != len(x):
        raise ValueError(f"{expected}, here {len(x)}; got ({_named(mean)}, {_named(logvar)})")
    return mean, logvar


def _check_decoded(function: str, params: tuple[Any, ...], x: Tensor, likelihood: str) -> None:
    """The first parameter has the shape of x, and classes behind it where the likelihood has them."""
    expected = f"{function}: model.decode must give the parameters of {likelihood!r}"
    if not params or not all(isinstance(param, Tensor) for param in params):
        raise TypeError(f"{expected}, tensors; got ({', '.join(map(_named, params))})")
    classes = longest(likelihood).classes
    came = params[0].shape[:-1] if classes else params[0].shape
    if came != x.shape:
        behind = ", classes" if classes else ""
        wanted = f"({', '.join(map(str, x.shape))}{behind})"
        raise ValueError(f"{expected}, the first of shape {wanted} like x; got {_named(params[0])}")


def _named(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _physics(shared: Shared, temperature: float = 1.0) -> Value:
    mean, logvar = shared.latents()
    likelihood = shared.energy()
    prior = shared.reduced((LOG_2PI + mean * mean + logvar.exp()) / 2)
    entropy = shared.reduced((1 + LOG_2PI + logvar) / 2)
    total = likelihood + prior
    parts = {
        "energy": total,
        "entropy": entropy,
        "energy_of_likelihood": likelihood,
        "energy_of_prior": prior,
    }
    return total - temperature * entropy, parts


def _machine_learning(shared: Shared) -> Value:
    terms = free_energy(
        shared.params, shared.x, shared.mean, shared.logvar, likelihood=shared.likelihood,
        reduction=shared.reduction,
    )  # fmt: skip
    return terms.free_energy, {"reconstruction": terms.energy, "regulariser": terms.kl}


def _inference(shared: Shared) -> Value:
    mean, logvar = shared.latents()
    deviation = (logvar / 2).exp()
    log_p, log_q = torch.zeros_like(mean), torch.zeros_like(mean)
    for eps in (-1.0, 1.0):  # each of weight 1/2
        z = mean + deviation * eps
        log_p = log_p - (LOG_2PI + z * z) / 4
        log_q = log_q - (LOG_2PI + logvar + eps * eps) / 4
    likelihood = shared.energy()
    negative_log_joint = -(-likelihood + shared.reduced(log_p))
    log_posterior = shared.reduced(log_q)
    parts = {
        "negative_log_joint": negative_log_joint,
        "log_q": log_posterior,
        "negative_log_likelihood": likelihood,
    }
    return negative_log_joint + log_posterior, parts


def _message_passing(shared: Shared) -> Value:
    of_latents = gaussian_kl(shared.mean, shared.logvar)  # [B]
    forward, backward = shared.energy(), shared.reduced(of_latents)
    return forward + backward, {"forward_error": forward, "backward_error": backward}


VIEWS: dict[str, View] = {
    "physics": _physics,
    "machine_learning": _machine_learning,
    "inference": _inference,
    "message_passing": _message_passing,
}


def physics(
    model: Any,
    x: Tensor,
    *,
    seed: int | None = None,
    step: int = 0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Value:
    """F = E - T H: energy, the prior's included, less temperature times entropy of q. Arguments as ``share``.

    Args:
        temperature: T >= 0. The other views are those of T = 1.

    Returns:
        (F, parts): scalars "energy" and "entropy", and of the energy "energy_of_likelihood" and "energy_of_prior".
    """
    temperature = number("views.physics", "temperature", temperature)
    return _physics(share(model, x, seed=seed, step=step, reduction=reduction), temperature)


def machine_learning(
    model: Any, x: Tensor, *, seed: int | None = None, step: int = 0, reduction: str = "mean"
) -> Value:
    """Loss = reconstruction + KL to the prior, by ``fe.free_energy``. Arguments as ``share``.

    Returns:
        (loss, parts): scalars "reconstruction" and "regulariser".
    """
    return _machine_learning(share(model, x, seed=seed, step=step, reduction=reduction))


def inference(
    model: Any, x: Tensor, *, seed: int | None = None, step: int = 0, reduction: str = "mean"
) -> Value:
    """-log p(x, z) + log q(z | x), what depends on z alone averaged over q. Arguments as ``share``.

    Returns:
        (value, parts): scalars "negative_log_joint" and "log_q", and of the joint "negative_log_likelihood".
    """
    return _inference(share(model, x, seed=seed, step=step, reduction=reduction))


def message_passing(
    model: Any, x: Tensor, *, seed: int | None = None, step: int = 0, reduction: str = "mean"
) -> Value:
    """The error of the prediction, sent forward, plus that of the latents, sent back. Arguments as ``share``.

    Returns:
        (sum of the errors, parts): scalars "forward_error" and "backward_error".
    """
    return _message_passing(share(model, x, seed=seed, step=step, reduction=reduction))
