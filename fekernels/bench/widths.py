"""The free energy over the width of a sample: data of one size, from many short samples to few long ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fekernels.bench.case import SIZES
from fekernels.bench.floors import COPY, copy
from fekernels.bench.free_energy import Problem, cost, problem, step
from fekernels.bench.timing import Contestant, interleave

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "measure", "table"]

# Of each of SIZES: elements of the data, and the widths.
ELEMENTS = dict(zip(SIZES, (1 << 24, 1 << 21, 4096), strict=True))
WIDTHS = dict(zip(SIZES, (tuple(1 << k for k in range(10, 18)),) * 2 + ((256, 512),), strict=True))
LIKELIHOODS = {"mse": "#1f5a93", "bernoulli": "#b5523b"}  # and their colours


def measure(size: str) -> list[dict[str, Any]]:
    """A row per width and likelihood, all timed in the same rounds."""
    elements, widths = ELEMENTS[size], WIDTHS[size]
    contestants = [copy(elements * 3 // 2)]
    for likelihood in LIKELIHOODS:
        flat = problem(likelihood, (1, elements, elements // 32))
        for width in widths:
            shaped = Problem(
                likelihood,
                tuple(p.detach().view(-1, width).requires_grad_() for p in flat.params),
                flat.target.view(-1, width),
                flat.mean.detach().view(elements // width, -1).requires_grad_(),
                flat.logvar.detach().view(elements // width, -1).requires_grad_(),
            )
            contestants.append(Contestant(f"{likelihood} {width}", step(shaped)))
    full = size == "full"
    times = interleave(contestants, rounds=15 if full else 5, seconds=5.0 if full else 0.0)
    copied = elements * 12 / times[COPY].median / 1e9
    rows = []
    for likelihood in LIKELIHOODS:
        best = min(times[f"{likelihood} {width}"].median for width in widths)
        for width in widths:
            seconds = times[f"{likelihood} {width}"].median
            rows.append(
                {
                    "likelihood": likelihood,
                    "batch": elements // width,
                    "width": width,
                    "ours_ms": seconds * 1e3,
                    "gb_per_s": elements * cost(likelihood).bytes / seconds / 1e9,
                    "copy_gb_per_s": copied,
                    "of_best_width": seconds / best,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'ours':14}{'batch x width':>18}{'ms':>9}{'GB/s':>7}{'of copy':>9}{'of best width':>15}"]
    for row in rows:
        shape = f"{row['batch']} x {row['width']}"
        lines.append(
            f"{row['likelihood']:14}{shape:>18}{row['ours_ms']:9.2f}{row['gb_per_s']:7.1f}"
            f"{row['gb_per_s'] / row['copy_gb_per_s']:9.2f}{row['of_best_width']:15.2f}"
        )
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Bandwidth over the width of a sample; needs matplotlib."""
    from fekernels import plots

    drawn, axes = plots.panels(1, 1, (7, 4))
    ax = axes[0, 0]
    for likelihood, color in LIKELIHOODS.items():
        chosen = [row for row in rows if row["likelihood"] == likelihood]
        speeds = [row["gb_per_s"] for row in chosen]
        ax.plot([row["width"] for row in chosen], speeds, "o-", color=color, label=likelihood)
    ax.axhline(rows[0]["copy_gb_per_s"], color=plots.GREY, ls="--", lw=1, label="copy of the same bytes")
    elements = rows[0]["batch"] * rows[0]["width"]
    ax.set_xscale("log", base=2)
    ticks = sorted({row["width"] for row in rows})
    ax.set_xticks(ticks, [f"{w // 1024}k" if w % 1024 == 0 else str(w) for w in ticks])
    ax.set(
        ylim=(0, None),
        xlabel=f"elements of a sample, of {elements / 1e6:.3g} million in all",
        ylabel="GB/s, forward + backward",
        title="fe.free_energy, float32",
    )
    ax.legend(frameon=False)
    return drawn
