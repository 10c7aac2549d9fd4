"""Fused PyTorch kernels for free-energy minimisation: optimizers that sample at the price of Adam."""

from typing import TYPE_CHECKING, Any

import torch

from fekernels._runtime import extension

extension.check_torch_version(torch.__version__)

from fekernels import losses, optim, random, stein  # noqa: E402
from fekernels._runtime.backends import BackendUnavailable, backends, use_backend  # noqa: E402
from fekernels._runtime.extension import build  # noqa: E402
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
from fekernels.stein import (  # noqa: E402
    SVGD,
    kernel_stein_discrepancy,
    kernels,
    median_bandwidth,
    pairwise_sq_dist_median,
    svgd_direction,
)

if TYPE_CHECKING:
    from fekernels import diagnostics

__version__ = "0.1.0"

__all__ = [
    "SGLD",
    "SVGD",
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
    "diagnostics",
    "energy",
    "free_energy",
    "gaussian_kl",
    "importance_weighted_bound",
    "kernel_stein_discrepancy",
    "kernels",
    "likelihoods",
    "losses",
    "median_bandwidth",
    "monte_carlo_kl",
    "optim",
    "pairwise_sq_dist_median",
    "random",
    "reparameterize",
    "stein",
    "svgd_direction",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """``diagnostics`` at its first use: who only trains does not wait for it at the import."""
    if name != "diagnostics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module("fekernels.diagnostics")
