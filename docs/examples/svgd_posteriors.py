"""Two densities in the plane and their particles: ``python docs/examples/svgd_posteriors.py [--out PATH] [--quick]``.

``fe.SVGD`` on a banana, out of the box and at four times the median bandwidth, and on three separate modes, where all
particles begin at one: plainly, and with the attraction annealed. Moments stand beside those of a fine grid. Needs the
extra "plots".
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fekernels as fe

SEED = 0
CENTRES = torch.tensor([[-3.0, -1.0], [3.0, -1.0], [0.0, 3.5]])
WEIGHTS = torch.tensor([0.5, 0.25, 0.25])


def banana(x: Tensor) -> Tensor:
    """log p [n] up to a constant: x_0 ~ N(0, 1.4^2) and x_1 given x_0 ~ N(x_0^2 / 2 - 1, .5^2)."""
    return -((x[:, 0] / 1.4).square() + ((x[:, 1] - x[:, 0].square() / 2 + 1) / 0.5).square()) / 2


def mixture(x: Tensor) -> Tensor:
    """log p [n] up to a constant: three normals of standard deviation .7, one as heavy as the other two."""
    squares = (x.unsqueeze(1) - CENTRES).square().sum(2)
    return (WEIGHTS.log() - squares / (2 * 0.7**2)).logsumexp(1)


@dataclass(frozen=True)
class Case:
    title: str
    log_prob: Callable[[Tensor], Tensor]
    start: Tensor
    window: tuple[float, float, float, float]  # left, right, bottom, top
    particles: Tensor
    result: fe.stein.SVGDResult


def sample(
    title: str,
    log_prob: Callable[[Tensor], Tensor],
    start: Tensor,
    window: tuple[float, float, float, float],
    steps: int,
    widen: float = 1.0,
    anneal: Callable[[int], float] | None = None,
) -> Case:
    sampler = fe.SVGD(
        log_prob,
        start,
        bandwidth_scale=widen,
        anneal=anneal,
        seed=SEED,
    )
    # Adam at a constant rate would wander about the rest point by a tenth.
    rate = torch.optim.lr_scheduler.LambdaLR(sampler.optimizer, lambda k: min(1.0, 4 * (1 - k / (steps + 1))))
    result = sampler.run(steps, discrepancy="imq", callback=lambda _: rate.step())
    return Case(title, log_prob, start, window, sampler.particles, result)


def grid(case: Case, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates along both axes and the density on them [points, points], the second axis first."""
    left, right, bottom, top = case.window
    x, y = torch.linspace(left, right, points), torch.linspace(bottom, top, points)
    at = torch.cartesian_prod(y, x).flip(1)
    density = case.log_prob(at).view(points, points).exp()
    return x, y, density / density.sum()


def moments(case: Case) -> str:
    """Mean and standard deviation of the particles, and of the density in the window."""
    x, y, p = grid(case, 400)
    exact = []
    for values, weights in ((x, p.sum(0)), (y, p.sum(1))):
        mean = (values * weights).sum()
        exact += [mean, ((values - mean).square() * weights).sum().sqrt()]
    means, deviations = case.particles.mean(0), case.particles.std(0, correction=0)
    found = [means[0], deviations[0], means[1], deviations[1]]
    pairs = [f"{float(a):6.2f} ({float(b):5.2f})" for a, b in zip(found, exact, strict=True)]
    return f"{case.title:34s} " + "  ".join(pairs)


def shares(case: Case) -> str:
    """Shares of the particles at each mode."""
    nearest = torch.cdist(case.particles, CENTRES).argmin(1)
    counts = torch.bincount(nearest, minlength=len(CENTRES)) / len(nearest)
    return f"{case.title}: " + ", ".join(
        f"{float(a):.2f} ({float(b):.2f})" for a, b in zip(counts, WEIGHTS, strict=True)
    )


def draw(ax: Axes, case: Case) -> None:
    x, y, p = grid(case, 200)
    ax.contourf(x, y, p, levels=12, cmap="Blues")
    ax.plot(*case.start.T, ".", color="#9a9a9a", ms=3, label="start")
    ax.plot(*case.particles.T, "o", color="#b5523b", ms=3.5, mec="white", mew=0.4, label="particles")
    left, right, bottom, top = case.window
    ax.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    ax.set_title(case.title, fontsize=10)


def picture(cases: list[Case]) -> Figure:
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=[1, 1, 0.9])
    for row in range(2):
        for column in range(2):
            draw(axes[row, column], cases[2 * row + column])
        ax = axes[row, 2]
        for case, color in zip(cases[2 * row : 2 * row + 2], ("#444444", "#b5523b"), strict=True):
            ax.plot(case.result.steps, case.result.discrepancy.clamp_min(1e-6), color=color, label=case.title)
        ax.set(yscale="log", xlabel="step", title="squared Stein discrepancy (imq)")
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylim(top=ax.get_ylim()[1] * 30)  # room for the legend
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    axes[0, 0].legend(fontsize=8, loc="upper right")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("svgd_posteriors.png"), help="where the picture goes"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer particles and steps: shows that everything runs"
    )
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(1)  # a step is 5 ms or less: a second thread gains nothing
    n, steps = (60, 300) if arguments.quick else (200, 2000)

    noise = fe.random.normal((n, 2), seed=SEED)
    wide, modes = (-4.5, 4.5, -3.0, 7.0), (-5.5, 5.5, -4.0, 6.5)
    crowd = CENTRES[0] + 0.3 * noise
    schedule = fe.stein.TanhAnnealing(steps * 3 // 4)
    cases = [
        sample("banana, median bandwidth", banana, noise, wide, steps),
        sample("banana, four times the median", banana, noise, wide, steps, widen=4.0),
        sample("three modes, plain", mixture, crowd, modes, steps),
        sample("three modes, attraction annealed", mixture, crowd, modes, steps, anneal=schedule),
    ]
    print(f"{n} particles, {steps} steps; the density's own in brackets")
    print(f"{'':34s}  mean x          deviation x     mean y          deviation y")
    for case in cases:
        assert math.isfinite(float(case.result.discrepancy[-1]))
        print(moments(case))
    for case in cases[2:]:
        print(f"shares of the modes, {shares(case)}")
    picture(cases).savefig(arguments.out, dpi=130)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
