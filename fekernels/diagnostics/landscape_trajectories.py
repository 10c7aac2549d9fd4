"""The ways that optimizers and particles take over a function of few parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels._checks import boolean, floating, integer, number
from fekernels.diagnostics.critical_points import Landscape, evaluated
from fekernels.diagnostics.trajectory import TrajectoryKL
from fekernels.ops.noise_key import signed_seed
from fekernels.optim import LangevinAdam
from fekernels.stein import SVGD

__all__ = ["METHODS", "Trajectory", "trajectories"]

Factory = Callable[[list[Tensor]], Optimizer]
METHODS = ("Adam", "LangevinAdam", "SVGD")


@dataclass(frozen=True)
class Trajectory:
    """Where n points went.

    Attributes:
        positions: [steps + 1, n, d], the starts in front. values: [steps + 1, n], of the function there.
        kl: [steps], float64, in nats: KL between the Gaussians about consecutive positions of all points together, of
            the standard deviation that was asked for, or else LangevinAdam's precision D / T (`TrajectoryKL`).
            None where neither is known.
    """

    positions: Tensor
    values: Tensor
    kl: Tensor | None


def trajectories(
    function: Landscape,
    start: Tensor,
    methods: Sequence[str] | Mapping[str, str | Factory] = METHODS,
    *,
    steps: int = 300,
    lr: float = 0.05,
    temperature: float = 0.1,
    std: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Trajectory]:
    """Adam, LangevinAdam and SVGD from the same points over the same function.

    Args:
        function: points [n, d] to values [n], each of its own point alone, differentiable: a loss, an energy.
        start: [n, d], floating point. Each point is a run of its own; of SVGD they are the particles of one.
        methods: names, or a mapping from a label to a name or to a factory of an optimizer, [tensor] -> optimizer:

            * "Adam": `fe.LangevinAdam` at T = 0, which is Adam.
            * "LangevinAdam": at ``temperature``, so that late positions follow exp(-function / T), but for what an
              adapting preconditioner adds (`fe.LangevinAdam.freeze_preconditioner`).
            * "SVGD": `fe.SVGD` of the density exp(-function / T), with Adam.
        steps: at least 1.
        lr: of all of them.
        temperature: above 0.
        std: of the Gaussian about every position whose KL is told; see `Trajectory`.
        seed: of LangevinAdam's noise. progress: a tqdm bar.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    name = "trajectories"
    start = floating(name, "start", start).detach()
    if start.dim() != 2 or not start.numel():
        raise ValueError(f"{name}: start must have shape (n, d), not empty; got {tuple(start.shape)}")
    steps, seed = integer(name, "steps", steps, 1, 1 << 32), signed_seed(name, seed)
    lr, temperature = number(name, "lr", lr, above=0.0), number(name, "temperature", temperature, above=0.0)
    if std is not None:
        std = number(name, "std", std, above=0.0)
    named: dict[str, str | Factory] = (
        dict(methods) if isinstance(methods, Mapping) else {m: m for m in methods}
    )
    for label, method in named.items():
        if not callable(method) and method not in METHODS:
            raise ValueError(
                f"{name}: methods must be of {', '.join(METHODS)}, or factories of optimizers; got {method!r} for "
                f"{label!r}"
            )
    evaluated(name, function, start)
    from tqdm import tqdm

    found: dict[str, Trajectory] = {}
    with tqdm(total=steps * len(named), desc=name, disable=not boolean(name, "progress", progress)) as bar:
        for label, method in named.items():
            if method == "SVGD":
                x, step, optimizer = _particles(function, start, lr, temperature, seed)
            else:
                x, step, optimizer = _points(function, start, method, lr, temperature, seed)
            known = std is not None or method == "LangevinAdam"
            kl = TrajectoryKL(optimizer, std) if known else None
            positions = [x.detach().clone()]
            for _ in range(steps):
                step()
                positions.append(x.detach().clone())
                bar.update()
            stacked = torch.stack(positions)
            with torch.no_grad():
                values = function(stacked.flatten(0, 1)).view(stacked.shape[:2])
            found[label] = Trajectory(stacked, values, None if kl is None else kl.values)
    return found


Run = tuple[Tensor, Callable[[], None], Optimizer]


def _particles(function: Landscape, start: Tensor, lr: float, temperature: float, seed: int) -> Run:
    sampler = SVGD(lambda x: -function(x) / temperature, start, batched=True, lr=lr, seed=seed)
    return sampler.particles, sampler.step, sampler.optimizer


def _points(
    function: Landscape, start: Tensor, method: str | Factory, lr: float, temperature: float, seed: int
) -> Run:
    x = start.clone().requires_grad_()
    if callable(method):
        optimizer = method([x])
    else:
        # A Gaussian prior of precision 0 is no prior: eps keeps the noise finite where the gradient is 0 at first.
        hot = temperature if method == "LangevinAdam" else 0.0
        optimizer = LangevinAdam([x], lr, temperature=hot, eps=1e-3 if hot else 1e-8, seed=seed)

    def step() -> None:
        optimizer.zero_grad()
        function(x).sum().backward()
        optimizer.step()

    return x, step, optimizer
