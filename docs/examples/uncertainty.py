"""What knows what it does not know, and at which price: ``python docs/examples/uncertainty.py [--quick]``.

One network on scikit-learn's digits and one on its diabetes data, by Adam, by an ensemble of five, and by what this
library has for uncertainty: ``fe.sample_posterior`` (LangevinAdam), ``fe.SGLD``, ``fe.VariationalAdam`` with both
estimators, and ``fe.SVGD``. Accuracy or error, negative log-likelihood, calibration, how well uncertainty tells shifted
inputs from clean ones, and the cost, in gradients of single rows and in seconds. One table, one picture; whoever wins,
wins. Nothing was tuned on the test rows: all take the same prior, and the usual step sizes of their kind.
``--out PATH`` says where the picture goes. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fekernels as fe
from fekernels.diagnostics import auroc, calibration

Rows = tuple[Tensor, Tensor]
PRIOR = 1.0  # precision of every weight


@dataclass(frozen=True)
class Settings:
    splits: int = 3
    epochs: int = 150
    batch: int = 50
    members: int = 5
    particles: int = 10
    chains: int = 4
    draws: int = 25
    burn_in: int = 600
    thinning: int = 20


QUICK = Settings(splits=1, epochs=8, members=2, particles=3, chains=2, draws=4, burn_in=20, thinning=2)


@dataclass(frozen=True)
class Problem:
    name: str
    train: Rows
    test: Rows
    shifted: Tensor
    network: Callable[[], nn.Module]
    variance: float | None  # of the noise of a regression; None: classes

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean of -log p."""
        if self.variance is None:
            return F.cross_entropy(output, target)
        return (output - target).square().mean() / (2 * self.variance)

    @property
    def size(self) -> int:
        return len(self.train[0])


