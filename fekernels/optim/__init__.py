"""Optimizers that sample, their temperature schedules, and what collects their samples."""

from typing import TYPE_CHECKING

from fekernels import _lazy
from fekernels.optim._weight_posterior import WeightGaussian
from fekernels.optim.langevin_adam import LangevinAdam
from fekernels.optim.sgld import SGLD
from fekernels.optim.temperature import (
    ConstantTemperature,
    CosineTemperature,
    CyclicalTemperature,
    ExponentialTemperature,
    LambdaTemperature,
    TemperatureScheduler,
)
from fekernels.optim.unified import UnifiedOptimizer
from fekernels.optim.variational_adam import VariationalAdam

if TYPE_CHECKING:
    from fekernels.posterior import PosteriorSamples

__all__ = [
    "SGLD",
    "ConstantTemperature",
    "CosineTemperature",
    "CyclicalTemperature",
    "ExponentialTemperature",
    "LambdaTemperature",
    "LangevinAdam",
    "PosteriorSamples",
    "TemperatureScheduler",
    "UnifiedOptimizer",
    "VariationalAdam",
    "WeightGaussian",
]

if not TYPE_CHECKING:  # or a name that does not exist would be Any
    # Who only trains does not wait for it at the import.
    __getattr__, __dir__ = _lazy.attach(__name__, {"fekernels.posterior": ["PosteriorSamples"]})
