"""What knows what it does not know, and at which price: ``python docs/examples/uncertainty.py [--quick]``.

One network on scikit-learn's digits and one on its diabetes data, by the seven methods of uncertainty_parts/methods.py:
Adam, an ensemble, and what this library has for uncertainty. Accuracy or error, negative log-likelihood, calibration,
how well uncertainty tells shifted inputs from clean ones, and the cost, in gradients of single rows and in seconds. One
table, one picture; whoever wins, wins. Nothing was tuned on the test rows: all take the same prior, and the usual step
sizes of their kind. ``--out PATH`` says where the picture goes. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm
from uncertainty_parts.methods import METHODS, QUICK, Settings
from uncertainty_parts.problems import Problem, diabetes, digits

import fekernels as fe
from fekernels import plots
from fekernels.diagnostics import auroc, calibration


@dataclass(frozen=True)
class Scores:
    """Of one method on one split.

    Attributes:
        error: share of classes that is wrong, or root mean square error.
        calibration: expected calibration error, or how far the share of targets in the central 90% is from .9.
        gradients: of single rows, in millions.
    """

    error: float
    nll: float
    calibration: float
    auroc: float
    gradients: float
    seconds: float


def judge_classes(problem: Problem, samples: fe.PosteriorSamples) -> tuple[float, float, float, float]:
    x, y = problem.test
    clean, shifted = samples.predict(x), samples.predict(problem.shifted)
    error = (clean.mean.argmax(1) != y).double().mean()
    told = auroc(clean.predictive_entropy, shifted.predictive_entropy)
    return float(error), float(F.nll_loss(clean.log_mean, y)), calibration(clean.mean, y).error, told


def judge_numbers(
    problem: Problem, samples: fe.PosteriorSamples, variance: float
) -> tuple[float, float, float, float]:
    x, y = problem.test
    clean, shifted = samples.predict(x, None), samples.predict(problem.shifted, None)
    outputs = torch.stack(list(samples.outputs(x))).double()
    normal = torch.distributions.Normal(outputs, variance**0.5)
    nll = -(normal.log_prob(y).logsumexp(0) - math.log(len(outputs))).mean()
    share = normal.cdf(y).mean(0)  # of the predictive distribution that lies below the target
    inside = ((share > 0.05) & (share < 0.95)).double().mean()
    error = (clean.mean - y).square().mean().sqrt()
    told = auroc(clean.std.flatten(), shifted.std.flatten())
    return float(error), float(nll), float((inside - 0.9).abs()), told


def evaluate(problem: Problem, settings: Settings, seed: int, bar: tqdm) -> dict[str, Scores]:
    found = {}
    for name, method in METHODS.items():
        bar.set_description(f"{problem.name}, {name}")
        problem.looked, started = 0, time.perf_counter()
        samples = method(problem, settings, seed)
        seconds = time.perf_counter() - started
        if problem.variance is None:
            scores = judge_classes(problem, samples)
        else:
            scores = judge_numbers(problem, samples, problem.variance)
        found[name] = Scores(*scores, problem.looked / 1e6, seconds)
        bar.update()
    return found


def table(name: str, results: list[dict[str, Scores]]) -> str:
    what, off = ("errors", "ECE") if name == "digits" else ("RMSE", "off 90%")
    lines = [f"| {name} | {what} | NLL | {off} | AUROC | M gradients | s |", "|---|---|---|---|---|---|---|"]
    for method in METHODS:
        own = [result[method] for result in results]
        mean = Scores(*(sum(getattr(o, key) for o in own) / len(own) for key in Scores.__annotations__))
        area = "" if mean.auroc == 0.5 else f"{mean.auroc:.3f}"  # one network of a regression: no uncertainty
        lines.append(
            f"| {method} | {mean.error:.3f} | {mean.nll:.3f} | {mean.calibration:.3f} | {area} | "
            f"{mean.gradients:.3g} | {mean.seconds:.1f} |"
        )
    return "\n".join(lines)


def picture(results: dict[str, list[dict[str, Scores]]]) -> Figure:
    """Negative log-likelihood and detection over cost, a dot a split."""
    figure, axes = plots.panels(len(results), 2, (11, 7))
    for row, (name, splits) in zip(axes, results.items(), strict=True):
        for ax, key, title in zip(row, ("nll", "auroc"), ("NLL", "AUROC of shifted inputs"), strict=True):
            for k, method in enumerate(METHODS):
                own = [split[method] for split in splits]
                values = [getattr(o, key) for o in own]
                ax.plot([o.gradients for o in own], values, "o", color=f"C{k}", label=method)
            ax.set(xscale="log", xlabel="million gradients of single rows", title=f"{name}: {title}")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("uncertainty.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="one split, few epochs")
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else Settings()
    started = time.perf_counter()
    torch.set_num_threads(1)  # layers this small lose time to a second thread
    results: dict[str, list[dict[str, Scores]]] = {"digits": [], "diabetes": []}
    with tqdm(total=2 * settings.splits * len(METHODS)) as bar, warnings.catch_warnings():
        # One network, and five, are no posterior samples.
        warnings.filterwarnings("ignore", message=".*samples are worth about")
        for seed in range(settings.splits):
            for make in (digits, diabetes):
                problem = make(seed)
                results[problem.name].append(evaluate(problem, settings, seed, bar))
    print(f"means over {settings.splits} splits")
    for name, splits in results.items():
        print(f"{table(name, splits)}\n")
    picture(results).savefig(arguments.out, dpi=90)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
