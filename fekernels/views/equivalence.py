"""Whether the four forms of one batch's free energy are one number with one gradient, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fekernels.views.forms import VIEWS, Shared, View, share

__all__ = ["Equivalence", "verify_equivalence"]

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
