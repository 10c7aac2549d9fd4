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
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fekernels as fe

SEED = 0
CENTRES = torch.tensor([[-3.0, -1.0], [3.0, -1.0], [0.0, 3.5]])
WEIGHTS = torch.tensor([0.5, 0.25, 0.25])
BANANA, MODES = (-4.5, 4.5, -3.0, 7.0), (-5.5, 5.5, -4.0, 6.5)  # left, right, bottom, top


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
    window: tuple[float, float, float, float]
    start: Tensor
    settings: dict[str, Any]

    def run(self, steps: int) -> tuple[Tensor, fe.stein.SVGDResult]:
        """The particles, and their discrepancy on the way."""
        sampler = fe.SVGD(self.log_prob, self.start, seed=SEED, **self.settings)
        # Adam at a constant rate would wander about the rest point by a tenth.
        rate = torch.optim.lr_scheduler.LambdaLR(
            sampler.optimizer, lambda k: min(1.0, 4 * (1 - k / (steps + 1)))
        )
        result = sampler.run(steps, discrepancy="imq", callback=lambda _: rate.step())
        return sampler.particles, result

    def grid(self, points: int) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates along both axes and the density on them [points, points], the second axis first."""
        left, right, bottom, top = self.window
        x, y = torch.linspace(left, right, points), torch.linspace(bottom, top, points)
        density = self.log_prob(torch.cartesian_prod(y, x).flip(1)).view(points, points).exp()
        return x, y, density / density.sum()

    def moments(self, particles: Tensor) -> str:
        """Mean and standard deviation of the particles, and of the density in the window."""
        x, y, p = self.grid(400)
        cells = []
        for axis, (values, weights) in enumerate(((x, p.sum(0)), (y, p.sum(1)))):
            mean = (values * weights).sum()
            deviation = ((values - mean).square() * weights).sum().sqrt()
            found = particles[:, axis]
            cells += [(found.mean(), mean), (found.std(correction=0), deviation)]
        return f"{self.title:34s} " + "  ".join(f"{a:6.2f} ({b:5.2f})" for a, b in cells)


def shares(particles: Tensor) -> str:
    """Shares of the particles at each mode, and of the density."""
    nearest = torch.cdist(particles, CENTRES).argmin(1)
    counts = torch.bincount(nearest, minlength=len(CENTRES)) / len(nearest)
    return ", ".join(f"{a:.2f} ({b:.2f})" for a, b in zip(counts, WEIGHTS, strict=True))


def draw(ax: Axes, case: Case, particles: Tensor) -> None:
    x, y, p = case.grid(200)
    ax.contourf(x, y, p, levels=12, cmap="Blues")
    ax.plot(*case.start.T, ".", color="#9a9a9a", ms=3, label="start")
    ax.plot(*particles.T, "o", color="#b5523b", ms=3.5, mec="white", mew=0.4, label="particles")
    left, right, bottom, top = case.window
    ax.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    ax.set_title(case.title, fontsize=10)


def picture(cases: list[Case], found: list[tuple[Tensor, fe.stein.SVGDResult]]) -> Figure:
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=[1, 1, 0.9])
    for k, (case, (particles, result)) in enumerate(zip(cases, found, strict=True)):
        draw(axes[k // 2, k % 2], case, particles)
        color = ("#444444", "#b5523b")[k % 2]
        axes[k // 2, 2].plot(result.steps, result.discrepancy.clamp_min(1e-6), color=color, label=case.title)
    for ax in axes[:, 2]:
        ax.set(yscale="log", xlabel="step", title="squared Stein discrepancy (imq)")
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylim(top=ax.get_ylim()[1] * 30)  # room for the legend
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    axes[0, 0].legend(fontsize=8, loc="upper right")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("svgd_posteriors.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="fewer particles and steps")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(1)  # a step is 5 ms or less: a second thread gains nothing
    n, steps = (60, 300) if arguments.quick else (200, 2000)

    noise = fe.random.normal((n, 2), seed=SEED)
    crowd = CENTRES[0] + 0.3 * noise
    schedule = fe.stein.TanhAnnealing(steps * 3 // 4)
    cases = [
        Case("banana, median bandwidth", banana, BANANA, noise, {}),
        Case("banana, four times the median", banana, BANANA, noise, {"bandwidth_scale": 4.0}),
        Case("three modes, plain", mixture, MODES, crowd, {}),
        Case("three modes, attraction annealed", mixture, MODES, crowd, {"anneal": schedule}),
    ]
    found = [case.run(steps) for case in cases]
    print(f"{n} particles, {steps} steps; the density's own in brackets")
    print(f"{'':34s}  mean x          deviation x     mean y          deviation y")
    for case, (particles, result) in zip(cases, found, strict=True):
        assert math.isfinite(float(result.discrepancy[-1]))
        print(case.moments(particles))
    for case, (particles, _) in zip(cases[2:], found[2:], strict=True):
        print(f"shares of the modes, {case.title}: {shares(particles)}")
    picture(cases, found).savefig(arguments.out, dpi=100)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
