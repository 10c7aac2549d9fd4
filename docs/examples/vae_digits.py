"""A variational autoencoder, its loop written out: ``python docs/examples/vae_digits.py [--out PATH] [--quick]``.

scikit-learn's digits. ``fe.free_energy`` is the loss, ``fe.reparameterize`` the sample of the posterior,
``fe.LangevinAdam`` the optimizer. The free energy of held-out digits stands beside a tighter bound of the same evidence
from many samples. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fekernels as fe

SEED, TEST, BATCH, LR = 0, 297, 100, 1e-3
TEMPERATURE = 0.03  # of Bayes' 1/N; 0 would be Adam. The last quarter of the steps cools to 0
# Each use of noise has a stream of its own.
BINARISE, POSTERIOR, EVALUATE, PRIOR = 0, 1, 1 << 20, 1 << 24


class VAE(nn.Module):
    def __init__(self, pixels: int, width: int, latents: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, width), nn.ReLU(), nn.Linear(width, pixels))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), [B, latents] each."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar


def binarise(grey: Tensor, step: int) -> Tensor:
    """Black and white pixels, white with the probability that the grey value says: new ones at each step."""
    return (fe.random.uniform(grey.shape, seed=SEED, stream=BINARISE, step=step) <= grey).float()


def train(model: VAE, grey: Tensor, steps: int) -> list[float]:
    """The free energy of each step's batch, in nats per digit."""
    hot = TEMPERATURE / len(grey)
    optimizer = fe.LangevinAdam(
        model.parameters(), lr=LR, temperature=hot, prior_precision=1 / len(grey), eps=1e-6, seed=SEED
    )
    order = torch.Generator().manual_seed(SEED)
    losses = []
    for step in tqdm(range(steps), desc="train"):
        x = binarise(grey[torch.randint(len(grey), (BATCH,), generator=order)], step)
        mean, logvar = model.posterior(x)
        z = fe.reparameterize(mean, logvar, seed=SEED, stream=POSTERIOR, step=step)
        logits = model.decoder(z)
        # The decoder's last layer is linear and does not need its output again, so the gradient may overwrite it.
        terms = fe.free_energy(logits, x, mean, logvar, likelihood="bernoulli", inplace_backward=True)
        optimizer.zero_grad()
        terms.free_energy.backward()
        optimizer.step()
        losses.append(terms.free_energy.item())
        left = min(1.0, 4 * (1 - step / steps))
        for group in optimizer.param_groups:
            group["lr"], group["temperature"] = LR * left, hot * left
    return losses


@torch.no_grad()
def evaluate(model: VAE, x: Tensor, samples: int) -> tuple[fe.FreeEnergyTerms, Tensor]:
    """Free energy (a mean over samples of z), and -log p(x) estimated with as many: means over the digits, in nats."""
    mean, logvar = model.posterior(x)
    energies, log_w = [], []
    for stream in tqdm(range(samples), desc="evaluate", leave=False):
        z = fe.reparameterize(mean, logvar, seed=SEED, stream=EVALUATE + stream)
        energies.append(fe.energy(model.decoder(z), x, "bernoulli"))
        # log w = log p(x | z) + log p(z) - log q(z | x)
        log_w.append(-energies[-1] - fe.monte_carlo_kl(mean, logvar, z))
    energy, kl = torch.stack(energies).mean(), fe.gaussian_kl(mean, logvar, reduction="mean")
    bound = fe.importance_weighted_bound(torch.stack(log_w)).mean()
    return fe.FreeEnergyTerms(energy + kl, energy, kl), -bound


@torch.no_grad()
def picture(model: VAE, grey: Tensor, x: Tensor, latents: int, losses: list[float]) -> Figure:
    """Digits, what the model saw of them, their reconstructions, digits that it makes up, and the loss."""
    count = 16
    noise = fe.random.normal((count, latents), seed=SEED, stream=PRIOR)
    rows = {
        "test digits": grey[:count],
        "binarised": x[:count],
        "reconstructions": torch.sigmoid(model.decoder(model.posterior(x[:count])[0])),
        "samples": torch.sigmoid(model.decoder(noise)),
    }
    tiles = [nn.functional.pad(images.view(-1, 8, 8), (1, 1, 1, 1), value=1.0) for images in rows.values()]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1.4, 1])
    above.imshow(
        torch.cat([row.permute(1, 0, 2).reshape(10, -1) for row in tiles]), cmap="gray", vmin=0, vmax=1
    )
    above.set(xticks=[], yticks=[10 * k + 5 for k in range(len(rows))], yticklabels=list(rows))
    smooth = max(1, len(losses) // 200)
    means = torch.tensor(losses[: len(losses) // smooth * smooth]).view(-1, smooth).mean(1)
    below.plot(torch.arange(len(means)) * smooth, means, color="#1f5a93", lw=1)
    below.set(xlabel="step", ylabel="free energy, nats a digit", ylim=(None, float(means[len(means) // 20])))
    below.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("vae_digits.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that everything runs")
    arguments = parser.parse_args(argv)
    steps, width, latents, samples = (300, 64, 8, 50) if arguments.quick else (6000, 256, 16, 1000)
    started = time.perf_counter()

    torch.set_num_threads(1)  # layers this small lose time to a second thread
    torch.manual_seed(SEED)
    grey = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    grey = grey[torch.randperm(len(grey))]
    training, test = grey[TEST:], grey[:TEST]
    model = VAE(grey.shape[1], width, latents)
    x = binarise(test, step=steps)

    before = evaluate(model, x, samples)[0].free_energy
    losses = train(model, training, steps)
    terms, iwae = evaluate(model, x, samples)
    print(f"{len(training)} digits to train, {len(test)} to test, {steps} steps")
    print(f"test free energy {terms.free_energy:.2f} nats per digit"
          f" = energy {terms.energy:.2f} + KL {terms.kl:.2f}")  # fmt: skip
    print(f"(untrained {before:.2f}; -log p(x) by {samples} importance-weighted samples: {iwae:.2f})")
    picture(model, test, x, latents, losses).savefig(arguments.out, dpi=110)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
