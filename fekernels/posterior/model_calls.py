"""What goes into a model, of several kinds and in batches; and one tensor of what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._checks import dense
from fekernels._runtime.torch_internals import uncompiled

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Pick = str | int | Callable[[Any], Tensor] | None


def bare(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile: its own names, and calls that no rank waits in."""
    inner = uncompiled(model)
    while isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = uncompiled(inner.module)
    return inner


def as_inputs(x: Any) -> Inputs:
    """Positional and keyword arguments: of a tuple, of a mapping, of anything else as the only one."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x) if isinstance(x, tuple) else (x,)), {}


def split(inputs: Inputs, size: int) -> list[Inputs]:
    """`size` rows at a time of every tensor that has as many rows as the first; the rest goes with each part."""
    args, kwargs = inputs
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        raise ValueError(
            "PosteriorSamples.predict: x must hold a tensor with rows where batch_size is given; got none"
        )
    rows = len(first)

    def part(value: Any, start: int) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        return value[start : start + size] if whole else value

    starts = range(0, max(rows, 1), size)
    return [
        (tuple(part(v, start) for v in args), {k: part(v, start) for k, v in kwargs.items()})
        for start in starts
    ]


def check_pick(owner: str, output: Any) -> Pick:
    if isinstance(output, Integral) and not isinstance(output, bool):
        return int(output)
    if not (output is None or isinstance(output, str) or callable(output)):
        raise TypeError(
            f"{owner}: output must be a key, an index, a callable or None; got {type(output).__name__}"
        )
    return output


def pick(owner: str, came: Any, output: Pick) -> Tensor:
    """The tensor of a model's answer that `output` names, checked to be dense and of floating point."""
    value = came
    if callable(output):
        value = output(came)
    elif output is not None:
        try:
            attribute = isinstance(output, str) and not isinstance(came, Mapping)
            value = getattr(came, str(output)) if attribute else came[output]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{owner}: output must name a part of what the model returns, {_described(came)}; "
                f"got {output!r}"
            ) from error
    whose = "the model's output" if output is None else f"output {output!r} of the model"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        choose = " (output= picks a part)" if output is None and not isinstance(value, Tensor) else ""
        raise TypeError(f"{owner}: {whose} must be a floating-point tensor; got {_described(value)}{choose}")
    return dense(owner, whose, value)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        return f"{type(value).__name__} of {', '.join(names) if names else len(value)}"
    return type(value).__name__


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Every submodule's training mode as it was, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, weights: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """The model's answer with `weights` in place of its own, in eval mode and without gradients."""
    with modes_restored(model), torch.no_grad():
        model.eval()
        return torch.func.functional_call(model, dict(weights), *inputs)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a tensor that the model holds under several, mapped to its first."""
    first: dict[Tensor, str] = {}
    tied: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in named:
        if first.setdefault(value, name) != name:
            tied[name] = first[value]
    return tied
