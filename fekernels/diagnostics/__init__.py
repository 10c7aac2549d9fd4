"""What to ask of a sampler and of the predictions it makes: convergence, calibration, uncertainty, detection."""

from fekernels.diagnostics.chains import (
    ChainStatistics,
    chain_statistics,
    effective_sample_size,
    split_rhat,
)
from fekernels.diagnostics.gradient_noise import GradientNoiseRatio, gradient_noise_ratio
from fekernels.diagnostics.predictions import (
    Calibration,
    auroc,
    brier_score,
    calibration,
    mutual_information,
    predictive_entropy,
)
from fekernels.diagnostics.trajectory import TrajectoryKL, configurational_temperature

__all__ = [
    "Calibration",
    "ChainStatistics",
    "GradientNoiseRatio",
    "TrajectoryKL",
    "auroc",
    "brier_score",
    "calibration",
    "chain_statistics",
    "configurational_temperature",
    "effective_sample_size",
    "gradient_noise_ratio",
    "mutual_information",
    "predictive_entropy",
    "split_rhat",
]
