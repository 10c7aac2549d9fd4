"""How much variance SVGD loses on N(0, I), and what helps: ``python docs/examples/svgd_collapse.py [--quick]``.

Prints the table of docs/svgd.md: the marginal variance (the mean over the dimensions, divided by n) of n particles in d
dimensions, which should be 1. Where particles come to rest it is the last step's, else the mean over the second half.
``--out PATH`` says where the picture of the same goes. Needs the extra "plots".
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import fekernels as fe
from fekernels import plots

SEED = 0


@dataclass(frozen=True)
class Row:
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float = 1.0
    moving: bool = False  # particles do not come to rest


ROWS = [
    Row("median bandwidth"),
    Row("median, Adam at .1", {"optimizer": "adam"}, lr=0.1, moving=True),
    Row("4 times the median", {"bandwidth_scale": 4.0}),
    Row("16 times the median", {"bandwidth_scale": 16.0}),
    Row("imq kernel", {"kernel": "imq"}),
    Row("laplace kernel", {"kernel": "laplace"}),
    Row("linear kernel", {"kernel": "linear"}, lr=0.03),
    Row("repulsion doubled", {"temperature": 2.0}),
    Row("attraction annealed, then plain", {"anneal": "tanh"}),
    Row("random groups of 10", {"kernel_batch": 10}, moving=True),
    Row("independent noise, a = .1", {"noise": "independent", "noise_rate": 0.1}, lr=0.1, moving=True),
    Row("independent noise, a = 1", {"noise": "independent", "noise_rate": 1.0}, lr=0.1, moving=True),
    Row("kernel noise", {"noise": "kernel"}, lr=0.3, moving=True),
]


def log_prob(x: Tensor) -> Tensor:
    return -x.square().sum(1) / 2


def variance(row: Row, n: int, d: int, steps: int) -> float:
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": row.lr, **row.settings}
    if "anneal" in settings:
        settings["anneal_steps"] = steps // 2
    sampler = fe.SVGD(log_prob, fe.random.normal((n, d), seed=SEED), seed=SEED, **settings)
    values: list[float] = []

    def keep(sampler: fe.SVGD) -> None:
        values.append(float(sampler.particles.var(0, correction=0).mean()))

    sampler.run(steps, progress=False, every=0, callback=keep)
    return sum(values[steps // 2 :]) / len(values[steps // 2 :]) if row.moving else values[-1]


def picture(table: dict[str, list[float]], cases: list[tuple[int, int]]) -> Figure:
    """A line of dots for each row: the further left, the more variance is lost."""
    figure, axes = plots.panels(1, 1, (8.4, 4.2))
    ax, rows = axes[0, 0], range(len(table))
    ax.axvline(1, color=plots.GREY, lw=0.8, ls=":")
    for i, ((n, d), color) in enumerate(zip(cases, ("#9ec5e8", "#4c8ed9", "#b5523b"), strict=False)):
        values = [row[i] for row in table.values()]
        ax.plot(values, rows, "o", color=color, label=f"n = {n}, d = {d}")
    ax.set_yticks(rows, list(table))
    ax.invert_yaxis()
    ax.set(xlabel="marginal variance; N(0, I) has 1", xlim=(0, None))
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("svgd_collapse.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that everything runs")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small lose time to a second thread
    cases = [(100, 1), (50, 10)] if arguments.quick else [(100, 1), (50, 10), (50, 50)]
    steps = 100 if arguments.quick else 4000

    table = {row.name: [0.0] * len(cases) for row in ROWS}
    with tqdm(total=len(ROWS) * len(cases), desc="variances") as bar:
        for row in ROWS:
            for i, (n, d) in enumerate(cases):
                table[row.name][i] = variance(row, n, d, steps)
                bar.update()
    print(f"marginal variance after {steps} steps; N(0, I) has 1")
    print("| (n, d) | " + " | ".join(f"({n}, {d})" for n, d in cases) + " |")
    print("|---" * (1 + len(cases)) + "|")
    for name, values in table.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    picture(table, cases).savefig(arguments.out, dpi=100)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
