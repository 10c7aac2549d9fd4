"""Annealing and Jarzynski's equality on a landscape: ``python docs/examples/annealing.py [--quick]``.

Carries particles from N(0, 1.5^2) to exp(-F/T), F = (a^2 + b^2 - 2)^2 + (a + b)^2 / 10, T = .1, in more and more steps,
and back from exact draws. log Z is known by quadrature. The picture: both estimates and Bennett's over the number of
steps, the mean works, and the distributions of work of one fast protocol, which cross at the free-energy difference.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal
from tqdm import tqdm

import fekernels as fe

T, SEED = 0.1, 0
BASE = Normal(torch.zeros(2), 1.5)
FORWARD, REVERSE, BOTH = "#3b6fb5", "#b5523b", "#444444"
OPTIONS = {
    "transition": "mala",
    "step_size": 0.12,
}  # one size for all: fast protocols stay far from equilibrium


def log_prob(x: Tensor) -> Tensor:
    a, b = x.unbind(1)
    return -((a**2 + b**2 - 2) ** 2 + (a + b) ** 2 / 10) / T


def exact_log_z() -> float:
    side = torch.linspace(-3, 3, 2001, dtype=torch.float64)
    return float(torch.logsumexp(log_prob(torch.cartesian_prod(side, side)), 0)) + 2 * math.log(6 / 2000)


def exact_draws(n: int) -> Tensor:
    """By rejection from a square that holds all but 1e-9 of the density, whose maximum is 1."""
    found = torch.empty(0, 2)
    step = 0
    while len(found) < n:
        x = 4.4 * fe.random.uniform((20 * n, 2), seed=SEED, stream=1, step=step) - 2.2
        height = fe.random.uniform((20 * n,), seed=SEED, stream=2, step=step)
        found = torch.cat([found, x[height.log() < log_prob(x)]])
        step += 1
    return found[:n]


def picture(
    steps: list[int],
    runs: list[tuple[fe.anneal.AnnealedEstimate, fe.anneal.AnnealedEstimate, tuple[float, float]]],
    exact: float,
) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for at, color, label in ((0, FORWARD, "forward"), (1, REVERSE, "in reverse")):
        found = [run[at] for run in runs]
        log_z, errors = [r.log_z for r in found], [2 * r.standard_error for r in found]
        sign = -1 if at == 0 else 1
        left.errorbar(steps, log_z, errors, color=color, marker="o", ms=4, capsize=2, label=f"log Z, {label}")
        left.plot(
            steps,
            [sign * float(r.work.mean()) for r in found],
            color=color,
            ls=":",
            label=f"mean work, {label}",
        )
    left.plot(
        steps, [run[2][0] for run in runs], "s", color=BOTH, ms=4, mfc="none", label="Bennett, from both"
    )
    left.axhline(exact, color="black", lw=0.8, label="quadrature")
    left.set(xscale="log", xlabel="steps", ylabel="log Z", ylim=(exact - 12, exact + 6))
    left.legend(frameon=False, fontsize=8, ncols=2)
    forward, reverse, _ = runs[1]
    bins = torch.linspace(-exact - 5, -exact + 15, 61).tolist()
    for work, color, label in (
        (forward.work, FORWARD, "W forward"),
        (-reverse.work, REVERSE, "-W in reverse"),
    ):
        share = [1 / len(work) / (bins[1] - bins[0])] * len(work)  # of all works, those beyond the axis too
        right.hist(
            work.tolist(), bins, weights=share, histtype="stepfilled", alpha=0.35, color=color, label=label
        )
    right.axvline(-exact, color="black", lw=0.8, label="free-energy difference, exact")
    right.set(xlabel=f"work over T, {steps[1]} steps", ylabel="density", yticks=[])
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("annealing.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that everything runs")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(1)  # tensors this small lose time to a second thread
    n, steps = (1000, [3, 10, 30]) if arguments.quick else (4000, [3, 10, 30, 100, 300, 1000])
    exact, samples = exact_log_z(), exact_draws(n)
    runs = []
    print(f"log Z by quadrature {exact:.4f}; {n} particles")
    print("| steps | forward | effective | in reverse | effective | Bennett |")
    print("|---|---|---|---|---|---|")
    for k in tqdm(steps, desc="annealing"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few steps are warned of; here they are shown
            there = fe.anneal.importance_sampling(log_prob, BASE, particles=n, betas=k, seed=SEED, **OPTIONS)
            back = fe.anneal.reverse_importance_sampling(
                log_prob, BASE, samples, betas=k, seed=SEED, **OPTIONS
            )
        both, error = fe.anneal.bennett_acceptance_ratio(there, back)
        runs.append((there, back, (both, error)))
        print(
            f"| {k} | {there.log_z:.3f} +- {there.standard_error:.3f} | {there.effective_sample_size:.0f} "
            f"| {back.log_z:.3f} +- {back.standard_error:.3f} | {back.effective_sample_size:.0f} "
            f"| {both:.3f} +- {error:.3f} |"
        )
    picture(steps, runs, exact).savefig(arguments.out, dpi=110)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
