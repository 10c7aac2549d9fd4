"""Whole models on the fused operators. Each is imported at its first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fekernels.models.inference import Posterior
    from fekernels.models.latent import LatentModel
    from fekernels.models.rbm import BernoulliRBM
    from fekernels.models.relevance import RelevanceModel
    from fekernels.models.relevance_index import ContextIndex
    from fekernels.models.relevance_score import Calibration, LinearLogit, Relevance, relevance_of
    from fekernels.models.text_encoder import HashedTextEncoder
    from fekernels.models.training import History
    from fekernels.models.vae import VAE

__all__ = [
    "BernoulliRBM",
    "Calibration",
    "ContextIndex",
    "HashedTextEncoder",
    "History",
    "LatentModel",
    "LinearLogit",
    "Posterior",
    "Relevance",
    "RelevanceModel",
    "VAE",
    "relevance_of",
]

_HOMES = {
    "BernoulliRBM": "rbm",
    "Calibration": "relevance_score",
    "ContextIndex": "relevance_index",
    "HashedTextEncoder": "text_encoder",
    "History": "training",
    "LatentModel": "latent",
    "LinearLogit": "relevance_score",
    "Posterior": "inference",
    "Relevance": "relevance_score",
    "RelevanceModel": "relevance",
    "VAE": "vae",
    "relevance_of": "relevance_score",
}


if not TYPE_CHECKING:  # or a name that does not exist would be Any

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"fekernels.models.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
