"""Networks that repel each other and networks that do not: ``python docs/examples/svgd_ensemble.py [--quick]``.

Ten small networks on a few of scikit-learn's digits, from the same initial weights by the same optimizer: once each for
itself (a deep ensemble), and with ``fe.SVGD`` at the temperature of Bayes' posterior and far above it. Accuracy,
negative log-likelihood and calibration on clean and on noisy digits, and how well disagreement tells noisy from clean.
``--out PATH`` says where the picture goes. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fekernels as fe
from fekernels.diagnostics import auroc, calibration

SINGLE, PLAIN = "one network", "plain ensemble"


@dataclass(frozen=True)
class Settings:
    splits: int = 4
    members: int = 10
    train: int = 300
    steps: int = 1000
    lr: float = 1e-2
    # Of a mean loss: .3 times the number of training digits is the precision of the prior of each weight.
    prior_precision: float = 1e-3
    # In units of Bayes' 1/N.
    temperatures: tuple[float, ...] = (1.0, 30.0)


QUICK = Settings(splits=1, members=4, train=200, steps=120)


@dataclass(frozen=True)
class Scores:
    accuracy: float
    nll: float
    ece: float

    @classmethod
    def of(cls, log_p: Tensor, labels: Tensor) -> Scores:
        p = log_p.exp()
        right = (p.argmax(1) == labels).double().mean()
        return cls(float(right), float(F.nll_loss(log_p, labels)), calibration(p, labels).error)


@dataclass(frozen=True)
class Outcome:
    clean: Scores
    noisy: Scores
    auroc: float  # of the mutual information, noisy against clean digits; one network has none


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits(settings: Settings, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Training digits with labels, test digits with labels, and the test digits under noise."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: settings.train], order[settings.train :]
    noisy = (x[test] + 0.3 * fe.random.normal(x[test].shape, seed=seed)).clamp(0, 1)
    return (x[train], y[train]), (x[test], y[test]), noisy


def evaluate(settings: Settings, seed: int, bar: tqdm) -> dict[str, Outcome]:
    train, (x, y), noisy = digits(settings, seed)
    kinds = {PLAIN: {"bandwidth": 0.0, "temperature": 0.0}}
    for t in settings.temperatures:
        kinds[f"SVGD, T = {t:g}/N"] = {"temperature": t / settings.train}
    outcomes: dict[str, Outcome] = {}
    for name, kind in kinds.items():
        # The mean cross-entropy: temperature 1/N and a prior divided by N are Bayes' posterior.
        ensemble = fe.SVGD.from_model(
            network,
            F.cross_entropy,
            size=settings.members,
            prior_precision=settings.prior_precision,
            lr=settings.lr,
            seed=seed,
            **kind,
        )
        for _ in range(settings.steps):
            ensemble.step(*train)
            bar.update()
        clean, shifted = ensemble.predict(x), ensemble.predict(noisy)
        if name == PLAIN:
            alone = [
                [Scores.of(output.log_softmax(1), y) for output in ensemble.outputs(inputs)]
                for inputs in (x, noisy)
            ]
            outcomes[SINGLE] = Outcome(mean_scores(alone[0]), mean_scores(alone[1]), float("nan"))
        outcomes[name] = Outcome(
            Scores.of(clean.log_mean, y),
            Scores.of(shifted.log_mean, y),
            auroc(clean.mutual_information, shifted.mutual_information),
        )
    return outcomes


def mean_scores(scores: list[Scores]) -> Scores:
    count = len(scores)
    return Scores(
        sum(s.accuracy for s in scores) / count,
        sum(s.nll for s in scores) / count,
        sum(s.ece for s in scores) / count,
    )


def table(results: list[dict[str, Outcome]]) -> list[str]:
    lines = [
        "| mean over splits | accuracy | NLL | ECE | accuracy, noisy | NLL, noisy | ECE, noisy | AUROC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in results[0]:
        own = [result[name] for result in results]
        clean, noisy = mean_scores([o.clean for o in own]), mean_scores([o.noisy for o in own])
        area = sum(o.auroc for o in own) / len(own)
        lines.append(
            f"| {name} | {clean.accuracy:.3f} | {clean.nll:.3f} | {clean.ece:.3f} | {noisy.accuracy:.3f} | "
            f"{noisy.nll:.3f} | {noisy.ece:.3f} | {'' if name == SINGLE else f'{area:.3f}'} |"
        )
    return lines


def picture(results: list[dict[str, Outcome]]) -> Figure:
    """Each split's numbers, joined by a line."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, 4)
    names = list(results[0])
    panels = {
        "NLL": lambda o: o.clean.nll,
        "NLL, noisy digits": lambda o: o.noisy.nll,
        "ECE, noisy digits": lambda o: o.noisy.ece,
        "AUROC of disagreement": lambda o: o.auroc,
    }
    for ax, (title, value) in zip(axes, panels.items(), strict=True):
        for result in results:
            ax.plot(
                range(len(names)),
                [value(result[name]) for name in names],
                "o-",
                color="#8a8a8a",
                mfc="#1f5a93",
            )
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("svgd_ensemble.png"), help="where the picture goes")
    parser.add_argument(
        "--quick", action="store_true", help="one split, few steps: shows that everything runs"
    )
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else Settings()
    started = time.perf_counter()
    torch.set_num_threads(1)  # layers this small lose time to a second thread

    total = settings.splits * settings.steps * (1 + len(settings.temperatures))
    with tqdm(total=total, desc="steps") as bar:
        results = [evaluate(settings, seed, bar) for seed in range(settings.splits)]
    print(
        f"{settings.members} networks, {settings.train} digits to train, {1797 - settings.train} to test, "
        f"{settings.splits} splits"
    )
    print("\n".join(table(results)))
    picture(results).savefig(arguments.out, dpi=130)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
