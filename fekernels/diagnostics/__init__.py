"""What to ask of a sampler and of the predictions it makes: convergence, calibration, uncertainty, detection."""

from fekernels.diagnostics.chains import effective_sample_size, split_rhat
from fekernels.diagnostics.gradient_noise import GradientNoiseRatio, gradient_noise_ratio
from fekernels.diagnostics.predictions import (
    Calibration,
    auroc,
    calibration,
    mutual_information,
    predictive_entropy,
)

__all__ = [
    "Calibration",
    "GradientNoiseRatio",
    "auroc",
    "calibration",
    "effective_sample_size",
    "gradient_noise_ratio",
    "mutual_information",
    "predictive_entropy",
    "split_rhat",
]
