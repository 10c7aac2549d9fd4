"""Four ways to write the free energy of a latent-variable model, which are one number with one gradient.

With z = mean + exp(logvar / 2) eps, one eps for all, and the energy e = -log p(x | z) of the likelihood:

* ``physics``: F = E - T H: the energy E = e + E_q[-log p(z)], with the prior's, less temperature times q's entropy H;
* ``machine_learning``: reconstruction e plus the regulariser KL(q || p);
* ``inference``: the negative log joint, -log p(x, z), plus log q(z | x);
* ``message_passing``: the error that the prediction sends forward to the data, -log p(x | z), plus the error that each
  data point's latents send back to their prior, KL(q || p).

The decoder sees one sample. What depends on z alone is the expectation under q, not that sample: log p(z) and log q(z)
are quadratic in eps, so that averaging over eps = -1 and eps = +1 (Gauss and Hermite's rule of two points) is exact.
With the sample itself in all terms, the inference view would be unbiased, but equal only on average.

A model is anything with ``encode(x) -> (mean, logvar)`` and ``decode(z) -> parameters`` of its ``likelihood``, an
attribute; without one it is "mse", whose energy is the squared error.

Source: Kingma & Welling 2014, arXiv:1312.6114, equations 2 and 3; Neal & Hinton 1998 for the physics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    "Equivalence",
    "Shared",
    "inference",
    "machine_learning",
    "message_passing",
    "physics",
    "share",
    "verify_equivalence",
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
        model: see the module.
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


# Of the largest absolute part or gradient. float64 sums of thousands of terms agree to 1e-14 or so.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class _Gradient(NamedTuple):
    """``along`` times the energy's gradient, plus ``direct``: a gradient of the likelihood's parameters is large."""

    along: float
    direct: Tensor | None


@dataclass
class _Look:
    """What a view says: its value, its parts, and its gradients in what encoder and decoder gave."""

    value: float
    parts: dict[str, float]
    of_params: list[_Gradient]
    of_latents: dict[str, Tensor]

    @property
    def scale(self) -> float:
        return max([abs(self.value), *map(abs, self.parts.values())])


class Equivalence(dict[str, float]):
    """The value of each view by its name, and what was found besides.

    Attributes:
        parts (dict[str, dict[str, float]]): of each view, its parts by name.
        differences (dict[str, float]): of each view, how far its value is from the first view's, relative to the
            largest part.
        gradient_differences (dict[str, dict[str, float]]): of each view, by what the gradient is of (``mean``,
            ``logvar``, ``params[0]``, ...), the largest difference from the first view's gradient, relative to its
            largest element.
        tolerance (float): what all of them must not exceed.
    """

    def __init__(
        self,
        values: dict[str, float],
        parts: dict[str, dict[str, float]],
        differences: dict[str, float],
        gradient_differences: dict[str, dict[str, float]],
        tolerance: float,
    ) -> None:
        super().__init__(values)
        self.parts, self.differences = parts, differences
        self.gradient_differences, self.tolerance = gradient_differences, tolerance

    @property
    def equal(self) -> bool:
        """Whether every difference is within the tolerance; one that is NaN is not."""
        gradients = (each for of in self.gradient_differences.values() for each in of.values())
        return all(each <= self.tolerance for each in (*self.differences.values(), *gradients))

    def __str__(self) -> str:
        width = max(map(len, self))
        of = list(next(iter(self.gradient_differences.values())))
        head = f"{'view':{width}}  {'value':>18}  {'difference':>10}  " + "  ".join(
            f"{'d ' + n:>11}" for n in of
        )
        lines = [f"{head}  parts"]
        for name, value in self.items():
            gradients = "  ".join(f"{each:11.1e}" for each in self.gradient_differences[name].values())
            parts = ", ".join(f"{part} {number:.6g}" for part, number in self.parts[name].items())
            lines.append(
                f"{name:{width}}  {value:18.12g}  {self.differences[name]:10.1e}  {gradients}  {parts}"
            )
        return "\n".join(lines)


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN where there is one. A norm of order infinity takes twenty times as long."""
    return float(torch.maximum(tensor.amax(), -tensor.amin())) if tensor.numel() else 0.0


def _look(view: View, shared: Shared) -> _Look:
    """``shared`` has a ``known_energy``, whose own gradient its caller knows."""
    assert shared.known_energy is not None
    tensors = (shared.known_energy, shared.mean, shared.logvar, *shared.params)
    known, mean, logvar, *params = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        value, parts = view(
            shared._replace(known_energy=known, mean=mean, logvar=logvar, params=tuple(params))
        )
        along, of_mean, of_logvar, *direct = torch.autograd.grad(value, leaves, allow_unused=True)
    weight = 0.0 if along is None else float(along)
    of_latents = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for name, leaf, gradient in (("mean", mean, of_mean), ("logvar", logvar, of_logvar))
    }
    numbers = {name: float(part.detach()) for name, part in parts.items()}
    return _Look(float(value.detach()), numbers, [_Gradient(weight, each) for each in direct], of_latents)


