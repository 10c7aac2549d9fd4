"""The document's network whose backward pass is told as messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._checks import integer, number

__all__ = ["GradientAsMessagePassing"]


class GradientAsMessagePassing(nn.Module):
    """Three linear layers, ReLU between them, whose backward pass hands out the messages it sent.

    ``fe.messages.GradientMessages`` does this for any module.

    Args:
        input_dim, hidden_dim, output_dim: sizes of the layers.

    Raises:
        TypeError, ValueError: a size that is none.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        named = {"input_dim": input_dim, "hidden_dim": hidden_dim, "output_dim": output_dim}
        first, hidden, last = (integer("GradientAsMessagePassing", *each, 1) for each in named.items())
        self.layers = nn.ModuleList(
            [nn.Linear(first, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, last)]
        )
        self._outputs: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_outputs": []}  # a graph cannot be copied

    __call__: Callable[..., tuple[Tensor, list[Tensor]]]  # torch says Any of every module's

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(output [B, output_dim], activations of the three layers). The last is linear: a ReLU would stop messages."""
        self._outputs, activations, h = [], [], x
        for layer in self.layers:
            output = layer(h)
            h = output if layer is self.layers[-1] else torch.relu(output)
            self._outputs.append(output)
            activations.append(h)
        return h, activations

    def backward_as_messages(self, loss: Tensor) -> list[dict[str, Tensor]]:
        """The messages of ``loss``, a scalar of the last ``forward``, layer by layer; those of earlier calls are gone.

        Returns:
            For each layer "weight_message" and "bias_message", the gradients in its parameters, which ``.grad`` holds
            too, and "error_message", the gradient in what it gave, [B, its size].

        Raises:
            TypeError: loss is no tensor. ValueError: it is no scalar.
            RuntimeError: loss does not depend on the last forward pass, or its messages were sent before.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(
                "GradientAsMessagePassing.backward_as_messages: loss must be a scalar tensor; got "
                f"{type(loss).__name__}"
            )
        if loss.numel() != 1:
            raise ValueError(
                "GradientAsMessagePassing.backward_as_messages: loss must be a scalar tensor; got shape "
                f"{tuple(loss.shape)}"
            )
        if not self._outputs:
            raise RuntimeError(
                "GradientAsMessagePassing.backward_as_messages: loss must be of a forward pass since the last call; "
                "got none"
            )
        parameters = list(self.layers.parameters())  # weight and bias of each layer in turn
        found = torch.autograd.grad(loss, [*parameters, *self._outputs])
        for parameter, gradient in zip(parameters, found, strict=False):
            parameter.grad = gradient.clone()  # what clears it later leaves the messages
        self._outputs = []
        keys = ("weight_message", "bias_message", "error_message")
        return [
            dict(zip(keys, messages, strict=True))
            for messages in zip(found[0:6:2], found[1:6:2], found[6:], strict=True)
        ]

    @torch.no_grad()
    def update_with_messages(self, messages: Sequence[Mapping[str, Tensor]], lr: float = 0.01) -> None:
        """parameter <- parameter - lr message, as ``torch.optim.SGD``, for every layer in turn.

        Raises:
            TypeError: messages are no sequence of mappings. ValueError: they are not of these layers. No parameter has
                changed then.
        """
        function = "GradientAsMessagePassing.update_with_messages"
        lr = number(function, "lr", lr)
        if not isinstance(messages, Sequence):
            raise TypeError(
                f"{function}: messages must be what backward_as_messages returns, a list of a dict for each layer; got "
                f"{type(messages).__name__}"
            )
        if len(messages) != len(self.layers):
            raise ValueError(
                f"{function}: messages must be of {len(self.layers)} layers; got {len(messages)}"
            )
        for k, (layer, message) in enumerate(zip(self.layers, messages, strict=True)):
            if not isinstance(message, Mapping):
                raise TypeError(f"{function}: messages[{k}] must be a dict; got {type(message).__name__}")
            for name, parameter in layer.named_parameters():
                found = message.get(f"{name}_message")
                if not isinstance(found, Tensor) or found.shape != parameter.shape:
                    came = (
                        f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                    )
                    raise ValueError(
                        f"{function}: messages[{k}]['{name}_message'] must have shape {tuple(parameter.shape)}; got "
                        f"{came}"
                    )
        for layer, message in zip(self.layers, messages, strict=True):
            for name, parameter in layer.named_parameters():
                parameter.add_(message[f"{name}_message"], alpha=-lr)
