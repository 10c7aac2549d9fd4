"""Samples of a posterior: chains and runs that make them, memory and disk that keep them, what they predict."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fekernels.posterior.chains import Chains
    from fekernels.posterior.control_variate import ControlVariate
    from fekernels.posterior.learning_coefficient import (
        LearningCoefficient,
        LearningCoefficientDiagnostics,
        local_learning_coefficient,
    )
    from fekernels.posterior.report import PosteriorReport
    from fekernels.posterior.run import PosteriorRun, sample_posterior
    from fekernels.posterior.samples import PosteriorSamples

__all__ = [
    "Chains",
    "ControlVariate",
    "LearningCoefficient",
    "LearningCoefficientDiagnostics",
    "PosteriorReport",
    "PosteriorRun",
    "PosteriorSamples",
    "local_learning_coefficient",
    "sample_posterior",
]

# At their first use: who only trains does not wait for them at the import.
_LATER = {
    "Chains": "chains",
    "ControlVariate": "control_variate",
    "LearningCoefficient": "learning_coefficient",
    "LearningCoefficientDiagnostics": "learning_coefficient",
    "PosteriorReport": "report",
    "PosteriorRun": "run",
    "PosteriorSamples": "samples",
    "local_learning_coefficient": "learning_coefficient",
    "sample_posterior": "run",
}


if not TYPE_CHECKING:  # or a name that does not exist would be Any

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
