"""Whole models on the fused operators. Each is imported at its first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fekernels.models.rbm import BernoulliRBM
    from fekernels.models.vae import VAE

__all__ = ["BernoulliRBM", "VAE"]

_HOMES = {"BernoulliRBM": "rbm", "VAE": "vae"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fekernels.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
