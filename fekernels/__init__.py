"""Fused PyTorch kernels for free-energy minimisation: optimizers that sample at the price of Adam."""

import torch

from fekernels import _extension

_extension.check_torch_version(torch.__version__)

from fekernels import losses, optim, random  # noqa: E402
from fekernels._backends import BackendUnavailable, backends, use_backend  # noqa: E402
from fekernels._extension import build  # noqa: E402
from fekernels.losses import (  # noqa: E402
    FreeEnergyLoss,
    FreeEnergyTerms,
    GaussianMixturePrior,
    VampPrior,
    energy,
    free_energy,
    gaussian_kl,
    importance_weighted_bound,
    likelihoods,
    monte_carlo_kl,
    reparameterize,
)
from fekernels.optim import SGLD, LangevinAdam, PosteriorSamples, UnifiedOptimizer  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "SGLD",
    "BackendUnavailable",
    "FreeEnergyLoss",
    "FreeEnergyTerms",
    "GaussianMixturePrior",
    "LangevinAdam",
    "PosteriorSamples",
    "UnifiedOptimizer",
    "VampPrior",
    "__version__",
    "backends",
    "build",
    "energy",
    "free_energy",
    "gaussian_kl",
    "importance_weighted_bound",
    "likelihoods",
    "losses",
    "monte_carlo_kl",
    "optim",
    "random",
    "reparameterize",
    "use_backend",
]
