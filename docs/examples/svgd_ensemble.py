"""Networks that repel each other and networks that do not: ``python docs/examples/svgd_ensemble.py [--quick]``.

Ten small networks on a few of scikit-learn's digits, from the same initial weights by the same optimizer: once each for
itself (a deep ensemble), and with ``fe.SVGD`` at the temperature of Bayes' posterior and far above it. Accuracy,
negative log-likelihood and calibration on clean and on noisy digits, and how well disagreement tells noisy from clean.
``--out PATH`` says where the picture goes. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import math
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
from fekernels import plots
from fekernels.diagnostics import auroc, calibration

SINGLE, PLAIN = "one network", "plain ensemble"
COLUMNS = ("accuracy", "NLL", "ECE", "accuracy, noisy", "NLL, noisy", "ECE, noisy", "AUROC")


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


def scores(log_p: Tensor, labels: Tensor) -> list[float]:
    """Accuracy, negative log-likelihood and expected calibration error."""
    p = log_p.exp()
    right = (p.argmax(1) == labels).double().mean()
    return [float(right), float(F.nll_loss(log_p, labels)), calibration(p, labels).error]


def evaluate(settings: Settings, seed: int, bar: tqdm) -> dict[str, list[float]]:
    """Of one split: the numbers of COLUMNS for each kind of ensemble."""
    train, (x, y), noisy = digits(settings, seed)
    kinds = {PLAIN: {"bandwidth": 0.0, "temperature": 0.0}}
    for t in settings.temperatures:
        kinds[f"SVGD, T = {t:g}/N"] = {"temperature": t / settings.train}
    found: dict[str, list[float]] = {}
    for name, kind in kinds.items():
        # The mean cross-entropy: temperature 1/N and a prior divided by N are Bayes' posterior.
        ensemble = fe.SVGD.from_model(
            network, F.cross_entropy, size=settings.members, prior_precision=settings.prior_precision,
            lr=settings.lr, seed=seed, **kind,
        )  # fmt: skip
        for _ in range(settings.steps):
            ensemble.step(*train)
            bar.update()
        if name == PLAIN:  # each of its members alone; one network has no disagreement
            each = [
                [scores(output.log_softmax(1), y) for output in ensemble.outputs(inputs)]
                for inputs in (x, noisy)
            ]
            found[SINGLE] = torch.tensor(each, dtype=torch.float64).mean(1).flatten().tolist() + [math.nan]
        clean, shifted = ensemble.predict(x), ensemble.predict(noisy)
        area = auroc(clean.mutual_information, shifted.mutual_information)
        found[name] = [*scores(clean.log_mean, y), *scores(shifted.log_mean, y), area]
    return found


def table(results: list[dict[str, list[float]]]) -> str:
    lines = [f"| mean over splits | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in results[0]:
        means = torch.tensor([result[name] for result in results], dtype=torch.float64).mean(0).tolist()
        cells = [f"{mean:.3f}" if not math.isnan(mean) else "" for mean in means]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(results: list[dict[str, list[float]]]) -> Figure:
    """Each split's numbers, joined by a line."""
    figure, axes = plots.panels(1, 4, (12, 3.4))
    names = list(results[0])
    for ax, column in zip(axes[0], ("NLL", "NLL, noisy", "ECE, noisy", "AUROC"), strict=True):
        at = COLUMNS.index(column)
        for result in results:
            values = [result[name][at] for name in names]
            ax.plot(range(len(names)), values, "o-", color=plots.GREY, mfc="#1f5a93")
        ax.set_title(f"{column} of disagreement" if column == "AUROC" else column, fontsize=10)
        ax.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
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
    print(table(results))
    picture(results).savefig(arguments.out, dpi=110)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
