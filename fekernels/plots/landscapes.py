"""Functions of two parameters, the loss of a model in a plane among them, and trajectories over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fekernels._checks import dense, integer, number
from fekernels.diagnostics import CriticalPoint, LossPlane, Trajectory
from fekernels.diagnostics.critical_points import called
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
    left, right, low, high = _sides(bounds)
    a = torch.linspace(left, right, points, dtype=torch.float64)
    b = torch.linspace(low, high, points, dtype=torch.float64)
    with torch.no_grad():
        values = called("landscape", function, torch.cartesian_prod(a, b))
    if values.shape != (points**2,):
        raise ValueError(
            f"landscape: function must map [n, 2] to [n], here n = {points**2}; got {tuple(values.shape)}"
        )
    return a, b, values.detach().view(points, points)


def _sides(bounds: Any) -> tuple[float, float, float, float]:
    expected = "landscape: bounds must be (left, right, low, high), left < right and low < high"
    if not isinstance(bounds, (Sequence, Tensor)) or len(bounds) != 4:
        raise ValueError(f"{expected}; got {bounds!r}")
    left, right, low, high = (
        number("landscape", f"bounds[{k}]", each, least=-float("inf"))
        for k, each in enumerate(bounds.tolist() if isinstance(bounds, Tensor) else bounds)
    )
    if left >= right or low >= high:
        raise ValueError(f"{expected}; got {(left, right, low, high)}")
    return left, right, low, high


def _finite(function: str, argument: str, values: Tensor) -> Tensor:
    """Those that are, of which there must be one."""
    finite = values[values.isfinite()]
    if not finite.numel():
        raise ValueError(
            f"{function}: {argument} must be finite somewhere; got {values.numel()} NaN or infinite values"
        )
    return finite


def _positions(function: str, argument: str, path: Any) -> Tensor:
    """[steps, n, 2]."""
    positions = dense(function, argument, path).detach().double().cpu()
    if positions.dim() not in (2, 3) or positions.shape[-1] != 2 or not len(positions):
        raise ValueError(
            f"{function}: {argument} must have shape (steps, n, 2) or (steps, 2); got {tuple(positions.shape)}"
        )
    return positions[:, None] if positions.dim() == 2 else positions


def contours(ax: Axes, surface: Surface, levels: int = 24) -> None:
    """Lines and colours of equal values, as much area between any two as between others.

    Args:
        surface: a [n], b [m] and values [n, m].
        levels: how many. Values that are not finite leave holes.

    Raises:
        ValueError: no value is finite.
    """
    a, b, values = (each.double().cpu() for each in surface)
    finite = _finite("contours", "the values of surface", values)
    at = torch.quantile(finite, torch.linspace(0, 1, levels, dtype=torch.float64)).unique().tolist()
    if len(at) > 1:
        z = values.t().numpy()
        ax.contourf(a.numpy(), b.numpy(), z, levels=at, cmap="Blues_r", alpha=0.8)
        ax.contour(a.numpy(), b.numpy(), z, levels=at, colors="white", linewidths=0.4)
    ax.set(xlim=(float(a[0]), float(a[-1])), ylim=(float(b[0]), float(b[-1])))


def paths(ax: Axes, positions: Tensor, color: str = PATH) -> None:
    """The paths of n points: lines from open dots to full ones.

    Args:
        positions: [steps, n, 2], or [steps, 2] of one.

    Raises:
        TypeError, ValueError: positions are no tensor of that shape.
    """
    points = _positions("paths", "positions", positions)
    ax.plot(points[..., 0].numpy(), points[..., 1].numpy(), color=color, lw=0.7, alpha=0.6)
    for at, face in ((0, "white"), (-1, color)):
        ax.plot(*points[at].t().numpy(), "o", ms=4, mec=color, mfc=face, mew=0.8)


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
    """A function of two parameters from above, one panel for each trajectory over it.

    Args:
        function: [n, 2] -> [n] in float64, a Module after ``.double()``; or a `fe.diagnostics.LossPlane`, whose own
            trajectory is shown where no other is given.
        bounds: (left, right, low, high) of a function.
        trajectories: labels to what `fe.diagnostics.trajectories` gave, or to positions [steps, n, 2] or [steps, 2].
        critical: points to mark, as `fe.diagnostics.critical_points` gives: minima as dots, saddles as crosses, maxima
            as triangles.
        solid: a panel in front with the surface in three dimensions.
        points: of the grid along each side. levels: of the contours.

    Raises:
        TypeError, ValueError: naming the argument; a function that is none, of another shape or dtype, or finite
            nowhere.
    """
    points, levels = integer("landscape", "points", points, 2), integer("landscape", "levels", levels, 1)
    surface = _surface(function, bounds, points)
    _finite("landscape", "the values of function", surface[2])
    if trajectories is not None and not isinstance(trajectories, Mapping):
        raise TypeError(
            "landscape: trajectories must be a mapping from labels to trajectories or positions; got"
            f" {type(trajectories).__name__}"
        )
    given = {
        label: _positions(
            "landscape", f"trajectories[{label!r}]", path.positions if isinstance(path, Trajectory) else path
        )
        for label, path in (trajectories or {}).items()
    }
    for k, point in enumerate(critical):
        if point.position.shape != (2,):
            raise ValueError(
                f"landscape: critical[{k}] must be a point of two parameters; got {tuple(point.position.shape)}"
            )
    shown: dict[str, Any] = dict(given) or {"": getattr(function, "path", None)}
    count = len(shown) + bool(solid)
    figure, axes = panels(1, count, (3.6 * count, 3.6))
    if solid:
        _solid(figure, axes[0, 0], surface)
    for ax, (label, path) in zip(axes[0, bool(solid) :], shown.items(), strict=True):
        contours(ax, surface, levels)
        for point in critical:
            a, b = point.position.tolist()
            ax.plot(a, b, MARKS[point.kind], color="black", ms=5, zorder=4)
        if path is not None:
            paths(ax, path)
        ax.set_title(label, fontsize=10)
    return figure


def _solid(figure: Figure, ax: Axes, surface: Surface) -> None:
    a, b, values = (each.double().cpu().numpy() for each in surface)
    spec = ax.get_subplotspec()
    ax.remove()
    raised: Any = figure.add_subplot(spec, projection="3d")
    grid = torch.meshgrid(*(torch.from_numpy(each) for each in (a, b)), indexing="ij")
    raised.plot_surface(*(each.numpy() for each in grid), values, cmap="Blues_r", lw=0, rcount=60, ccount=60)
