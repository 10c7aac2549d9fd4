"""Two small problems for methods that are to know what they do not know: classes, and numbers.

Each has rows to train on, rows to test on, and the test's rows shifted to where no data were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor]


@dataclass
class Problem:
    name: str
    train: Rows
    test: Rows
    shifted: Tensor
    network: Callable[[], nn.Module]
    variance: float | None  # of the noise of a regression; None: classes
    looked: int = 0  # gradients of single rows so far

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean of -log p."""
        if self.variance is None:
            return F.cross_entropy(output, target)
        return (output - target).square().mean() / (2 * self.variance)

    @property
    def size(self) -> int:
        return len(self.train[0])

    def made(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.network()

    def batches(self, size: int, epochs: int, seed: int) -> Iterator[Rows]:
        """Those of all epochs, each in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for part in torch.randperm(self.size, generator=generator).split(size):
                self.looked += len(part)
                yield self.train[0][part], self.train[1][part]


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
