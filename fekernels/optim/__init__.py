"""Optimizers that sample, their temperature schedules, and what collects their samples."""

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
from fekernels.posterior.samples import PosteriorSamples

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
