"""A backward pass as messages: the error that each layer of a module is sent, by hooks, without a change to the module.

The message to a layer is the gradient of the loss with respect to its output. That of its weights follows from it and
from the layer's input alone, which is what makes backpropagation a passing of messages (Rumelhart, Hinton & Williams
1986). That it is belief propagation, or inference, is a metaphor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fekernels._checks import integer, number
from fekernels._loader_batches import tensors
from fekernels._runtime.torch_internals import in_backward, uncompiled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientMessages", "LayerHistory"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

OutputKey = tuple[str, int, int]  # layer, its call, its output


@dataclass
class LayerHistory:
    """Of a layer's messages, a number per step of training.

    Attributes:
        norm: the root of the sum of their squares.
        angle: degrees between the batch's sum of this step and that of the step before; NaN for the first. 90 is what
            noise gives in many dimensions, 0 a message that stays.
        signal_to_noise: squared norm of the batch's mean over the variance of that mean, by the spread of the data
            points: 1 is what noise alone gives. NaN for a batch of one. The batch is the dimension ``batch_dim``: of
            what has none (a vector from one data point alone), features would count as data points.
    """

    norm: list[float] = field(default_factory=list)
    angle: list[float] = field(default_factory=list)
    signal_to_noise: list[float] = field(default_factory=list)


class GradientMessages(Mapping[str, "Tensor | tuple[Tensor, ...]"]):
    """The error messages of the last backward pass through ``module``, by layer.

        messages = fe.messages.GradientMessages(model)
        criterion(model(x), y).backward()
        messages["0"]                 # d loss / d output of layer "0", of the output's shape
        messages.update(lr=0.1)       # the step of torch.optim.SGD
        messages.history["0"].norm    # of every step so far

    A layer is every submodule but containers (Sequential, ModuleList, ModuleDict); a module without submodules is one
    itself. A layer whose output gets no gradient (under ``torch.no_grad``, or not of the loss) has no message. The next
    forward pass after a backward pass, and a second backward pass over the same graph, begin anew. Several forward
    passes before a backward pass are calls of the same layers, as are those of a module with several names.

    Layers that work in place keep their inputs' messages apart from their outputs'. Under DistributedDataParallel the
    messages are those of this rank's batch, while ``.grad`` is averaged. Compiled code does not run hooks.

    Args:
        module: whose layers are listened to, until ``remove()`` or the end of ``with``.
        layers: names, as ``module.named_modules()`` gives them, of those to listen to; None is all.
        statistics: whether ``history`` is kept, at the price of a few reductions of every message.
        batch_dim: the dimension of the layers' outputs that runs over data points, for ``angle`` and
            ``signal_to_noise``: 1 of what is time-first, as nn.LSTM and nn.Transformer are without ``batch_first``. A
            mapping from layers to dimensions where they differ, 0 for those it does not name. A scalar counts as one
            data point.

    Raises:
        TypeError: module is no Module; batch_dim is no int. ValueError: it is compiled; a layer it does not have. In
            the forward pass, with statistics, ValueError: an output without the dimension ``batch_dim``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        layers: Sequence[str] | None = None,
        statistics: bool = True,
        batch_dim: int | Mapping[str, int] = 0,
    ) -> None:
        function = "GradientMessages"
        if not isinstance(module, nn.Module):
            raise TypeError(f"{function}: module must be a torch.nn.Module; got {type(module).__name__}")
        if uncompiled(module) is not module:
            raise ValueError(
                f"{function}: module must not be compiled, since compiled code runs no hooks; give the module that"
                " torch.compile was given, and call that"
            )
        named = dict(module.named_modules())
        if layers is None:
            children = any(True for _ in module.children())
            layers = [
                name
                for name, layer in named.items()
                if not isinstance(layer, CONTAINERS) and (name or not children)
            ]
        elif isinstance(layers, str) or not all(isinstance(name, str) for name in layers):
            raise TypeError(f"{function}: layers must be names of submodules; got {layers!r}")
        for name in layers:
            if name not in named:
                raise ValueError(f"{function}: layers must be of {', '.join(map(repr, named))}; got {name!r}")
        by_layer = batch_dim if isinstance(batch_dim, Mapping) else dict.fromkeys(layers, batch_dim)
        for name in by_layer:
            if name not in layers:
                raise ValueError(
                    f"{function}: batch_dim must map layers, of {', '.join(map(repr, layers))}; got {name!r}"
                )
        self._batch_dims = {name: integer(function, "batch_dim", dim) for name, dim in by_layer.items()}
        self._layers = tuple(layers)
        self.module, self.statistics = module, statistics
        self._history: dict[str, LayerHistory] = {}
        self._sums: dict[str, Tensor] = {}
        self._errors: dict[OutputKey, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._counted = True
        self._on_leaves: list[Any] = []
        self._handles = [named[name].register_forward_hook(partial(self._listen, name)) for name in layers]

    def _listen(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        """After a layer's forward pass. A forward pass within a backward pass computes again what was forgotten."""
        if self._errors and not in_backward():
            self.clear()
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        found = [output] if isinstance(output, Tensor) else tensors(output)
        dim = self._batch_dims.get(name, 0)
        for k, tensor in enumerate(found):
            if tensor.requires_grad:
                if self.statistics and tensor.dim() and not -tensor.dim() <= dim < tensor.dim():
                    raise ValueError(
                        f"GradientMessages: outputs must have the dimension batch_dim = {dim}; got one of shape"
                        f" {tuple(tensor.shape)} of layer {name!r} (batch_dim may map layers to dimensions)"
                    )
                handle = tensor.register_hook(partial(self._receive, (name, call, k)))
                if tensor.is_leaf:  # which outlives the graph
                    self._on_leaves.append(handle)

    def _receive(self, key: OutputKey, error: Tensor) -> None:
        if not self._handles:
            return
        if key in self._errors:
            self._count()
            self._errors.clear()
        self._errors[key] = error.detach()
        self._counted = False

    def __getitem__(self, name: str) -> Tensor | tuple[Tensor, ...]:
        """The message to a layer, or a tuple of those to its calls, and to the outputs of each call, in their order."""
        found = tuple(self._errors[key] for key in sorted(self._errors) if key[0] == name)
        if not found:
            raise KeyError(self._why_none(name))
        return found[0] if len(found) == 1 else found

    def _why_none(self, name: Any) -> str:
        if name not in self._layers:
            listened = ", ".join(map(repr, self._layers))
            return f"GradientMessages: the name must be that of a layer that is listened to: {listened}; got {name!r}"
        if not self._calls.get(name):
            return (
                f"GradientMessages: layer {name!r} has no message: it was not called in the last forward pass, or there"
                " was none (a module that only reads the weights of another, as nn.MultiheadAttention does of"
                " 'out_proj', calls no hooks)"
            )
        return (
            f"GradientMessages: layer {name!r} has no message: no gradient has reached its output; call backward() of a"
            " loss that it is part of"
        )

    def __iter__(self) -> Iterator[str]:
        """The names of the layers that have been sent a message, from the first to the last."""
        return iter(sorted({key[0] for key in self._errors}, key=list(self._calls).index))

    def __len__(self) -> int:
        return len({key[0] for key in self._errors})

    def _all(self, name: str) -> tuple[Tensor, ...]:
        found = self[name]
        return (found,) if isinstance(found, Tensor) else found

    def norms(self) -> dict[str, float]:
        """The norm of the messages to each layer: the root of the sum of their squares."""
        return {
            name: math.sqrt(sum(float(error.double().square().sum()) for error in self._all(name)))
            for name in self
        }

    @property
    def history(self) -> dict[str, LayerHistory]:
        """Norm, angle and signal-to-noise ratio of each layer's messages, a number per backward pass."""
        self._count()
        return self._history

    @torch.no_grad()
    def _count(self) -> None:
        """Add the messages to the history, once."""
        if self._counted or not self.statistics:
            return
        self._counted = True
        names, rows = list(self), []
        for name in names:
            dim = self._batch_dims.get(name, 0)
            parts = [_statistics(error, dim) for error in self._all(name)]
            now = torch.cat([part[0] for part in parts])
            before = self._sums.get(name)
            self._sums[name] = now
            cosine = now.new_full((), math.nan)
            if before is not None and before.shape == now.shape:
                cosine = torch.dot(now, before) / (now.norm() * before.norm())
            squares, signal, noise = torch.stack([torch.stack(part[1:]) for part in parts]).sum(0)
            rows.append(
                torch.stack([squares.sqrt(), cosine.clamp(-1, 1).acos().rad2deg(), signal / noise]).cpu()
            )
        for name, row in zip(names, rows, strict=True):
            history = self._history.setdefault(name, LayerHistory())
            norm, angle, ratio = row.tolist()
            history.norm.append(norm)
            history.angle.append(angle)
            history.signal_to_noise.append(ratio)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """theta <- theta - lr gradient, bit for bit ``torch.optim.SGD(lr=lr)``'s step; the gradients are then cleared.

        Raises:
            TypeError, ValueError: lr is no number > 0. RuntimeError: there is no gradient.
        """
        lr = number("GradientMessages.update", "lr", lr, above=0.0)
        weights = [weight for weight in self.module.parameters() if weight.grad is not None]
        if not weights:
            raise RuntimeError(
                "GradientMessages.update: no weight has a gradient; call backward() of a loss first"
            )
        for weight in weights:
            assert weight.grad is not None
            weight.add_(weight.grad, alpha=-lr)
            weight.grad = None

    def clear(self) -> None:
        """Forget the messages, which the history keeps the numbers of."""
        self._count()
        self._errors.clear()
        self._calls.clear()
        for handle in self._on_leaves:
            handle.remove()
        self._on_leaves.clear()

    def remove(self) -> None:
        """Take the hooks off the module; the messages and their history stay. Done twice, it does nothing."""
        self._count()
        for handle in (*self._handles, *self._on_leaves):
            handle.remove()
        self._handles.clear()
        self._on_leaves.clear()

    def __enter__(self) -> GradientMessages:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def plot(self) -> Figure:
        """Norm, angle and signal-to-noise ratio of each layer over training; needs the extra "plots"."""
        from fekernels import plots

        return plots.messages(self.history)

    def __repr__(self) -> str:
        norms = ", ".join(f"{name!r}: {norm:.3g}" for name, norm in self.norms().items())
        return f"GradientMessages({{{norms}}})"


def _statistics(error: Tensor, batch_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over the batch; the squared norm of all; that of the mean, and the variance of the mean."""
    rows = (error.movedim(batch_dim, 0) if error.dim() else error.unsqueeze(0)).detach()
    rows = rows.reshape(len(rows), math.prod(rows.shape[1:])).to(
        torch.float64 if rows.device.type == "cpu" else torch.float32
    )
    count, total = len(rows), rows.sum(0)
    mean = total / count
    spread = (rows - mean).square().sum() / max(count - 1, 1)
    noise = spread / count if count > 1 else spread + math.nan
    return total, rows.square().sum(), mean.square().sum(), noise
