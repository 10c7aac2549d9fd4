"""What to ask of a sampler and of the predictions it makes: convergence, calibration, uncertainty, detection."""

from typing import TYPE_CHECKING

from fekernels import _lazy
from fekernels.diagnostics.chain_statistics import (
    ChainStatistics,
    chain_statistics,
    effective_sample_size,
    split_rhat,
)
from fekernels.diagnostics.critical_points import CriticalPoint, critical_points
from fekernels.diagnostics.gradient_noise import GradientNoiseRatio, gradient_noise_ratio
from fekernels.diagnostics.loss_plane import LossPlane, loss_plane
from fekernels.diagnostics.posterior_temperature import posterior_temperature
from fekernels.diagnostics.predictions import (
    Calibration,
    auroc,
    brier_score,
    calibration,
    mutual_information,
    predictive_entropy,
)
from fekernels.diagnostics.trajectory import TrajectoryKL, configurational_temperature

if TYPE_CHECKING:
    from fekernels.diagnostics.landscape_trajectories import Trajectory, trajectories

__all__ = [
    "Calibration",
    "ChainStatistics",
    "CriticalPoint",
    "GradientNoiseRatio",
    "LossPlane",
    "Trajectory",
    "TrajectoryKL",
    "auroc",
    "brier_score",
    "calibration",
    "chain_statistics",
    "configurational_temperature",
    "critical_points",
    "effective_sample_size",
    "gradient_noise_ratio",
    "loss_plane",
    "mutual_information",
    "posterior_temperature",
    "predictive_entropy",
    "split_rhat",
    "trajectories",
]

if not TYPE_CHECKING:  # or a name that does not exist would be Any
    # What walks needs the optimizers and samplers, which need the rest of this package.
    __getattr__, __dir__ = _lazy.attach(__name__, {".landscape_trajectories": ["Trajectory", "trajectories"]})
