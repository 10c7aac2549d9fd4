"""One landscape, three ways over it, and a network's loss: ``python docs/examples/landscape.py [--quick]``.

F = (a^2 + b^2 - 2)^2 + (a + b)^2 / 10 is a free energy, a loss, or minus a log-density: one function, so one picture.
Prints its critical points beside those found by hand, and the mean of F over late positions at T = .1 beside
quadrature. Draws Adam, LangevinAdam and SVGD on it, what they learn step by step, and the training of a network in the
plane of its two principal directions.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fekernels as fe

SEED, T = 0, 0.1
BY_HAND = {"minimum": 0.0, "saddle": 0.39, "maximum": 4.0}
COLORS = {"Adam": "#444444", "LangevinAdam": "#b5523b", "SVGD": "#3b6fb5"}


def energy(x: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    return (a**2 + b**2 - 2) ** 2 + (a + b) ** 2 / 10


def exact_mean() -> float:
    """Of F under exp(-F/T), by quadrature."""
    side = torch.linspace(-3, 3, 1501, dtype=torch.float64)
    values = energy(torch.cartesian_prod(side, side))
    return float((values * (-values / T).softmax(0)).sum())


def trained(steps: int) -> fe.diagnostics.LossPlane:
    """A network on scikit-learn's digits, and its loss about where it ended, with the way there."""
    bunch = load_digits()
    batch = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = fe.LangevinAdam(model.parameters(), lr=1e-2)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    way = []
    for _ in range(steps):
        way.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return fe.diagnostics.loss_plane(
        model, loss, batch, directions="trajectory", trajectory=way, points=25, progress=True
    )


def picture(
    ways: dict[str, fe.diagnostics.Trajectory],
    critical: list[fe.diagnostics.CriticalPoint],
    plane: fe.diagnostics.LossPlane,
) -> Figure:
    figure = fe.plots.landscape(energy, trajectories=ways, critical=critical, solid=True, levels=14)
    figure.set_size_inches(13, 6.4)
    grid = figure.add_gridspec(2, 4)
    for column, ax in enumerate(sorted(figure.axes, key=lambda ax: list(["", *ways]).index(ax.get_title()))):
        ax.set_subplotspec(grid[0, column])
    kl, values, loss = (figure.add_subplot(grid[1, k]) for k in (slice(0, 1), slice(1, 2), slice(2, 4)))
    for label, way in ways.items():
        assert way.kl is not None
        kl.plot(way.kl, color=COLORS[label], label=label, lw=1)
        values.plot(way.values.mean(1), color=COLORS[label], lw=1)
    kl.set(yscale="log", xlabel="step", title="KL of consecutive beliefs, nats")
    values.set(yscale="log", xlabel="step", title="mean of F")
    kl.legend(frameon=False, fontsize=8)
    fe.plots.contours(loss, (*plane.axes, plane.values.log()))
    assert plane.path is not None
    fe.plots.paths(loss, plane.path)
    loss.set_title(f"log loss of a network in the plane of its way ({plane.explained:.0%} of it)")
    for ax in (kl, values, loss):
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(10)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("landscape.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that everything runs")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(1)  # tensors this small lose time to a second thread
    steps = 200 if arguments.quick else 1000

    critical = fe.diagnostics.critical_points(energy)
    for point in critical:
        a, b = point.position.tolist()
        print(f"{point.kind} at ({a:.4f}, {b:.4f}): F = {point.value:.6f}, by hand {BY_HAND[point.kind]}")
    start = 1.5 * fe.random.normal((16, 2), seed=SEED).clamp(-1.2, 1.2)
    ways = fe.diagnostics.trajectories(
        energy, start, steps=steps, lr=0.05, temperature=T, std=0.1, seed=SEED, progress=True
    )
    print(f"mean of F at T = {T}, by quadrature {exact_mean():.4f}; over the second half of the steps:")
    for label, way in ways.items():
        each = way.values[steps // 2 :].mean(0)  # of every start
        error = float(each.std()) / len(each) ** 0.5
        print(f"  {label}: {float(each.mean()):.4f} +- {error:.4f} over the starts")
    plane = trained(40 if arguments.quick else 150)
    drawn = io.BytesIO()
    picture(ways, critical, plane).savefig(drawn, dpi=84)
    Image.open(drawn).convert("RGB").quantize(96).save(arguments.out)  # a third of the bytes
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
