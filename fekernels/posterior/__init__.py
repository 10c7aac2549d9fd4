"""Samples of a posterior: chains and runs that make them, memory and disk that keep them, what they predict."""

from typing import TYPE_CHECKING

from fekernels import _lazy

if TYPE_CHECKING:
    from fekernels.posterior.chains import Chains
    from fekernels.posterior.control_variate import ControlVariate
    from fekernels.posterior.learning_coefficient import local_learning_coefficient
    from fekernels.posterior.learning_coefficient_estimate import (
        LearningCoefficient,
        LearningCoefficientDiagnostics,
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

if not TYPE_CHECKING:  # or a name that does not exist would be Any
    # Who only trains does not wait for them at the import.
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            ".chains": ["Chains"],
            ".control_variate": ["ControlVariate"],
            ".learning_coefficient": ["local_learning_coefficient"],
            ".learning_coefficient_estimate": ["LearningCoefficient", "LearningCoefficientDiagnostics"],
            ".report": ["PosteriorReport"],
            ".run": ["PosteriorRun", "sample_posterior"],
            ".samples": ["PosteriorSamples"],
        },
    )
