"""Figures. matplotlib is imported in this folder only, and drawn on figures of its own: no window, no global state."""

from fekernels.plots.landscapes import contours, landscape, paths
from fekernels.plots.panels import GREY, panels
from fekernels.plots.predictions import entropies, reliability
from fekernels.plots.runs import (
    learning_coefficient,
    posterior,
    posterior_run,
    trace,
    training,
    trajectory,
)

__all__ = [
    "GREY",
    "contours",
    "entropies",
    "landscape",
    "learning_coefficient",
    "panels",
    "paths",
    "posterior",
    "posterior_run",
    "reliability",
    "trace",
    "trajectory",
    "training",
]
