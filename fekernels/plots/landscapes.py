"""Functions of two parameters, the loss of a model in a plane among them, and the ways taken over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fekernels.diagnostics import CriticalPoint, LossPlane, Trajectory
from fekernels.plots.panels import panels

__all__ = ["contours", "landscape", "paths"]

Surface = tuple[Tensor, Tensor, Tensor]  # a [n], b [m], values [n, m]
MARKS = {"minimum": "o", "saddle": "X", "maximum": "^", "degenerate": "s"}
PATH = "#b5523b"


def _surface(function: Any, bounds: tuple[float, float, float, float], points: int) -> Surface:
    if isinstance(function, LossPlane):
        return *function.axes, function.values
    if not callable(function):
        raise TypeError(
            f"landscape: function must be callable, [n, 2] -> [n], or a LossPlane; got {type(function).__name__}"
        )
    left, right, low, high = bounds
    a = torch.linspace(left, right, points, dtype=torch.float64)
    b = torch.linspace(low, high, points, dtype=torch.float64)
    with torch.no_grad():
        values = function(torch.cartesian_prod(a, b))
    if not isinstance(values, Tensor) or values.shape != (points**2,):
        came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"landscape: function must map [n, 2] to [n], here n = {points**2}; got {came}")
    return a, b, values.detach().view(points, points)


def contours(ax: Axes, surface: Surface, levels: int = 24) -> None:
    """Lines and colours of equal values, as much area between any two as between others.

    Args:
        surface: a [n], b [m] and values [n, m].
        levels: how many. Values that are not finite leave holes.
    """
    a, b, values = (each.double().cpu() for each in surface)
    finite = values[values.isfinite()]
    at = torch.quantile(finite, torch.linspace(0, 1, levels, dtype=torch.float64)).unique().tolist()
    if len(at) > 1:
        z = values.t().numpy()
        ax.contourf(a.numpy(), b.numpy(), z, levels=at, cmap="Blues_r", alpha=0.8)
        ax.contour(a.numpy(), b.numpy(), z, levels=at, colors="white", linewidths=0.4)
    ax.set(xlim=(float(a[0]), float(a[-1])), ylim=(float(b[0]), float(b[-1])))


def paths(ax: Axes, positions: Tensor, color: str = PATH) -> None:
    """The ways of n points: lines from open dots to full ones.

    Args:
        positions: [steps, n, 2], or [steps, 2] of one.
    """
    ways = positions.detach().double().cpu()
    ways = ways[:, None] if ways.dim() == 2 else ways
    ax.plot(ways[..., 0].numpy(), ways[..., 1].numpy(), color=color, lw=0.7, alpha=0.6)
    for at, face in ((0, "white"), (-1, color)):
        ax.plot(*ways[at].t().numpy(), "o", ms=4, mec=color, mfc=face, mew=0.8)


def landscape(
    function: Any,
    *,
    bounds: tuple[float, float, float, float] = (-2.0, 2.0, -2.0, 2.0),
    trajectories: Mapping[str, Trajectory | Tensor] | None = None,
    critical: Sequence[CriticalPoint] = (),
    solid: bool = False,
    points: int = 201,
    levels: int = 24,
) -> Figure:
    """A function of two parameters from above, one panel for each way over it.

    Args:
        function: [n, 2] -> [n]; or a `fe.diagnostics.LossPlane`, whose own trajectory is shown where no other is given.
        bounds: (left, right, low, high) of a function.
        trajectories: labels to what `fe.diagnostics.trajectories` gave, or to positions [steps, n, 2] or [steps, 2].
        critical: points to mark, as `fe.diagnostics.critical_points` gives: minima as dots, saddles as crosses, maxima
            as triangles.
        solid: a panel in front with the surface in three dimensions.
        points: of the grid along each side. levels: of the contours.

    Raises:
        TypeError, ValueError: a function that is none, or of another shape.
    """
    surface = _surface(function, bounds, points)
    ways: dict[str, Any] = dict(trajectories or {})
    if not ways:
        ways = {"": getattr(function, "path", None)}
    count = len(ways) + bool(solid)
    figure, axes = panels(1, count, (3.6 * count, 3.6))
    if solid:
        _solid(figure, axes[0, 0], surface)
    for ax, (label, way) in zip(axes[0, bool(solid) :], ways.items(), strict=True):
        contours(ax, surface, levels)
        for point in critical:
            a, b = point.position.tolist()
            ax.plot(a, b, MARKS[point.kind], color="black", ms=5, zorder=4)
        if way is not None:
            paths(ax, way.positions if isinstance(way, Trajectory) else way)
        ax.set_title(label, fontsize=10)
    return figure


def _solid(figure: Figure, ax: Axes, surface: Surface) -> None:
    a, b, values = (each.double().cpu().numpy() for each in surface)
    place = ax.get_subplotspec()
    ax.remove()
    raised: Any = figure.add_subplot(place, projection="3d")
    grid = torch.meshgrid(*(torch.from_numpy(each) for each in (a, b)), indexing="ij")
    raised.plot_surface(*(each.numpy() for each in grid), values, cmap="Blues_r", lw=0, rcount=60, ccount=60)
