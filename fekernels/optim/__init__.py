"""Optimizers that sample, their temperature schedules, and what collects their samples."""

from typing import TYPE_CHECKING, Any

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

    def __getattr__(name: str) -> Any:
        if name != "PosteriorSamples":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fekernels.posterior import PosteriorSamples  # who only trains does not wait for it at the import

        return PosteriorSamples
