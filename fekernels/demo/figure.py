"""The demo's figure: calibration, entropy on shifted digits, and how the sampler ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fekernels import plots
from fekernels.demo import report
from fekernels.diagnostics import calibration
from fekernels.diagnostics.chain_statistics import unjudged_statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

COLORS = {
    report.ADAM: "#b5523b",
    report.ENSEMBLE: "#2c8c6b",
    report.LANGEVIN: "#1f5a93",
    report.BAYES: "#7fa8d1",
}
SHIFTS = {"clean": "#444444", "rotated": "#d08c2e", "noisy": "#2c8c6b", "occluded": "#8854a8"}
MOST_NATS = 2.31  # log 10, of ten digits


def draw(results: Sequence[report.SeedResult]) -> Figure:
    """Six panels, the first four over all splits, the last two of the first split's sampler."""
    figure, axes = plots.panels(2, 3, (14, 8.2))
    _reliability(axes[0, 0], results)
    _entropies(axes[0, 1], results, report.ADAM)
    _entropies(axes[0, 2], results, report.LANGEVIN)
    axes[0, 2].sharey(axes[0, 1])
    _losses_by_split(axes[1, 0], results)
    run = results[0].reports[report.LANGEVIN]
    plots.trace(axes[1, 1], run.losses, "training loss of the samples")
    axes[1, 1].set_title("First split: the sampler's chains")
    worst = int(unjudged_statistics(run.trace).rhat.nan_to_num(0.0).argmax())
    plots.posterior(axes[1, 2], run.trace[..., worst], run.names[worst])
    axes[1, 2].set_title(f"First split: the weight with the largest R-hat, {run.rhat_max:.2f}")
    return figure


def _reliability(ax: Axes, results: Sequence[report.SeedResult]) -> None:
    ax.plot([0, 1], [0, 1], color=plots.GREY, lw=1, ls="--")
    for name, color in COLORS.items():
        outcomes = [result.outcomes[name] for result in results]
        for kind in ("clean", "shifted"):
            answers = [getattr(outcome, kind) for outcome in outcomes]
            bins = calibration(
                torch.cat([probabilities for probabilities, _ in answers]),
                torch.cat([labels for _, labels in answers]),
                bins=10,
            )
            plots.reliability(ax, bins, color, report.TITLES[name] if kind == "clean" else "")
    ax.set(
        xlim=(0.1, 1.02),
        ylim=(0.1, 1.27),
        yticks=[0.2, 0.4, 0.6, 0.8, 1.0],
        xlabel="confidence",
        ylabel="share that is right",
    )
    ax.set_title("Reliability (dotted: shifted digits), all splits")
    ax.legend(frameon=False, fontsize=9, loc="upper left")


def _entropies(ax: Axes, results: Sequence[report.SeedResult], name: str) -> None:
    pooled = {
        kind: torch.cat([result.outcomes[name].entropies[kind] for result in results]) for kind in SHIFTS
    }
    plots.entropies(ax, pooled, SHIFTS, MOST_NATS)
    ax.set_title(f"Entropy: {report.TITLES[name]}")


def _losses_by_split(ax: Axes, results: Sequence[report.SeedResult]) -> None:
    names = list(report.TITLES)
    for result in results:
        losses = [result.outcomes[name].scores["NLL"] for name in names]
        ax.plot(names, losses, "-", color=plots.GREY, lw=1, zorder=1)
        colors = [COLORS.get(name, plots.GREY) for name in names]
        ax.scatter(names, losses, c=colors, s=36, zorder=2)
    ax.set(ylabel="test negative log-likelihood", xlim=(-0.4, len(names) - 0.6))
    ax.set_title("Each split, joined by a line (lower is better)")
