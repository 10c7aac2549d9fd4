"""The default networks of a VAE, and what lies between its networks and its likelihood, by the catalogue."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fekernels._catalogue.free_energy import CODES, NAMES, Parameter, Target, longest
from fekernels._checks import one_of

__all__ = ["DISPERSIONS", "Heads", "Output", "features", "perceptron"]

DISPERSIONS = ("decoder", "feature", "shared", "fixed")

# Where default networks begin with a parameter that softplus makes. Student's t has no mean at one degree of freedom,
# and no variance at two; at five it has both, and heavy tails to learn from.
STARTS = {"degrees_of_freedom": 5.0}


def _start(parameter: Parameter, otherwise: float) -> float | None:
    """The real number that softplus takes to the parameter's start; None: zero is one."""
    value = STARTS.get(parameter.name, otherwise)
    return math.log(math.expm1(value)) if parameter.not_negative and value else None


def perceptron(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes, each with a ReLU behind it."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Heads(nn.Module):
    """A linear layer for each parameter of a likelihood: a tuple of [N, outputs]."""

    def __init__(self, inputs: int, outputs: int, parameters: Sequence[Parameter]) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, outputs) for _ in parameters]
        for layer, parameter in zip(layers, parameters, strict=True):
            start = _start(parameter, 0.0)
            if start is not None:
                with torch.no_grad():
                    layer.bias.add_(start)
        self.layers = nn.ModuleList(layers)

    def forward(self, h: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(h) for layer in self.layers)


def features(likelihood: str, x: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """What the default encoder sees, [B, inputs]: one-hot classes; log(1 + x) of counts, whose range is wide; x."""
    target = longest(likelihood).target
    if target is Target.CLASSES:
        return F.one_hot(x.long(), classes).flatten(1).to(dtype)
    x = x.flatten(1).to(dtype)
    return torch.log1p(x) if target in (Target.COUNTS, Target.POSITIVE) else x


def link(parameter: Parameter, raw: Tensor) -> Tensor:
    """A real number into the parameter's domain."""
    return F.softplus(raw) if parameter.not_negative else raw


class Output(nn.Module):
    """From real numbers, as a decoder gives them, to the parameters of the likelihood, each in its domain.

    Those that must be positive by softplus. The parameters behind the first (a log-variance, a log-scale, degrees of
    freedom, an inverse dispersion, a shape, a gate) come from ``dispersion``: "decoder", a number for every element of
    every sample, which the decoder gives; "feature", one learned for every element; "shared", one learned for all;
    "fixed", none, where the likelihood can do without (a Gaussian of variance 1).

    Raises:
        TypeError, ValueError: an unknown likelihood or dispersion, or a dispersion that it has no parameter for.
    """

    def __init__(
        self, function: str, likelihood: str, event: tuple[int, ...], dispersion: str | None
    ) -> None:
        super().__init__()
        one_of(function, "likelihood", likelihood, NAMES)
        row = longest(likelihood)
        if len(row.parameters) == 1:
            if dispersion is not None:
                raise ValueError(
                    f"{function}: dispersion must be None for likelihood {likelihood!r}, whose only parameter is"
                    f" {row.parameters[0].name}; got {dispersion!r}"
                )
        elif dispersion is None:
            dispersion = "shared" if row.target is Target.REAL else "decoder"
        else:
            dispersion = one_of(function, "dispersion", dispersion, DISPERSIONS)
            if dispersion == "fixed" and min(CODES[likelihood]) > 1:
                names = ", ".join(parameter.name for parameter in row.parameters[1:])
                raise ValueError(
                    f"{function}: dispersion must not be 'fixed' for likelihood {likelihood!r}, which needs {names}"
                )
        self.likelihood, self.event, self.dispersion = likelihood, event, dispersion
        self.parameter_rows = row.parameters[:1] if dispersion in (None, "fixed") else row.parameters
        learned = dispersion in ("feature", "shared")
        self.heads = 1 if learned else len(self.parameter_rows)
        # One parameter, any real number: as most decoders give it, it is handed on.
        self._may_pass = len(self.parameter_rows) == 1 and not (row.classes or row.parameters[0].not_negative)
        self.learned: nn.Parameter | None = None
        if learned:
            sizes = event if dispersion == "feature" else (1,) * len(event)
            others = self.parameter_rows[1:]
            # A start at 1 of what is positive (or STARTS), and at 0 of logarithms and logits.
            starts = torch.tensor([_start(parameter, 1.0) or 0.0 for parameter in others])
            starts = starts.view(-1, *(1,) * len(event)).expand(len(others), *sizes)
            self.learned = nn.Parameter(starts.clone())

    def forward(self, raw: Tensor | Sequence[Tensor], batch: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
        """``raw``: a tensor, or one for each parameter that the decoder gives, each of ``prod(batch)`` events."""
        if self._may_pass and isinstance(raw, Tensor) and raw.shape == (*batch, *self.event):
            return raw
        given = (raw,) if isinstance(raw, Tensor) else tuple(raw)
        if len(given) != self.heads:
            names = ", ".join(parameter.name for parameter in self.parameter_rows[: self.heads])
            raise ValueError(
                f"VAE.decode: decoder must give {self.heads} tensors ({names}) for likelihood {self.likelihood!r}"
                f" with dispersion={self.dispersion!r}; got {len(given)}"
            )
        shape = (*batch, *self.event)
        if longest(self.likelihood).classes:
            shape = (*shape, -1)
        # Without a view where there is nothing to change: it would be a node of every backward pass.
        shaped = [tensor if tensor.shape == shape else tensor.reshape(shape) for tensor in given]
        values = [
            link(parameter, tensor) for parameter, tensor in zip(self.parameter_rows, shaped, strict=False)
        ]
        if self.learned is not None:
            for parameter, tensor in zip(self.parameter_rows[1:], self.learned, strict=True):
                values.append(link(parameter, tensor))
        return values[0] if len(values) == 1 else tuple(values)

    def extra_repr(self) -> str:
        names = ", ".join(parameter.name for parameter in self.parameter_rows)
        return f"{self.likelihood!r}: {names}" + (
            f", dispersion={self.dispersion!r}" if self.dispersion else ""
        )
