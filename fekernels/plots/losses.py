"""Figures of a free energy over training, and of the error messages behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fekernels.plots.panels import GREY, panels

if TYPE_CHECKING:
    from fekernels.messages import LayerHistory
    from fekernels.models.training import History

__all__ = ["free_energy_history", "messages"]


def free_energy_history(history: History) -> Figure:
    """The free energy of a ``VAE.fit`` by epochs with its parts, and how many latents it uses."""
    figure, axes = panels(1, 2, (9, 3.2))
    epochs = range(1, len(history.free_energy) + 1)
    curve, units = axes[0]
    curve.plot(epochs, history.free_energy, color="C0", label="free energy")
    curve.plot(epochs, history.energy, color=GREY, ls="--", label="energy")
    if history.validation:
        curve.plot(epochs, history.validation, color="C3", label="free energy, validation")
    curve.set(xlabel="epoch", ylabel="nats per data point")
    curve.legend(frameon=False, fontsize=9)
    units.plot(epochs, history.kl, color="C2", label="KL, nats")
    units.step(
        epochs, history.active_units, color="C1", where="mid", label=f"active latents of {history.latents}"
    )
    units.set(xlabel="epoch", ylim=(0, None))
    units.legend(frameon=False, fontsize=9)
    return figure


def messages(history: Mapping[str, LayerHistory]) -> Figure:
    """Norm, angle and signal-to-noise ratio of each layer's messages over training, the first layers dark."""
    figure, axes = panels(1, 3, (12, 3.4))
    for k, (name, layer) in enumerate(history.items()):
        color = matplotlib.colormaps["viridis"](k / max(len(history) - 1, 1))
        steps = np.arange(1, len(layer.norm) + 1)
        width = max(len(steps) // 100, 1)
        for ax, values in zip(axes[0], (layer.norm, layer.angle, layer.signal_to_noise), strict=True):
            whole = len(steps) // width * width
            means = [np.asarray(part)[:whole].reshape(-1, width).mean(1) for part in (steps, values)]
            ax.plot(*means, color=color, lw=1.1, label=name)
    axes[0, 0].set(yscale="log", ylabel="norm of the message")
    axes[0, 1].set(ylabel="angle to the step before, degrees", ylim=(0, 180))
    axes[0, 1].axhline(90, color=GREY, lw=0.8, ls=":")
    axes[0, 2].set(yscale="log", ylabel="signal-to-noise (1: noise alone)")
    axes[0, 2].axhline(1, color=GREY, lw=0.8, ls=":")
    for ax in axes[0]:
        ax.set_xlabel("step")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure
