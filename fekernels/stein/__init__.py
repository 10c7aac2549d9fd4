"""Particles that follow a target: their Stein direction, the discrepancy, median bandwidths and the sampler."""

from typing import TYPE_CHECKING

from fekernels import _lazy
from fekernels._catalogue import stein as _catalogue
from fekernels._catalogue.stein import *  # noqa: F403
from fekernels.ops.stein.kernel_matrix import kernel_matrix, thinning
from fekernels.ops.stein.kernel_stein_discrepancy import kernel_stein_discrepancy
from fekernels.ops.stein.svgd_direction import svgd_direction
from fekernels.stein import kernels
from fekernels.stein.goodness_of_fit import GoodnessOfFit, goodness_of_fit
from fekernels.stein.median import median_bandwidth, pairwise_sq_dist_median

if TYPE_CHECKING:
    from fekernels.stein.annealing import CyclicalAnnealing, TanhAnnealing
    from fekernels.stein.ensemble import SVGDEnsemble
    from fekernels.stein.svgd import SVGD
    from fekernels.stein.svgd_run import SVGDResult

__all__ = [
    "SVGD",
    "CyclicalAnnealing",
    "GoodnessOfFit",
    "SVGDEnsemble",
    "SVGDResult",
    "TanhAnnealing",
    "goodness_of_fit",
    "kernel_matrix",
    "kernel_stein_discrepancy",
    "kernels",
    "median_bandwidth",
    "pairwise_sq_dist_median",
    "svgd_direction",
    "thinning",
]
__all__ += _catalogue.__all__

if not TYPE_CHECKING:  # or a name that does not exist would be Any
    # Who only takes directions does not wait for them at the import.
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            ".svgd_run": ["SVGDResult"],
            ".annealing": ["CyclicalAnnealing", "TanhAnnealing"],
            ".ensemble": ["SVGDEnsemble"],
            ".svgd": ["SVGD"],
        },
    )
