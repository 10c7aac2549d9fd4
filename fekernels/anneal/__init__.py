"""Free-energy differences by annealing: log Z1/Z0 from particles that are carried from one density to another."""

from fekernels.anneal.annealed_importance import (
    along_path,
    importance_sampling,
    reverse_importance_sampling,
)
from fekernels.anneal.estimate import AnnealedEstimate, bennett_acceptance_ratio, jarzynski
from fekernels.anneal.paths import GeometricPath, Path
from fekernels.anneal.schedules import betas_from_temperature, sigmoid_betas

__all__ = [
    "AnnealedEstimate",
    "GeometricPath",
    "Path",
    "along_path",
    "bennett_acceptance_ratio",
    "betas_from_temperature",
    "importance_sampling",
    "jarzynski",
    "reverse_importance_sampling",
    "sigmoid_betas",
]
