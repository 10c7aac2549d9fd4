"""Fused PyTorch kernels for free-energy minimisation: optimizers that sample in the pass of an Adam step."""

import gc
from typing import TYPE_CHECKING

import torch

# So many new objects would have Python look for garbage among all of torch's: two thirds of the import's time.
_collecting = gc.isenabled()
gc.disable()
try:
    from fekernels._runtime import extension

    extension.check_torch_version(torch.__version__)

    from fekernels import _lazy, losses, optim, posterior, random, stein
finally:
    if _collecting:
        gc.enable()

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
from fekernels.optim import (  # noqa: E402
    SGLD,
    LangevinAdam,
    UnifiedOptimizer,
    VariationalAdam,
)
from fekernels.stein import (  # noqa: E402
    kernel_stein_discrepancy,
    kernels,
    median_bandwidth,
    pairwise_sq_dist_median,
    svgd_direction,
)

if TYPE_CHECKING:
    from fekernels import anneal, diagnostics, distributed, graph, messages, models, unified, views
    from fekernels import plots as plots
    from fekernels.posterior import (
        Chains,
        ControlVariate,
        PosteriorSamples,
        local_learning_coefficient,
        sample_posterior,
    )
    from fekernels.stein import SVGD

__version__ = "0.2.0"

__all__ = [
    "SGLD",
    "SVGD",
    "BackendUnavailable",
    "Chains",
    "ControlVariate",
    "FreeEnergyLoss",
    "FreeEnergyTerms",
    "GaussianMixturePrior",
    "LangevinAdam",
    "PosteriorSamples",
    "UnifiedOptimizer",
    "VariationalAdam",
    "VampPrior",
    "__version__",
    "anneal",
    "backends",
    "build",
    "diagnostics",
    "distributed",
    "energy",
    "free_energy",
    "gaussian_kl",
    "graph",
    "importance_weighted_bound",
    "kernel_stein_discrepancy",
    "kernels",
    "likelihoods",
    "local_learning_coefficient",
    "losses",
    "median_bandwidth",
    "messages",
    "models",
    "monte_carlo_kl",
    "optim",
    "pairwise_sq_dist_median",
    "posterior",
    "random",
    "reparameterize",
    "sample_posterior",
    "stein",
    "svgd_direction",
    "unified",
    "use_backend",
    "views",
]

if not TYPE_CHECKING:  # or a name that does not exist would be Any
    # At their first use: who only trains does not wait for them. ``plots`` needs matplotlib, the extra "plots".
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            "fekernels.posterior": [
                "Chains", "ControlVariate", "PosteriorSamples", "local_learning_coefficient", "sample_posterior",
            ],
            "fekernels.stein": ["SVGD"],
        },
        ["anneal", "diagnostics", "distributed", "graph", "messages", "models", "plots", "unified", "views"],
    )  # fmt: skip
