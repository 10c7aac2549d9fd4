"""A Boltzmann machine on binarised digits, its likelihood exact: ``python docs/examples/rbm_digits.py [--quick]``.

Trains 16 hidden units on scikit-learn's digits (8 x 8, on where the grey level is 8 or more), adds up log Z after every
few epochs, and holds annealed importance sampling, forward and in reverse, against it. The picture: the likelihood of
training and test digits over the epochs, what contrastive divergence steps by, test digits, and draws.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

import fekernels as fe

SEED, HIDDEN, SIDE = 0, 16, 8
TRAIN, TEST = "#444444", "#b5523b"


def digits() -> tuple[Tensor, Tensor]:
    """1,400 to train, 397 to test, [n, 64] of 0 and 1."""
    data = torch.tensor(load_digits().data >= 8, dtype=torch.float32)
    order = fe.random.bits((len(data),), seed=SEED).argsort()
    return data[order[:1400]], data[order[1400:]]


def mosaic(images: Tensor, across: int) -> Tensor:
    """[n, 64] as one picture, with a line between them."""
    framed = torch.nn.functional.pad(images.view(-1, SIDE, SIDE), (0, 1, 0, 1), value=0.5)
    rows = framed.view(-1, across, SIDE + 1, SIDE + 1).transpose(1, 2)
    return rows.reshape(-1, across * (SIDE + 1))[:-1, :-1]


def picture(curve: list[tuple[int, float, float]], baseline: float, test: Tensor, drawn: Tensor) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    epochs, train_curve, test_curve = zip(*curve, strict=True)
    left.plot(epochs, train_curve, color=TRAIN, label="training digits")
    left.plot(epochs, test_curve, color=TEST, label="test digits")
    left.axhline(baseline, color="#8a8a8a", ls=":", label="independent pixels")
    left.set(xlabel="epoch", ylabel="log-likelihood, nats a digit (exact)")
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    for ax, images, title in ((middle, test, "test digits"), (right, drawn, "draws of the machine")):
        ax.imshow(mosaic(images, 6), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[], title=title)
        ax.title.set_fontsize(10)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("rbm.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="few epochs: shows that everything runs")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small lose time to a second thread
    epochs, every = (12, 4) if arguments.quick else (150, 5)
    train, test = digits()

    rbm = fe.models.BernoulliRBM(64, HIDDEN, seed=SEED)
    curve: list[tuple[int, float, float]] = []

    @torch.no_grad()
    def measure(rbm: fe.models.BernoulliRBM, epoch: int) -> None:
        if epoch % every == 0:
            log_z = rbm.log_partition("exact")
            curve.append((epoch, *(float(rbm.log_prob(x, log_z=log_z).mean()) for x in (train, test))))

    rbm.set_base_rates(train)
    with torch.no_grad():
        rates = torch.sigmoid(rbm.visible_bias)
        baseline = float(-torch.nn.functional.binary_cross_entropy(rates.expand_as(test), test) * 64)
    measure(rbm, 0)
    rbm.fit(train, epochs=epochs, lr=0.02, batch_size=50, k=5, callback=measure)

    with torch.no_grad():
        exact = float(rbm.log_partition("exact"))
    forward = rbm.log_partition("ais", base_rates=train, seed=SEED)
    reverse = rbm.log_partition(
        "reverse_ais", base_rates=train, samples=rbm.exact_sample(1000, seed=SEED), seed=SEED
    )
    both, error = fe.anneal.bennett_acceptance_ratio(forward, reverse)
    print(f"log Z, exact over 2^{HIDDEN} states: {exact:.4f}")
    print(f"annealed: {forward.log_z:.4f} +- {forward.standard_error:.4f}, "
          f"{forward.effective_sample_size:.0f} effective of 1000")  # fmt: skip
    print(f"in reverse: {reverse.log_z:.4f} +- {reverse.standard_error:.4f}")
    print(f"Bennett, from both: {both:.4f} +- {error:.4f}")
    print(f"test digits, nats: independent pixels {baseline:.2f}, the machine {curve[-1][2]:.2f}")
    chains = rbm.sample(36, 20 if arguments.quick else 2000, seed=1, probabilities=True)
    picture(curve, baseline, test[:36], chains).savefig(arguments.out, dpi=110)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
