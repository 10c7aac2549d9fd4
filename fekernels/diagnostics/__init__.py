"""What to ask of a sampler and of the predictions it makes: convergence, calibration, uncertainty, detection."""

from fekernels.diagnostics.chains import effective_sample_size, split_rhat
from fekernels.diagnostics.predictions import (
    Calibration,
    auroc,
    calibration,
    mutual_information,
    predictive_entropy,
)

__all__ = [
    "Calibration",
    "auroc",
    "calibration",
    "effective_sample_size",
    "mutual_information",
    "predictive_entropy",
    "split_rhat",
]
