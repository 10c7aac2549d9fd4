"""What can be read off a sampler's way: information gained step by step, and the temperature of its positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels._checks import number
from fekernels.diagnostics.langevin_denominator import noise_and_denominator, number_of

__all__ = ["TrajectoryKL", "configurational_temperature"]


def configurational_temperature(weights: Any, gradients: Any) -> Tensor:
    """T of positions that are distributed as exp(-L / T): E[(theta - mean) dL/dtheta] of each weight.

    The virial theorem. It needs no known answer: draws of the right distribution give the T that was asked for, for any
    L, and gradient noise or too large a step a larger one. A single weight's is noisy; the mean over weights is not.

    Args:
        weights: [draws, ...], at least 2, positions of one chain or of several that agree.
        gradients: of the same shape, of the full loss with its prior at these positions, not of a minibatch.

    Returns:
        [...], float64, divided by draws - 1, which is right for independent ones.

    Raises:
        TypeError: not floating point. ValueError: different shapes, or fewer than 2 draws.
    """
    theta, g = torch.as_tensor(weights).detach(), torch.as_tensor(gradients).detach()
    for name, value in (("weights", theta), ("gradients", g)):
        if not value.is_floating_point():
            raise TypeError(f"configurational_temperature: {name} must be floating point; got {value.dtype}")
    if theta.shape != g.shape or theta.dim() < 1 or len(theta) < 2:
        raise ValueError(
            "configurational_temperature: weights must have shape (draws, ...) like gradients, with 2 draws or more; "
            f"got {tuple(theta.shape)} and {tuple(g.shape)}"
        )
    theta = theta.double()
    return ((theta - theta.mean(0)) * g.double()).sum(0) / (len(theta) - 1)


class TrajectoryKL:
    """The KL divergence between the optimizer's consecutive beliefs, step by step: how much it learns, and when.

        kl = fe.diagnostics.TrajectoryKL(optimizer)
        ...                                             # optimizer.step() as ever
        kl.values, kl.total

    A belief is a Gaussian around the present weights. Of variance ``std``^2 it makes |theta' - theta|^2 / (2 std^2) of
    a step; without a ``std``, of precision D / T, LangevinAdam's preconditioner over its temperature, it makes
    sum D (theta' - theta)^2 / (2 T).

    Args:
        optimizer: any torch optimizer with a ``std``; a `fe.LangevinAdam` at T > 0 without.
        std: standard deviation of the belief about every weight, > 0; None takes the optimizer's D and T.

    A copy of the parameters is held during a step. Nothing is read back from a GPU until a value is.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, optimizer: Optimizer, std: float | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"TrajectoryKL: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
            )
        if std is not None:
            std = number("TrajectoryKL", "std", std, above=0.0)
        elif "frozen" not in optimizer.defaults:  # a preconditioner that is known here: LangevinAdam's
            raise TypeError(
                "TrajectoryKL: std must be given for an optimizer without temperature and preconditioner; got None and "
                f"{type(optimizer).__name__}"
            )
        self._std = std
        self._found: list[Tensor] = []
        self._before: dict[Tensor, Tensor] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._remember), optimizer.register_step_post_hook(self._compare)
        ]  # fmt: skip

    def remove(self) -> None:
        """Follow the optimizer no longer; the values stay."""
        for hook in self._hooks:
            hook.remove()

    @property
    def values(self) -> Tensor:
        """[steps], float64 on the CPU, in nats; at T = 0 infinite for a step that moves, 0 for one that does not."""
        return torch.stack([value.cpu() for value in self._found]) if self._found else torch.empty(0).double()

    @property
    def total(self) -> float:
        """The sum over all steps."""
        return float(self.values.sum())

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def _compare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        total: Tensor | None = None
        for group in optimizer.param_groups:
            for p in group["params"]:
                moved = (p.detach() - self._before[p]).double().square()
                found = self._weighted(moved, group, optimizer.state.get(p, {}))
                total = found if total is None else total + found.to(total.device)
        self._before = {}
        if total is not None:
            self._found.append(total)

    def _weighted(self, moved: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> Tensor:
        if self._std is not None:
            return moved.sum() / (2 * self._std**2)
        if "exp_avg_sq" not in state:  # no step was made yet
            return moved.sum()
        denominator = noise_and_denominator(group, state, lambda name: state[name].double())[1]
        energy = (denominator * moved).sum() / 2
        found = energy / number_of(group, "temperature", moved.device)
        return torch.where(energy == 0, energy, found)  # a step that does not move is none, also at T = 0
