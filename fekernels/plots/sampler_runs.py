"""Runs of samplers: losses, weights, traces and densities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fekernels.diagnostics.chain_statistics import unjudged_statistics
from fekernels.plots.panels import GREY, panels

__all__ = ["learning_coefficient", "posterior", "posterior_run", "trace", "trajectory", "training"]


def training(
    ax: Axes,
    loss: Sequence[float],
    lr: Sequence[float],
    sampling: Sequence[bool],
    collected: Sequence[int],
    color: str,
) -> None:
    """Loss (smoothed) and learning rate of a sampler over its steps.

    Args:
        loss, lr, sampling: a value per step; where ``sampling`` is true, T > 0, the background says so.
        collected: the steps at which a sample was kept.
    """
    losses = torch.tensor(loss, dtype=torch.float64)
    width = max(len(losses) // 150, 1)
    smooth = losses[: len(losses) // width * width].view(-1, width).mean(1)
    ax.plot((torch.arange(len(smooth)) + 0.5) * width, smooth, color=color, lw=1.3)
    kept = [smooth[min(step // width, len(smooth) - 1)] for step in collected]
    ax.plot(collected, kept, ".", color="black", ms=4, label="sample kept")
    edges = [k for k in range(1, len(losses)) if sampling[k] != sampling[k - 1]] + [len(losses)]
    for start, end in zip(edges[0::2], edges[1::2], strict=False):
        ax.axvspan(start, end, color="#f3dfb6", alpha=0.8, lw=0, label="T > 0" if start == edges[0] else None)
    ax.set(
        yscale="log", xlabel="step", ylabel=f"training loss, mean of {width} batches", xlim=(0, len(losses))
    )
    rate = ax.twinx()
    rate.plot(lr, color=GREY, lw=1, ls=":")
    rate.set_ylim(0, 4 * max(lr))  # keeps it in the lower quarter, under the loss
    rate.set_yticks([0, max(lr)])
    rate.set_ylabel("lr (dotted)", loc="bottom", color=GREY)
    rate.spines["top"].set_visible(False)
    ax.spines["right"].set_visible(True)
    ax.legend(fontsize=9, loc="upper right", ncols=2)


def trajectory(ax: Axes, weights: Sequence[Tensor], steps: Sequence[int], sampling: Sequence[bool]) -> None:
    """A run's weights in their two principal directions, coloured by the step where the run samples.

    Args:
        weights: vectors of equal length, one per recorded step.
        steps, sampling: of each vector, when it was recorded and whether T > 0 then.
    """
    stacked = torch.stack(list(weights)).double()
    left, scale, _ = torch.linalg.svd(stacked - stacked.mean(0), full_matrices=False)
    x, y = (left[:, :2] * scale[:2]).T
    share = (scale[:2] ** 2 / (scale**2).sum()).tolist()
    hot = torch.tensor(sampling)
    ax.plot(x, y, color=GREY, lw=0.7, alpha=0.7, zorder=1)
    ax.scatter(x[~hot], y[~hot], s=10, facecolors="none", edgecolors=GREY, lw=0.7, label="T = 0", zorder=2)
    at = torch.tensor(steps)[hot]
    dots = ax.scatter(x[hot], y[hot], s=16, c=at, cmap="viridis", label="T > 0", zorder=3)
    ax.figure.colorbar(dots, ax=ax, label="step", pad=0.01)
    ax.set(xlabel=f"first direction ({share[0]:.0%})", ylabel=f"second direction ({share[1]:.0%})")
    ax.legend(frameon=False, fontsize=9)


def trace(ax: Axes, draws: Tensor, label: str = "") -> None:
    """The course of one number, chain by chain.

    Args:
        draws: [chains, draws].
        label: of the vertical axis.
    """
    for k, chain in enumerate(draws.tolist()):
        ax.plot(chain, color=f"C{k % 10}", lw=0.6, alpha=0.8)
    ax.set(xlabel="draw", ylabel=label, xlim=(0, draws.shape[1]))


def posterior(ax: Axes, draws: Tensor, label: str = "") -> None:
    """Densities of one number, a line per chain over that of all.

    Args:
        draws: [chains, draws].
        label: of the horizontal axis.
    """
    finite = draws[draws.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    bins = torch.linspace(low, high if high > low else low + 1e-12, 31).tolist()
    ax.hist(finite.tolist(), bins, density=True, color=GREY, alpha=0.3)
    for k, chain in enumerate(draws.tolist()):
        ax.hist(chain, bins, density=True, histtype="step", color=f"C{k % 10}", lw=1)
    ax.set(xlabel=label, ylabel="density", yticks=[])


def posterior_run(draws: Tensor, losses: Tensor, names: Sequence[str], most: int = 4) -> Figure:
    """Trace and density of the weights with the largest R-hat, and of the loss.

    Args:
        draws: [chains, draws, weights].
        losses: [chains, samples].
        names: of the weights.
        most: how many weights are shown.
    """
    order = unjudged_statistics(draws).rhat.nan_to_num(0.0).argsort(descending=True)[:most].tolist()
    figure, axes = panels(len(order) + 1, 2, (9, 1.9 * (len(order) + 1)))
    for row, at in enumerate(order):
        trace(axes[row, 0], draws[..., at], names[at])
        posterior(axes[row, 1], draws[..., at], names[at])
    trace(axes[-1, 0], losses, "loss")
    posterior(axes[-1, 1], losses, "loss")
    return figure


def learning_coefficient(draws: Tensor, initial: float, n_beta: float, mean: float) -> Figure:
    """The course of the loss, and n_beta times how far its mean so far is above ``initial``, chain by chain.

    Args:
        draws: [chains, draws] losses.
        initial: the loss that they are compared with.
        n_beta: inverse temperature.
        mean: the estimate of all chains.
    """
    figure, axes = panels(1, 2, (9, 3.2))
    trace(axes[0, 0], draws, "loss")
    axes[0, 0].axhline(initial, color="black", lw=1, ls="--", label="at the model's weights")
    count = torch.arange(1, draws.shape[1] + 1, dtype=torch.float64)
    trace(
        axes[0, 1], n_beta * ((draws.double() - initial).cumsum(1) / count), "estimate from the draws so far"
    )
    axes[0, 1].axhline(mean, color="black", lw=1, label=f"all chains: {mean:.3g}")
    for ax in axes[0]:
        ax.legend(frameon=False, fontsize=9)
    return figure
