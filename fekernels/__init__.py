"""Fused PyTorch kernels for free-energy minimisation: optimizers that sample at the price of Adam."""

import torch

from fekernels import _extension

_extension.check_torch_version(torch.__version__)

from fekernels import optim, random  # noqa: E402
from fekernels._backends import BackendUnavailable, backends, use_backend  # noqa: E402
from fekernels._extension import build  # noqa: E402
from fekernels.optim import SGLD, LangevinAdam, PosteriorSamples, UnifiedOptimizer  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "SGLD",
    "BackendUnavailable",
    "LangevinAdam",
    "PosteriorSamples",
    "UnifiedOptimizer",
    "__version__",
    "backends",
    "build",
    "optim",
    "random",
    "use_backend",
]
