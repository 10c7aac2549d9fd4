"""Where the gradient of a function vanishes, found by Newton's method from many starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fekernels._checks import floating, integer, number

__all__ = ["CriticalPoint", "Landscape", "called", "critical_points", "evaluated"]

Landscape = Callable[[Tensor], Tensor]  # points [n, d] to values [n]

MOST = 1 << 20  # starts in all: a Hessian each, 200 MB for 5 parameters
STEPS = 60  # of Newton's method; each doubles the digits once it is close
# Of the largest curvature among all points: an eigenvalue below has no sign that could be trusted.
FLAT = 1e-6


@dataclass(frozen=True)
class CriticalPoint:
    """A point of gradient 0.

    Attributes:
        position: [d], float64. value: of the function there.
        eigenvalues: [d], of the Hessian, rising.
        kind: "minimum", "saddle" or "maximum" by their signs; "degenerate" where one is 0.
    """

    position: Tensor
    value: float
    eigenvalues: Tensor
    kind: str

    def __repr__(self) -> str:
        at = ", ".join(f"{x:.4f}" for x in self.position.tolist())
        return f"CriticalPoint({self.kind} at ({at}), value {self.value:.6g})"


def called(function: str, landscape: Landscape, points: Tensor) -> Tensor:
    """What it gives at points [n, d], a tensor. Where dtypes do not meet the error says which dtype points have."""
    if not callable(landscape):
        raise TypeError(
            f"{function}: function must be callable, [n, d] -> [n]; got {type(landscape).__name__}"
        )
    try:
        values = landscape(points)
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        dtype = str(points.dtype)[6:]
        raise TypeError(
            f"{function}: function must take points of {dtype}, as a module does after .to(torch.{dtype}); got: {error}"
        ) from error
    if not isinstance(values, Tensor):
        raise TypeError(f"{function}: the result of function must be a tensor; got {type(values).__name__}")
    return values


def evaluated(function: str, landscape: Landscape, points: Tensor) -> Tensor:
    """The values [n] at points [n, d], checked."""
    values = floating(function, "the result of function", called(function, landscape, points))
    count, d = points.shape
    if values.shape == (count,) and count == d:  # [d] may be of the coordinates: one point more tells
        points = torch.cat([points, points[:1]])
        came = called(function, landscape, points)
    else:
        came = values
    if came.shape != points.shape[:1]:
        raise ValueError(
            f"{function}: function must map points [n, d] to [n], here {tuple(points.shape)} to ({len(points)},); got "
            f"{tuple(came.shape)}"
        )
    return values


def critical_points(
    function: Landscape,
    bounds: tuple[float, ...] = (-2.0, 2.0, -2.0, 2.0),
    *,
    starts: int = 21,
    tolerance: float = 1e-9,
) -> list[CriticalPoint]:
    """Minima, saddles and maxima of a smooth function within bounds, from the lowest value to the highest.

    Newton's method on the gradient, in float64, from a grid: the sign of the Hessian's eigenvalues says which kind a
    point is. What no start leads to is missed; a finer grid finds more.

    Args:
        function: points [n, d] to values [n], twice differentiable, in float64: a Module after ``.double()``.
        bounds: (low, high) of each coordinate in turn; d is half of their number.
        starts: grid points along each coordinate, >= 2; starts^d, the points in all, at most 2^20.
        tolerance: largest length of the gradient over the largest curvature; points closer than its root are one.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    name = "critical_points"
    edges = [number(name, f"bounds[{k}]", each, least=-float("inf")) for k, each in enumerate(bounds)]
    if (
        not edges
        or len(edges) % 2
        or any(low >= high for low, high in zip(edges[::2], edges[1::2], strict=True))
    ):
        raise ValueError(
            f"{name}: bounds must be (low, high) of each coordinate, low < high; got {tuple(bounds)}"
        )
    starts = integer(name, "starts", starts, 2, 1 << 16)
    if starts ** (d := len(edges) // 2) > MOST:
        raise ValueError(
            f"{name}: starts^d, the grid's points, must be at most {MOST}; got starts = {starts} and d = {d}"
        )
    tolerance = number(name, "tolerance", tolerance, above=0.0)
    low, high = (torch.tensor(side, dtype=torch.float64) for side in (edges[::2], edges[1::2]))
    axes = [torch.linspace(a, b, starts, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    x = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    evaluated(name, function, x[:2])

    def one(point: Tensor) -> Tensor:
        return function(point[None])[0]

    gradient = torch.func.vmap(torch.func.grad(one))
    hessian = torch.func.vmap(torch.func.hessian(one))
    size = (high - low).max()
    for _ in range(STEPS):
        step = torch.linalg.lstsq(hessian(x), gradient(x)[..., None], driver="gelsd").solution[..., 0]
        length = step.norm(dim=1, keepdim=True)
        # From where the Hessian is near singular a whole step would leave the region.
        x = x - step * (0.2 * size / length).clamp_max(1.0)
        x = x[
            ((x >= low - size) & (x <= high + size)).all(1)
        ]  # what went away, or is NaN, will not come back
        if not len(x) or not bool((length > 1e-14 * size).any()):
            break
    if not len(x):
        return []
    curvature = torch.linalg.eigvalsh(hessian(x).nan_to_num(0.0))
    scale = curvature.abs().amax()
    slack = tolerance**0.5 * size
    inside = ((x >= low - slack) & (x <= high + slack)).all(1)
    still = gradient(x).norm(dim=1) <= tolerance * scale  # never where it is NaN
    found: list[CriticalPoint] = []
    values = function(x).detach()
    for k in (inside & still).nonzero().flatten().tolist():
        if all(float((x[k] - other.position).norm()) > float(slack) for other in found):
            found.append(
                CriticalPoint(x[k].detach(), float(values[k]), curvature[k], _kind(curvature[k], scale))
            )
    return sorted(found, key=lambda point: (round(point.value, 9), point.position.tolist()))


def _kind(eigenvalues: Tensor, scale: Tensor) -> str:
    if bool((eigenvalues.abs() <= FLAT * scale).any()):
        return "degenerate"
    positive = int((eigenvalues > 0).sum())
    return "minimum" if positive == len(eigenvalues) else "saddle" if positive else "maximum"
