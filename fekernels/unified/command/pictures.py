"""The panels of the page that ``python -m fekernels unified`` draws; each takes its axes and what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fekernels import plots
from fekernels.diagnostics import CriticalPoint, trajectories

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "coverage",
    "energies",
    "grid",
    "kl_by_step",
    "landscape",
    "lattice",
    "norms",
    "speed",
    "weights",
    "work",
]

BLUE, RED, GREEN = "#1f5a93", "#b5523b", "#2c8c6b"


def energies(ax: Axes, history: Sequence[Sequence[float]]) -> None:
    """[epochs, 3]: free energy, energy and minus the entropy of test digits."""
    values = torch.tensor(history).numpy()
    epochs = range(1, len(values) + 1)
    ax.plot(epochs, values[:, 0], color=BLUE, label="free energy")
    ax.plot(epochs, values[:, 1], color=RED, label="energy")
    ax.plot(epochs, values[:, 1] - values[:, 0], color=GREEN, label="T x entropy")
    ax.set(xlabel="epoch", ylabel="nats a digit")
    ax.set_title("Free energy = energy - T entropy")
    ax.legend(frameon=False, fontsize=8)


def norms(ax: Axes, norms: Sequence[Sequence[float]]) -> None:
    """[steps, layers]: sizes of the error messages."""
    for layer, values in enumerate(zip(*norms, strict=True)):
        ax.semilogy(values, lw=1, label=f"layer {layer + 1}")
    ax.set(xlabel="step", ylabel="norm of the error message")
    ax.set_title("Messages sent back")
    ax.legend(frameon=False, fontsize=8)


def kl_by_step(ax: Axes, values: Sequence[float]) -> None:
    """Nats that each step of gradient descent moves its belief by."""
    ax.semilogy(range(1, len(values) + 1), values, color=BLUE)
    ax.set(xlabel="step", ylabel="KL to the belief before, nats")
    ax.set_title("Gradient descent: what each step learns")


def weights(ax: Axes, exact: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
    """Means and deviations of the regression's weights."""
    at = torch.arange(len(exact[0])).numpy()
    for shift, (mean, std), color, label in (
        (-0.1, exact, plots.GREY, "exact"),
        (0.1, found, BLUE, "BayesianOptimizer"),
    ):
        ax.errorbar(at + shift, mean.numpy(), std.numpy(), fmt="o", ms=4, color=color, label=label)
    ax.set(xlabel="column of the diabetes data", ylabel="weight and its deviation")
    ax.set_title("Bayesian regression")
    ax.legend(frameon=False, fontsize=8)


def work(ax: Axes, work: Tensor, free_energy: float) -> None:
    """The work that it took to turn the prior into the posterior, particle by particle."""
    ax.hist(work.numpy(), bins=40, color=BLUE, alpha=0.6)
    ax.axvline(free_energy, color=RED, label="-log evidence, exact")
    ax.axvline(work.mean().item(), color=plots.GREY, ls="--", label="mean work")
    ax.set(xlabel="work, nats", ylabel="particles")
    ax.set_title("Jarzynski: from prior to posterior")
    ax.legend(frameon=False, fontsize=8)


def speed(ax: Axes, found: Mapping[str, float]) -> None:
    """Seconds of both training loops."""
    ax.bar(
        ["torch.optim.Adam", "UnifiedOptimizer"],
        [found["adam_seconds"], found["unified_seconds"]],
        color=[RED, BLUE],
    )
    ax.set(ylabel="seconds, forward and backward included")
    ax.set_title("The document's benchmark")


def grid(ax: Axes, images: Tensor) -> None:
    """[32, 64]: pictures of 8 x 8, in four rows."""
    page = images.reshape(4, 8, 8, 8).transpose(1, 2).reshape(32, 64)
    ax.imshow(page.numpy(), cmap="gray_r", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title("Drawn by the Boltzmann machine")


def lattice(ax: Axes, temperatures: Tensor, bethe: Tensor, onsager: Tensor) -> None:
    """Free energies a spin, in units of the temperature."""
    ax.plot(temperatures.numpy(), (temperatures * onsager).numpy(), color=plots.GREY, label="Onsager, exact")
    ax.plot(
        temperatures.numpy(),
        (temperatures * bethe).numpy(),
        color=BLUE,
        ls="--",
        label="belief propagation (Bethe)",
    )
    ax.axvline(
        2 / torch.log(torch.tensor(1 + 2**0.5)).item(), color=RED, lw=1, ls=":", label="critical temperature"
    )
    ax.set(xlabel="temperature", ylabel="free energy a spin")
    ax.set_title("Ising's square lattice")
    ax.legend(frameon=False, fontsize=8)


def coverage(ax: Axes, sure: Tensor, right: Tensor) -> None:
    """Share of wrong answers among those of which the model is surest."""
    order = sure.argsort(descending=True)
    wrong = (~right[order]).double().cumsum(0) / torch.arange(1, len(order) + 1)
    share = torch.arange(1, len(order) + 1) / len(order)
    ax.plot(share[9:].numpy(), wrong[9:].numpy(), color=BLUE)
    ax.set(xlabel="share of the queries answered, surest first", ylabel="wrong among them", ylim=(0, None))
    ax.set_title("Which lower half belongs to the upper one")


def landscape(
    ax: Axes, surface: Callable[[Tensor], Tensor], points: Sequence[CriticalPoint], seed: int
) -> None:
    """The document's surface, its critical points, and eight draws at T > 0 on their way over it."""
    a = torch.linspace(-2, 2, 201, dtype=torch.float64)
    plots.contours(ax, (a, a, surface(torch.cartesian_prod(a, a)).reshape(201, 201)))
    start = 0.1 * torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
    trajectory = trajectories(surface, start, ["LangevinAdam"], steps=200, temperature=0.05, seed=seed)[
        "LangevinAdam"
    ]
    plots.paths(ax, trajectory.positions, RED)
    for point in points:
        ax.plot(
            *point.position.tolist(),
            {"minimum": "o", "saddle": "X", "maximum": "^"}[point.kind],
            color="black",
        )
    ax.set_title("F = (a\u00b2 + b\u00b2 - 2)\u00b2 + (a + b)\u00b2 / 10, T = 0.05")