def _compare(
    look: _Look, first: _Look, of_energy: Sequence[Tensor], sizes: Sequence[float], unit: float
) -> dict[str, float]:
    """By what they are in, the largest difference of two views' gradients, relative to the largest element.

    Args:
        of_energy, sizes: the energy's gradients in the likelihood's parameters, and their largest elements.
        unit: what a gradient in mean or logvar is a difference of, at least; near the prior it is all rounding.
    """
    found = {}
    pairs = zip(look.of_params, first.of_params, of_energy, sizes, strict=True)
    for k, (one, other, gradient, largest) in enumerate(pairs):
        if one.direct is None and other.direct is None:
            off = abs(one.along - other.along) * largest
        else:
            off = _furthest(one, other, gradient)
        found[f"params[{k}]"] = off / (largest or 1.0)
    for name, gradient in look.of_latents.items():
        off = _largest(gradient - first.of_latents[name])
        found[name] = off / max(unit, _largest(first.of_latents[name]))
    return found


def _furthest(one: _Gradient, other: _Gradient, of_energy: Tensor) -> float:
    """The largest difference of two gradients, a few rows at a time: whole temporaries took longer than a view."""
    rows = max(1, (1 << 17) // max(1, of_energy[:1].numel()))
    found = [0.0]
    for start in range(0, len(of_energy), rows):
        part = slice(start, start + rows)
        off = of_energy[part] * (one.along - other.along)
        for gradient, sign in ((one.direct, 1), (other.direct, -1)):
            if gradient is not None:
                off.add_(gradient[part], alpha=sign)
        found.append(_largest(off))
    return math.nan if any(map(math.isnan, found)) else max(found)


def _not_finite(shared: Shared, looks: dict[str, _Look], sizes: Sequence[float]) -> str:
    """Which values, or gradients that all views agree on, are NaN or infinite, and in what they come from; or ""."""
    wrong = [f"the value of {name}" for name, look in looks.items() if not math.isfinite(look.value)]
    wrong += [f"the gradient in params[{k}]" for k, size in enumerate(sizes) if not math.isfinite(size)]
    for name in ("mean", "logvar"):
        if not any(math.isfinite(_largest(look.of_latents[name])) for look in looks.values()):
            wrong.append(f"the gradient in {name}")
    if not wrong:
        return ""
    given = {"x": shared.x, "mean": shared.mean, "logvar": shared.logvar}
    given |= {f"params[{k}]": param for k, param in enumerate(shared.params)}
    behind = [name for name, tensor in given.items() if not bool(tensor.isfinite().all())]
    why = f"NaN or infinity is in {', '.join(behind)}" if behind else "x, mean, logvar and params are finite"
    return f"not finite, so that nothing can be compared: {', '.join(wrong)}; {why}"


@torch.no_grad()
def verify_equivalence(
    model: Any, x: Tensor, *, seed: int | None = 0, step: int = 0, reduction: str = "mean"
) -> Equivalence:
    """All views of one batch, from one encoding, one sample and one decoding: their values, parts and differences.

    Gradients are compared where the views part: in the likelihood's parameters, which the decoder gave, and in mean and
    logvar. Everything before, the networks' weights included, all views share, and the chain rule takes equal gradients
    there to equal gradients of every weight.

    Args: as ``share``.

    Returns:
        ``Equivalence``, a dict of the values by view; printed, a table.

    Raises:
        AssertionError: views differ by more than 1e-12 in float64, 1e-5 in float32, 2e-3 in float16, 1e-2 in bfloat16
            (gradients are rounded to the dtype of what they are in); or values, or a gradient in all views, are not
            finite; with the table.
        TypeError, ValueError: as ``share``; x without a data point.
    """
    if isinstance(x, Tensor) and (not x.dim() or not len(x)):
        raise ValueError(f"verify_equivalence: x must hold a data point; got shape {tuple(x.shape)}")
    shared = share(model, x, seed=seed, step=step, reduction=reduction)
    with torch.enable_grad():
        params = tuple(param.detach().requires_grad_() for param in shared.params)
        known = shared._replace(params=params).energy()
    of_energy = torch.autograd.grad(known, params)
    looks = {name: _look(view, shared._replace(known_energy=known)) for name, view in VIEWS.items()}
    first = next(iter(looks.values()))
    sizes = [_largest(gradient) for gradient in of_energy]
    unit = 0.5 / max(1, len(x)) if reduction == "mean" else 0.5
    result = Equivalence(
        {name: look.value for name, look in looks.items()},
        {name: look.parts for name, look in looks.items()},
        {
            name: abs(look.value - first.value) / (max(first.scale, look.scale) or 1.0)
            for name, look in looks.items()
        },
        {name: _compare(look, first, of_energy, sizes, unit) for name, look in looks.items()},
        TOLERANCES[torch.result_type(shared.params[0], shared.mean)],
    )
    if wrong := _not_finite(shared, looks, sizes):
        raise AssertionError(f"verify_equivalence: {wrong}\n{result}")
    if not result.equal:
        raise AssertionError(f"verify_equivalence: views differ by more than {result.tolerance:g}\n{result}")
    return result
