"""How good predictions are, and how sure of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from fekernels.diagnostics import Calibration

__all__ = ["entropies", "reliability"]


def reliability(ax: Axes, bins: Calibration, color: str, label: str = "", least: int = 30) -> None:
    """Accuracy over confidence, bin by bin.

    Args:
        label: of a full line with full dots; without one it is dotted, with open dots.
        least: predictions that a bin must hold; of a few, the accuracy is mostly chance.
    """
    full = bins.count >= least
    style: dict[str, Any] = {
        "color": color,
        "label": label or None,
        "ls": "-" if label else ":",
        "marker": "o",
        "mfc": color if label else "white",
    }
    ax.plot(bins.confidence[full], bins.accuracy[full], ms=4, **style)


def entropies(ax: Axes, values: Mapping[str, Tensor], colors: Mapping[str, str], upper: float) -> None:
    """Densities of predictive entropies from 0 to ``upper`` nats: the first filled, the others as lines over it."""
    bins = torch.linspace(0, upper, 34).tolist()
    for at, (name, entropy) in enumerate(values.items()):
        style: dict[str, Any] = (
            {"histtype": "step", "lw": 1.8} if at else {"histtype": "stepfilled", "alpha": 0.25}
        )
        ax.hist(entropy.tolist(), bins, density=True, color=colors[name], label=name, **style)
    ax.set(yscale="log", xlabel="predictive entropy, nats", ylabel="density", xlim=(0, upper))
    ax.legend(frameon=False, fontsize=9)
