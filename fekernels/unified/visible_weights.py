"""The weights of models that are no modules, as far as they can be seen."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["visible_weights"]


def visible_weights(*models: Any) -> nn.Module:
    """A module over the models, or the modules and parameters among the attributes of those that are none.

    Noise is fresh after every step of the weights (``NoiseCounter`` of models): they have to be seen for that.
    """
    parts = [
        part for model in models for part in ([model] if isinstance(model, nn.Module) else _attributes(model))
    ]
    found = nn.Module()
    found.modules_seen = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
    found.parameters_seen = nn.ParameterList(part for part in parts if isinstance(part, nn.Parameter))
    return found


def _attributes(model: Any) -> list[Any]:
    return list(getattr(model, "__dict__", {}).values())
