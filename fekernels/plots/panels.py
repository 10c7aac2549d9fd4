"""What all figures begin with."""

from __future__ import annotations

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

__all__ = ["FORMATS", "GREY", "panels"]

FORMATS = tuple(sorted(FigureCanvasBase.get_supported_filetypes()))  # that a figure can be saved in
GREY = "#8a8a8a"


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches and its axes [rows, columns], open at the top and on the right."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
