"""Adam's one answer, and the posterior's: a regression with a gap in its data, beside the exact band.

    python docs/examples/posterior_band.py [--quick] [--out FOLDER]

A curve of bumps is linear in its weights, so its posterior is Gaussian and known. Adam finds the middle of it;
`fe.sample_posterior` finds all of it, or says that it did not. 40 s on two cores; --quick takes narrower bumps, whose
weights depend less on each other.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fekernels as fe

SIGMA, N = 0.2, 60
CENTERS = torch.linspace(-3.5, 3.5, 18)
WIDTH, NARROW = 0.3, 0.22
THEMES = {
    "light": dict(ink="#1f2328", paper="#ffffff", band="#4c8ed9", line="#c2571a"),
    "dark": dict(ink="#e6edf3", paper="#0d1117", band="#5aa2f2", line="#f0883e"),
}


class Bumps(nn.Module):
    """A curve that is linear in its weights."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width
        self.weights = nn.Linear(len(CENTERS), 1, bias=False)
        nn.init.zeros_(self.weights.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(features(x, self.width))


def features(x: Tensor, width: float) -> Tensor:
    return torch.exp(-((x - CENTERS) ** 2) / (2 * width**2))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """N points of a sine, none of them between -0.6 and 1.4."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(N, 1, generator=generator) * 4 - 3
    x = torch.where(x > -0.6, x + 2.0, x)
    return x, (2 * x).sin() + SIGMA * torch.randn(N, 1, generator=generator)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean of -log p(y | x), but for constants."""
    return (model(batch[0]) - batch[1]).square().mean() / (2 * SIGMA**2)


def exact(x: Tensor, y: Tensor, at: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the curve under the posterior, prior N(0, 1) of each weight, in float64."""
    f, g = features(x, width).double(), features(at, width).double()
    precision = f.T @ f / SIGMA**2 + torch.eye(len(CENTERS), dtype=torch.float64)
    mean = torch.linalg.solve(precision, f.T @ y.double() / SIGMA**2)
    return (g @ mean)[:, 0], (g * torch.linalg.solve(precision, g.T).T).sum(1).sqrt()


def train(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int = 3000) -> None:
    """Adam, which is LangevinAdam at temperature 0, to the posterior's mode: the prior is a decay of 1 / N."""
    optimizer = fe.LangevinAdam(model.parameters(), lr=0.02, prior_precision=1 / N)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        schedule.step()


def draw(path: Path, colors: dict[str, str], curves: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> None:
    with plt.rc_context({"svg.hashsalt": "fekernels", "font.size": 11, "text.color": colors["ink"]}):
        figure, ax = plt.subplots(figsize=(8.4, 3.2), layout="constrained", facecolor=colors["paper"])
        ax.set_facecolor(colors["paper"])
        at, middle, wide = curves["at"], curves["mean"], 2 * curves["std"]
        ax.fill_between(at, middle - wide, middle + wide, color=colors["band"], alpha=0.35, lw=0,
                        label="fe.sample_posterior, 2 sd")  # fmt: skip
        for sign in (-1, 1):
            ax.plot(at, curves["exact"] + sign * 2 * curves["exact_std"], color=colors["ink"], lw=1, ls=":",
                    label="the exact posterior, 2 sd" if sign > 0 else None)  # fmt: skip
        ax.plot(at, curves["adam"], color=colors["line"], lw=1.8, label="torch.optim.Adam")
        ax.plot(batch[0][:, 0], batch[1][:, 0], "o", ms=3, color=colors["ink"], label="data")
        ax.set(xlim=(-3.3, 3.7), ylim=(-3.2, 3.2), xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.legend(frameon=False, labelcolor=colors["ink"], loc="upper center", ncols=4, fontsize=9.5)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples of an easier posterior")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the two pictures")
    arguments = parser.parse_args()
    width, samples = (NARROW, 60) if arguments.quick else (WIDTH, 200)
    batch = data()
    at = torch.linspace(-3.2, 3.6, 240)[:, None]
    model = Bumps(width)
    train(model, batch)
    adam = model(at).detach()[:, 0]
    run = fe.sample_posterior(
        model, loss_fn, [batch], data_size=N, prior_precision=1.0, samples=samples, seed=0
    )
    print(run.report)
    found = run.samples.predict(at, activation=None)
    mean, std = exact(*batch, at, width)
    gap = (at[:, 0] > -0.4) & (at[:, 0] < 1.2)
    for name, where in (("beside the data", ~gap), ("in the gap", gap)):
        ratio = found.std[:, 0][where] / std[where]
        print(f"sd over the exact sd, {name}: {ratio.min():.2f} to {ratio.max():.2f}")
    curves = dict(
        at=at[:, 0], mean=found.mean[:, 0], std=found.std[:, 0], adam=adam, exact=mean, exact_std=std
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for theme, colors in THEMES.items():
        draw(arguments.out / f"posterior-{theme}.svg", colors, curves, batch)
        print(f"written: {arguments.out / f'posterior-{theme}.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
