"""A model's loss in the plane of two directions of its weights, and a training run projected on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fekernels import random
from fekernels._checks import boolean, integer, number, one_of
from fekernels._runtime.parts import drop_copies
from fekernels.ops.noise_key import signed_seed

__all__ = ["LossPlane", "loss_plane"]

KINDS = ("random", "trajectory")


@dataclass(frozen=True)
class LossPlane:
    """The loss at centre + a u + b v.

    Attributes:
        axes: (a [n], b [n]), float64. values: [n, n], float64, [i, j] at a[i], b[j].
        centre: [weights], the weights in the middle. directions: [2, weights], u and v.
        path: [steps, 2], the trajectory projected on the plane; None without one.
        explained: share of the trajectory's squared distance from the centre that lies in the plane; None without one.
    """

    axes: tuple[Tensor, Tensor]
    values: Tensor
    centre: Tensor
    directions: Tensor
    path: Tensor | None = None
    explained: float | None = None

    def project(self, weights: Tensor) -> Tensor:
        """[..., weights] to their (a, b) [..., 2]: the nearest point of the plane."""
        away = (weights.to(self.directions) - self.centre).unsqueeze(-1)
        return torch.linalg.lstsq(
            self.directions.t().expand(*away.shape[:-2], -1, -1), away
        ).solution.squeeze(-1)


def loss_plane(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    directions: str = "random",
    trajectory: Sequence[Tensor] | Tensor | None = None,
    span: float | None = None,
    points: int = 31,
    seed: int = 0,
    progress: bool = False,
) -> LossPlane:
    """The loss around a model's weights along two directions (Li et al. 2018, arXiv:1712.09913).

    Args:
        model: its weights are the centre; they are the same afterwards.
        loss_fn: (model, batch) -> scalar loss, as of `fe.sample_posterior`. Evaluated points^2 times, without
            gradients, with the model in evaluation mode (batch normalisation by its running statistics).
        directions: "random", Gaussian and **filter-normalised**: every filter (row of a weight) of a direction has the
            length of the model's, so that pictures of different models compare; biases and norms do not move. Or
            "trajectory", the two principal directions of the trajectory about the centre: random ones are nearly at
            right angles to any path in many dimensions, and show it as a point.
        trajectory: [steps, weights] or a sequence of vectors (`torch.nn.utils.parameters_to_vector`), drawn on it.
        span: a and b go from -span to span; None is 1 for random directions (weights as far away as they are long), and
            the whole trajectory with a margin for its own.
        points: along each side, odd to have the centre among them.
        seed: of random directions (`fe.random`). progress: a tqdm bar.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    name = "loss_plane"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module; got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"{name}: loss_fn must be callable; got {type(loss_fn).__name__}")
    kind = one_of(name, "directions", directions, KINDS)
    points, seed = integer(name, "points", points, 2, 1 << 12), signed_seed(name, seed)
    if span is not None:
        span = number(name, "span", span, above=0.0)
    parameters = list(model.parameters())
    centre = _vector(parameters)
    path = None if trajectory is None else _path(name, trajectory, centre)
    if kind == "trajectory":
        if path is None:
            raise ValueError(f"{name}: trajectory must be given for directions='trajectory'; got None")
        both = torch.linalg.svd(path - centre, full_matrices=False).Vh[:2]
        if len(both) < 2:
            raise ValueError(
                f"{name}: trajectory must have 2 steps or more for directions='trajectory'; got 1"
            )
    else:
        both = torch.stack([_filter_normalised(parameters, seed, stream) for stream in (0, 1)])
    plane = LossPlane((centre, centre), centre, centre, both)
    projected = explained = None
    if path is not None:
        projected = plane.project(path)
        away = (path - centre).square().sum()
        explained = float((projected @ both).square().sum() / away) if away > 0 else 1.0
    if span is None:
        span = 1.2 * float(projected.abs().max()) if kind == "trajectory" and projected is not None else 1.0
    side = torch.linspace(-span, span, points, dtype=torch.float64)
    values = _values(
        model, loss_fn, batch, parameters, centre, both, side, boolean(name, "progress", progress)
    )
    return LossPlane((side, side), values, centre, both, projected, explained)


def _vector(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten().double().cpu() for p in parameters])


def _path(function: str, trajectory: Any, centre: Tensor) -> Tensor:
    rows = [torch.as_tensor(row).detach().double().cpu() for row in trajectory]
    wrong = [tuple(row.shape) for row in rows if row.shape != centre.shape]
    if not rows or wrong:
        came = wrong[0] if wrong else "no step"
        raise ValueError(f"{function}: trajectory must hold vectors of {len(centre)} weights; got {came}")
    return torch.stack(rows)


def _filter_normalised(parameters: Sequence[Tensor], seed: int, stream: int) -> Tensor:
    parts, offset = [], 0
    for p in parameters:
        noise = random.normal(p.shape, seed=seed, stream=stream, offset=offset).double()
        offset += p.numel()
        w = p.detach().double().cpu()
        if p.dim() < 2:
            parts.append(torch.zeros_like(w).flatten())
            continue
        lengths = (w.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)).view(-1, *[1] * (p.dim() - 1))
        parts.append((noise * lengths).flatten())
    found = torch.cat(parts)
    if not bool(found.any()):
        raise ValueError(
            "loss_plane: model must have a weight of two dimensions or more that is not 0; got none"
        )
    return found


def _scalar(loss: Any) -> float:
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"loss_plane: loss_fn must give a scalar, the mean of its rows for instance; got shape {tuple(loss.shape)}"
        )
    if not isinstance(loss, (Tensor, Real)):
        raise TypeError(
            f"loss_plane: loss_fn must give a scalar tensor or a number; got {type(loss).__name__}"
        )
    return float(loss)


@torch.no_grad()
def _values(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    parameters: Sequence[Tensor],
    centre: Tensor,
    both: Tensor,
    side: Tensor,
    progress: bool,
) -> Tensor:
    from tqdm import tqdm

    kept = [p.detach().clone() for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    values = torch.empty(len(side), len(side), dtype=torch.float64)
    model.eval()
    try:
        for i, j in tqdm(
            [(i, j) for i in range(len(side)) for j in range(len(side))],
            desc="loss_plane",
            disable=not progress,
        ):
            moved = centre + side[i] * both[0] + side[j] * both[1]
            for p, part in zip(parameters, moved.split([p.numel() for p in parameters]), strict=True):
                p.copy_(part.view(p.shape))
            drop_copies(parameters)
            values[i, j] = _scalar(loss_fn(model, batch))
    finally:
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
        drop_copies(parameters)
        for module, training in modes:
            module.training = training
    return values
