"""A variational autoencoder on scikit-learn's digits: ``python docs/examples/vae_digits.py [--out PATH] [--quick]``.

``fe.free_energy`` is the loss, ``fe.reparameterize`` the sample of the posterior, ``fe.LangevinAdam`` the optimizer.
The free energy of held-out digits stands beside a tighter bound of the same evidence from many samples. Needs the extra
"demo".
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fekernels as fe

SEED = 0
# Each use of noise has a stream of its own.
BINARISE, POSTERIOR, TEST, PRIOR = 0, 1, 1 << 20, 1 << 24


@dataclass(frozen=True)
class Settings:
    steps: int = 6000
    batch: int = 100
    width: int = 256
    latents: int = 16
    lr: float = 1e-3
    # Of Bayes' 1/N; T = 0 would be Adam. The last quarter of the steps cools to 0.
    temperature: float = 0.03
    test: int = 297
    samples: int = 1000  # of the tighter bound


QUICK = Settings(steps=300, width=64, latents=8, samples=50)


class VAE(nn.Module):
    def __init__(self, pixels: int, settings: Settings) -> None:
        super().__init__()
        width, latents = settings.width, settings.latents
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, width), nn.ReLU(), nn.Linear(width, pixels))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), [B, latents] each."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar


def binarise(grey: Tensor, step: int) -> Tensor:
    """Black and white pixels, white with the probability that the grey value says: new ones at each step."""
    return (fe.random.uniform(grey.shape, seed=SEED, stream=BINARISE, step=step) <= grey).float()


def train(model: VAE, grey: Tensor, settings: Settings, progress: bool = True) -> list[float]:
    """The free energy of each step's batch, in nats per digit."""
    count = len(grey)
    optimizer = fe.LangevinAdam(
        model.parameters(),
        lr=settings.lr,
        temperature=settings.temperature / count,
        prior_precision=1 / count,
        eps=1e-6,
        seed=SEED,
    )
    order = torch.Generator().manual_seed(SEED)
    losses = []
    for step in tqdm(range(settings.steps), desc="train", disable=not progress):
        rows = torch.randint(count, (settings.batch,), generator=order)
        x = binarise(grey[rows], step)
        mean, logvar = model.posterior(x)
        z = fe.reparameterize(mean, logvar, seed=SEED, stream=POSTERIOR, step=step)
        logits = model.decoder(z)
        # The decoder's last layer is linear and does not need its output again, so the gradient may overwrite it.
        terms = fe.free_energy(logits, x, mean, logvar, likelihood="bernoulli", inplace_backward=True)
        optimizer.zero_grad()
        terms.free_energy.backward()
        optimizer.step()
        losses.append(terms.free_energy.item())
        left = 1 - step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, 4 * left)
            group["temperature"] = settings.temperature / count * min(1.0, 4 * left)
    return losses


@torch.no_grad()
def evaluate(model: VAE, x: Tensor, samples: int) -> tuple[fe.FreeEnergyTerms, Tensor]:
    """Free energy (a mean over samples of z), and -log p(x) estimated with as many: means over the digits, in nats."""
    mean, logvar = model.posterior(x)
    parts = []
    for stream in tqdm(range(samples), desc="evaluate", leave=False):
        z = fe.reparameterize(mean, logvar, seed=SEED, stream=TEST + stream)
        energy = fe.energy(model.decoder(z), x, "bernoulli")
        # log w = log p(x | z) + log p(z) - log q(z | x)
        parts.append((energy, -energy - fe.monte_carlo_kl(mean, logvar, z)))
    energies, log_w = (torch.stack(column) for column in zip(*parts, strict=True))
    energy, kl = energies.mean(), fe.gaussian_kl(mean, logvar, reduction="mean")
    bound = fe.importance_weighted_bound(log_w).mean()
    return fe.FreeEnergyTerms(energy + kl, energy, kl), -bound


@torch.no_grad()
def picture(model: VAE, grey: Tensor, x: Tensor, settings: Settings, losses: list[float]) -> Figure:
    """Digits, what the model saw of them, their reconstructions, digits that it makes up, and the loss."""
    count = 16
    mean, _ = model.posterior(x[:count])
    noise = fe.random.normal((count, settings.latents), seed=SEED, stream=PRIOR)
    rows = {
        "test digits": grey[:count],
        "binarised": x[:count],
        "reconstructions": torch.sigmoid(model.decoder(mean)),
        "samples": torch.sigmoid(model.decoder(noise)),
    }
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    grid = figure.add_gridspec(len(rows) + 1, 1, height_ratios=[1] * len(rows) + [2.4])
    for i, (name, images) in enumerate(rows.items()):
        ax = figure.add_subplot(grid[i])
        tiles = torch.nn.functional.pad(images.view(-1, 8, 8), (1, 1, 1, 1), value=1.0)
        ax.imshow(tiles.permute(1, 0, 2).reshape(10, -1), cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.spines[:].set_visible(False)
    ax = figure.add_subplot(grid[-1])
    smooth = max(1, len(losses) // 200)
    means = torch.tensor(losses[: len(losses) // smooth * smooth]).view(-1, smooth).mean(1)
    ax.plot(torch.arange(len(means)) * smooth, means, color="#1f5a93", lw=1)
    ax.set(xlabel="step", ylabel="free energy, nats per digit", ylim=(None, float(means[len(means) // 20])))
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("vae_digits.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that everything runs")
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else Settings()
    started = time.perf_counter()

    torch.set_num_threads(1)  # layers this small lose time to a second thread
    torch.manual_seed(SEED)
    grey = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    grey = grey[torch.randperm(len(grey))]
    training, test = grey[settings.test :], grey[: settings.test]
    model = VAE(grey.shape[1], settings)
    x = binarise(test, step=settings.steps)

    before = evaluate(model, x, settings.samples)[0].free_energy
    losses = train(model, training, settings)
    terms, iwae = evaluate(model, x, settings.samples)
    print(f"{len(training)} digits to train, {len(test)} to test, {settings.steps} steps")
    print(
        f"test free energy {terms.free_energy:.2f} nats per digit = energy {terms.energy:.2f} + KL {terms.kl:.2f}"
    )
    print(
        f"(untrained {before:.2f}; -log p(x) by {settings.samples} importance-weighted samples: {iwae:.2f})"
    )
    picture(model, test, x, settings, losses).savefig(arguments.out, dpi=130)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
