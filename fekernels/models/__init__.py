"""Whole models on the fused operators. Each is imported at its first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fekernels import _lazy

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

if not TYPE_CHECKING:  # or a name that does not exist would be Any
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            ".inference": ["Posterior"],
            ".latent": ["LatentModel"],
            ".rbm": ["BernoulliRBM"],
            ".relevance": ["RelevanceModel"],
            ".relevance_index": ["ContextIndex"],
            ".relevance_score": ["Calibration", "LinearLogit", "Relevance", "relevance_of"],
            ".text_encoder": ["HashedTextEncoder"],
            ".training": ["History"],
            ".vae": ["VAE"],
        },
    )
