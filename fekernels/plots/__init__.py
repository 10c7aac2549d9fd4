"""Figures. matplotlib is imported in this folder only, and drawn on figures of its own: no window, no global state."""

from fekernels.plots.landscapes import contours, landscape, paths
from fekernels.plots.losses import free_energy_history, messages
from fekernels.plots.panels import GREY, panels
from fekernels.plots.predictions import entropies, reliability
from fekernels.plots.roofline import roofline
from fekernels.plots.sampler_runs import (
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
    "free_energy_history",
    "landscape",
    "learning_coefficient",
    "messages",
    "panels",
    "paths",
    "posterior",
    "posterior_run",
    "reliability",
    "roofline",
    "trace",
    "trajectory",
    "training",
]