def digits(seed: int) -> Problem:
    """400 digits to train; the test's others, and the same turned by 45 degrees."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:400], order[400:]
    images, half = x[test].view(-1, 1, 8, 8), math.sqrt(0.5)
    turn = torch.tensor([[half, -half, 0.0], [half, half, 0.0]]).expand(len(test), 2, 3)
    turned = F.grid_sample(images, F.affine_grid(turn, list(images.shape), False), align_corners=False)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    return Problem("digits", (x[train], y[train]), (x[test], y[test]), turned.flatten(1), network, None)


def diabetes(seed: int) -> Problem:
    """300 patients to train, 142 to test, and these with every feature three times as far from the mean."""
    bunch = load_diabetes()
    x, y = (torch.tensor(each, dtype=torch.float32) for each in (bunch.data, bunch.target))
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:300], order[300:]
    # The noise is what a linear model leaves.
    fit = torch.linalg.lstsq(x[train], y[train])
    variance = float((x[train] @ fit.solution - y[train]).square().sum() / (300 - 10))

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1))

    return Problem("diabetes", (x[train], y[train]), (x[test], y[test]), 3 * x[test], network, variance)


class Budget:
    """Gradients of single rows that a method looks at."""

    def __init__(self) -> None:
        self.rows = 0

    def batches(self, problem: Problem, settings: Settings, epochs: int, seed: int) -> Iterator[Rows]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for part in torch.randperm(problem.size, generator=generator).split(settings.batch):
                self.rows += len(part)
                yield problem.train[0][part], problem.train[1][part]


def made(problem: Problem, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return problem.network()


def adam(problem: Problem, settings: Settings, seed: int, budget: Budget) -> nn.Module:
    model = made(problem, seed)
    steps = settings.epochs * math.ceil(problem.size / settings.batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=PRIOR / problem.size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in budget.batches(problem, settings, settings.epochs, seed):
        optimizer.zero_grad()
        problem.loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model


def by_adam(problem: Problem, settings: Settings, seed: int, budget: Budget) -> fe.PosteriorSamples:
    samples = fe.PosteriorSamples(problem.network())
    samples.collect(adam(problem, settings, seed, budget).state_dict())
    return samples


def by_ensemble(problem: Problem, settings: Settings, seed: int, budget: Budget) -> fe.PosteriorSamples:
    samples = fe.PosteriorSamples(problem.network())
    for member in range(settings.members):
        samples.collect(adam(problem, settings, 100 * seed + member, budget).state_dict())
    return samples


def by_langevin_adam(problem: Problem, settings: Settings, seed: int, budget: Budget) -> fe.PosteriorSamples:
    x, y = problem.train
    run = fe.sample_posterior(
        adam(problem, settings, seed, budget),
        lambda model, rows: problem.loss(model(rows[0]), rows[1]),
        list(zip(x.split(settings.batch), y.split(settings.batch), strict=True)),
        data_size=problem.size,
        prior_precision=PRIOR,
        chains=settings.chains,
        samples=settings.draws,
        burn_in=settings.burn_in,
        thinning=settings.thinning,
        seed=seed,
        progress=False,
    )
    budget.rows += int(run.report.settings["batches"] * settings.batch)
    return run.samples


def by_sgld(problem: Problem, settings: Settings, seed: int, budget: Budget) -> fe.PosteriorSamples:
    """From Adam's weights, at a step size at which the largest curvature is stable."""
    model = adam(problem, settings, seed, budget)
    n = problem.size
    optimizer = fe.SGLD(
        model.parameters(), 0.02 if problem.variance is None else 5e-3, temperature=1 / n, prior_precision=PRIOR / n,
        seed=seed,
    )  # fmt: skip
    per_epoch = math.ceil(n / settings.batch)
    burn_in = settings.epochs // 2 * per_epoch
    samples = fe.PosteriorSamples(model, burn_in=burn_in, thinning=max(1, burn_in // settings.draws))
    for x, y in budget.batches(problem, settings, settings.epochs, seed + 1):
        optimizer.zero_grad()
        problem.loss(model(x), y).backward()
        optimizer.step()
        samples.update()
    return samples


def variational(estimator: str, lr: float, beta2: float) -> Callable[..., fe.PosteriorSamples]:
    def fit(problem: Problem, settings: Settings, seed: int, budget: Budget) -> fe.PosteriorSamples:
        model = made(problem, seed)
        optimizer = fe.VariationalAdam(
            model.parameters(), lr, problem.size, weight_decay=PRIOR / problem.size, betas=(0.9, beta2),
            hess_init=0.5, estimator=estimator, seed=seed,
        )  # fmt: skip
        steps = settings.epochs * math.ceil(problem.size / settings.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for x, y in budget.batches(problem, settings, settings.epochs, seed):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                problem.loss(model(x), y).backward()
            optimizer.step()
            schedule.step()
        samples = fe.PosteriorSamples(model)
        for _ in range(2 * settings.draws):
            with optimizer.sampled_params():
                samples.collect()
        return samples

    return fit


def by_svgd(problem: Problem, settings: Settings, seed: int, budget: Budget) -> fe.PosteriorSamples:
    ensemble = fe.SVGD.from_model(
        problem.network, problem.loss, size=settings.particles, prior_precision=PRIOR / problem.size,
        temperature=1 / problem.size, lr=1e-2, seed=seed,
    )  # fmt: skip
    for x, y in budget.batches(problem, settings, settings.epochs, seed):
        ensemble.step(x, y)
    budget.rows *= settings.particles
    samples = fe.PosteriorSamples(problem.network())
    for member in range(settings.particles):
        samples.collect(ensemble.parameters_of(member))
    return samples


METHODS = {
    "Adam": by_adam,
    "ensemble": by_ensemble,
    "LangevinAdam": by_langevin_adam,
    "SGLD": by_sgld,
    "VariationalAdam, natural": variational("natural", 0.1, 0.9999),
    "VariationalAdam, reparam": variational("reparam", 1e-2, 0.999),
    "SVGD": by_svgd,
}


@dataclass(frozen=True)
class Scores:
    """Of one method on one split.

    Attributes:
        error: share of classes that is wrong, or root mean square error.
        calibration: expected calibration error, or how far the share of targets in the central 90% is from .9.
    """

    error: float
    nll: float
    calibration: float
    auroc: float
    gradients: float
    seconds: float


def judge(problem: Problem, samples: fe.PosteriorSamples) -> tuple[float, float, float, float]:
    x, y = problem.test
    if problem.variance is None:
        clean, shifted = samples.predict(x), samples.predict(problem.shifted)
        assert clean.log_mean is not None and clean.predictive_entropy is not None
        assert shifted.predictive_entropy is not None
        error = float((clean.mean.argmax(1) != y).double().mean())
        told = auroc(clean.predictive_entropy, shifted.predictive_entropy)
        return error, float(F.nll_loss(clean.log_mean, y)), calibration(clean.mean, y).error, told
    clean, shifted = samples.predict(x, None), samples.predict(problem.shifted, None)
    outputs = torch.stack(list(samples.outputs(x))).double()
    normal = torch.distributions.Normal(outputs, problem.variance**0.5)
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
        budget, started = Budget(), time.perf_counter()
        samples = method(problem, settings, seed, budget)
        seconds = time.perf_counter() - started
        found[name] = Scores(*judge(problem, samples), budget.rows / 1e6, seconds)
        bar.update()
    return found


def table(name: str, results: list[dict[str, Scores]]) -> list[str]:
    what = "errors" if name == "digits" else "RMSE"
    off = "ECE" if name == "digits" else "off 90%"
    lines = [f"| {name} | {what} | NLL | {off} | AUROC | M gradients | s |", "|---|---|---|---|---|---|---|"]
    for method in METHODS:
        own = [result[method] for result in results]
        means = {key: sum(getattr(o, key) for o in own) / len(own) for key in Scores.__annotations__}
        area = (
            "" if means["auroc"] == 0.5 else f"{means['auroc']:.3f}"
        )  # one network of a regression: no uncertainty
        lines.append(
            f"| {method} | {means['error']:.3f} | {means['nll']:.3f} | {means['calibration']:.3f} | {area} | "
            f"{means['gradients']:.3g} | {means['seconds']:.1f} |"
        )
    return lines


def picture(results: dict[str, list[dict[str, Scores]]]) -> Figure:
    """Negative log-likelihood and detection over cost, a dot a split."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for row, (name, splits) in zip(axes, results.items(), strict=True):
        for ax, key, title in zip(row, ("nll", "auroc"), ("NLL", "AUROC of shifted inputs"), strict=True):
            for k, method in enumerate(METHODS):
                own = [split[method] for split in splits]
                ax.plot(
                    [o.gradients for o in own],
                    [getattr(o, key) for o in own],
                    "o",
                    color=f"C{k}",
                    label=method,
                )
            ax.set(xscale="log", xlabel="million gradients of single rows", title=f"{name}: {title}")
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("uncertainty.png"), help="where the picture goes")
    parser.add_argument(
        "--quick", action="store_true", help="one split, few epochs: shows that everything runs"
    )
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
        print("\n".join(table(name, splits)) + "\n")
    picture(results).savefig(arguments.out, dpi=120)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
