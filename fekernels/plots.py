"""Figures. matplotlib is imported here only, and drawn on figures of its own: no window, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fekernels import _demo_report as report
from fekernels.diagnostics import calibration

__all__ = ["demo"]

COLORS = {report.ADAM: "#b5523b", report.LANGEVIN: "#1f5a93", report.BAYES: "#7fa8d1"}
GREY = "#8a8a8a"


def demo(results: Sequence[report.SeedResult]) -> Figure:
    """The figure of `python -m fekernels demo`: calibration, entropy on shifted digits, and how the sampler ran."""
    figure = Figure(figsize=(14, 8.2), layout="constrained")
    axes = figure.subplots(2, 3)
    _reliability(axes[0, 0], results)
    _entropies(axes[0, 1], results, report.ADAM)
    _entropies(axes[0, 2], results, report.LANGEVIN)
    axes[0, 2].sharey(axes[0, 1])
    _losses_by_split(axes[1, 0], results)
    _training(axes[1, 1], results[0].trajectory)
    _path(axes[1, 2], results[0].trajectory)
    for ax in axes.flat:
        ax.spines["top"].set_visible(False)
        ax.spines["right"].set_visible(ax is axes[1, 1])
    return figure


def _reliability(ax: Axes, results: Sequence[report.SeedResult]) -> None:
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
    for name in COLORS:
        outcomes = [result.outcomes[name] for result in results]
        for kind, style in (("clean", "o-"), ("shifted", "o:")):
            answers = [getattr(outcome, kind) for outcome in outcomes]
            bins = calibration(
                torch.cat([a[0] for a in answers]), torch.cat([a[1] for a in answers]), bins=10
            )
            # A bin of a few digits says nothing and would only scatter.
            full = bins.count >= 30
            label = report.TITLES[name] if kind == "clean" else None
            line: dict[str, Any] = {
                "color": COLORS[name],
                "label": label,
                "ms": 4,
                "mfc": COLORS[name] if label else "white",
            }
            ax.plot(bins.confidence[full], bins.accuracy[full], style, **line)
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
    styles = {
        "clean": ("#444444", True),
        "rotated": ("#d08c2e", False),
        "noisy": ("#2c8c6b", False),
        "occluded": ("#8854a8", False),
    }
    bins = torch.linspace(0, 2.31, 34).tolist()
    for kind, (color, filled) in styles.items():
        values = torch.cat([result.outcomes[name].entropies[kind] for result in results])
        style: dict[str, Any] = (
            {"alpha": 0.25, "histtype": "stepfilled"} if filled else {"histtype": "step", "lw": 1.8}
        )
        ax.hist(values.tolist(), bins, density=True, color=color, label=kind, **style)
    ax.set(yscale="log", xlabel="predictive entropy, nats", ylabel="density", xlim=(0, 2.31))
    ax.set_title(f"Entropy: {report.TITLES[name]}")
    ax.legend(frameon=False, fontsize=9)


def _training(ax: Axes, path: report.Trajectory) -> None:
    loss = torch.tensor(path.loss, dtype=torch.float64)
    width = max(len(loss) // 150, 1)
    smooth = loss[: len(loss) // width * width].view(-1, width).mean(1)
    ax.plot((torch.arange(len(smooth)) + 0.5) * width, smooth, color=COLORS[report.LANGEVIN], lw=1.3)
    kept = [smooth[min(step // width, len(smooth) - 1)] for step in path.collected]
    ax.plot(path.collected, kept, ".", color="black", ms=4, label="sample kept")
    edges = [k for k in range(1, len(loss)) if path.sampling[k] != path.sampling[k - 1]] + [len(loss)]
    for start, end in zip(edges[0::2], edges[1::2], strict=False):
        ax.axvspan(start, end, color="#f3dfb6", alpha=0.8, lw=0, label="T > 0" if start == edges[0] else None)
    ax.set(yscale="log", xlabel="step", ylabel=f"training loss, mean of {width} batches", xlim=(0, len(loss)))
    ax.set_title("First split: loss and learning rate of the sampler")
    rate = ax.twinx()
    rate.plot(path.lr, color=GREY, lw=1, ls=":")
    rate.set_ylim(0, 4 * max(path.lr))  # keeps it in the lower quarter, under the loss
    rate.set_yticks([0, max(path.lr)])
    rate.set_ylabel("lr (dotted)", loc="bottom", color=GREY)
    rate.spines["top"].set_visible(False)
    ax.legend(fontsize=9, loc="upper right", ncols=2)


def _path(ax: Axes, path: report.Trajectory) -> None:
    weights = torch.stack(path.weights).double()
    centred = weights - weights.mean(0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    x, y = (left[:, :2] * scale[:2]).T
    share = (scale[:2] ** 2 / (scale**2).sum()).tolist()
    ax.plot(x, y, color=GREY, lw=0.7, alpha=0.7, zorder=1)
    steps = torch.arange(len(weights)) * report.RECORD_EVERY
    hot = torch.tensor([path.sampling[step] for step in steps.tolist()])
    ax.scatter(x[~hot], y[~hot], s=10, facecolors="none", edgecolors=GREY, lw=0.7, label="T = 0", zorder=2)
    dots = ax.scatter(x[hot], y[hot], s=16, c=steps[hot], cmap="viridis", label="T > 0", zorder=3)
    ax.figure.colorbar(dots, ax=ax, label="step", pad=0.01)
    ax.set(xlabel=f"first direction ({share[0]:.0%})", ylabel=f"second direction ({share[1]:.0%})")
    ax.set_title("First split: the weights, two principal directions")
    ax.legend(frameon=False, fontsize=9)


def _losses_by_split(ax: Axes, results: Sequence[report.SeedResult]) -> None:
    names = list(report.TITLES)
    for result in results:
        losses = [result.outcomes[name].scores["NLL"] for name in names]
        ax.plot(names, losses, "-", color=GREY, lw=1, zorder=1)
        colors = [COLORS.get(name, GREY) for name in names]
        ax.scatter(names, losses, c=colors, s=36, zorder=2)
    ax.set(ylabel="test negative log-likelihood", xlim=(-0.4, len(names) - 0.6))
    ax.set_title("Each split, joined by a line (lower is better)")
