"""Amortised and refined inference on digits, beside the same model in plain PyTorch: ``python docs/examples/vae.py``.

Trains ``fe.models.VAE`` by ``fit`` on scikit-learn's digits, binarised anew in every epoch, and the same networks from
the same weights in plain PyTorch. Prints the free energy of held-out digits, that after refining each digit's
posterior, the bound of 500 importance-weighted samples, and what both kinds of inference take in time and memory. The
picture: the course of training, what refinement gains digit by digit, digits, reconstructions and draws.
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
from fekernels.bench import memory

SEED, BATCH, SIDE, ACROSS = 0, 100, 8, 12
BINARISED, SHUFFLED = 0, 1  # streams


@dataclass(frozen=True)
class Settings:
    epochs: int = 200
    latents: int = 12
    width: int = 200
    refine_steps: int = 100
    samples: int = 500
    copies: int = (
        10  # of the test digits, whose refinement's memory is measured; of the encoder's ten times as many
    )


QUICK = Settings(epochs=4, latents=4, width=32, refine_steps=10, samples=50, copies=2)


class Epochs:
    """Batches of black and white digits, white with the probability that the grey value says: others in each epoch."""

    def __init__(self, grey: Tensor) -> None:
        self.grey, self.epoch = grey, 0

    def __iter__(self):
        self.epoch += 1
        order = fe.random.bits((len(self.grey),), seed=SEED, stream=SHUFFLED, step=self.epoch).argsort()
        return iter(binarised(self.grey, self.epoch)[order].split(BATCH))


def binarised(grey: Tensor, epoch: int) -> Tensor:
    return (fe.random.uniform(grey.shape, seed=SEED, stream=BINARISED, step=epoch) <= grey).float()


def plain_training(model: fe.models.VAE, batches: Epochs, epochs: int) -> None:
    """The same networks, loss and optimizer, without this package."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(epochs), desc="plain", leave=False):
        for x in batches:
            h = model.encoder(x)
            mean, logvar = model.fc_mean(h), model.fc_logvar(h)
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            energy = F.binary_cross_entropy_with_logits(model.decoder(z), x, reduction="sum")
            kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
            optimizer.zero_grad()
            ((energy + kl) / len(x)).backward()
            optimizer.step()


@torch.no_grad()
def bounds(model: fe.models.VAE, x: Tensor, samples: int) -> tuple[float, float]:
    """Free energy and -log p(x) by importance-weighted samples, nats per digit."""
    model.eval()
    free_energy = float(model.free_energy(x, samples=samples).free_energy)
    return free_energy, -float(model.importance_weighted_bound(x, samples).mean())


def tiles(images: Tensor) -> Tensor:
    framed = nn.functional.pad(images.view(-1, SIDE, SIDE), (1, 1, 1, 1), value=1.0)
    return framed.permute(1, 0, 2).reshape(SIDE + 2, -1)


@torch.no_grad()
def picture(
    model: fe.models.VAE, history: fe.models.History, grey: Tensor, x: Tensor, before: Tensor, after: Tensor
) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    left.plot(history.free_energy, color="#1f5a93", label="free energy, training")
    left.plot(history.validation, color="#b5523b", label="test digits")
    left.set(xlabel="epoch", ylabel="nats a digit", ylim=(None, history.free_energy[0]))
    left.legend(frameon=False, fontsize=8)
    low, high = float(after.min()), float(before.max())
    middle.plot([low, high], [low, high], color="#8a8a8a", lw=0.8, ls=":")
    middle.plot(before, after, ".", ms=3, color="#1f5a93", alpha=0.6)
    middle.set(xlabel="amortised free energy of a test digit", ylabel="refined")
    rows = {
        "digits": grey[:ACROSS],
        "seen": x[:ACROSS],
        "reconstructed": model.reconstruct(x[:ACROSS]),
        "made up": model.sample(ACROSS, seed=SEED, mean=True),
    }
    right.imshow(torch.cat([tiles(images) for images in rows.values()]), cmap="gray", vmin=0, vmax=1)
    right.set(xticks=[], yticks=[(SIDE + 2) * (k + 0.5) for k in range(len(rows))], yticklabels=list(rows))
    for ax in (left, middle):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("vae.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="few epochs: shows that everything runs")
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else Settings()

    torch.set_num_threads(1)  # layers this small lose time to a second thread
    torch.manual_seed(SEED)
    grey = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    grey = grey[fe.random.bits((len(grey),), seed=SEED, stream=SHUFFLED).argsort()]
    training, test = grey[297:], grey[:297]
    x = binarised(test, 0)

    model, plain = (fe.models.VAE(64, settings.latents, (settings.width,), seed=SEED) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    model.free_energy(x, seed=SEED)  # loads the library
    started = time.perf_counter()
    history = model.fit(Epochs(training), settings.epochs, validation=[x])
    own_seconds = time.perf_counter() - started
    started = time.perf_counter()
    plain_training(plain, Epochs(training), settings.epochs)
    plain_seconds = time.perf_counter() - started

    model.eval()
    started = time.perf_counter()
    amortised = model.infer(x)
    amortised_seconds = time.perf_counter() - started
    refined = model.infer(x, settings.refine_steps)
    refined_seconds = time.perf_counter() - started - amortised_seconds
    with torch.no_grad():
        before, after = (
            model.free_energy(x, posterior=q, samples=settings.samples, reduction="none").free_energy
            for q in (amortised, refined)
        )
    print(history)
    print("| test digits, nats each | free energy | refined | -log p(x), importance-weighted | training, s |")
    print("|---|---|---|---|---|")
    free_energy, evidence = bounds(model, x, settings.samples)
    print(f"| models.VAE | {free_energy:.2f} | {after.mean():.2f} | {evidence:.2f} | {own_seconds:.1f} |")
    free_energy, evidence = bounds(plain, x, settings.samples)
    print(f"| plain torch | {free_energy:.2f} | | {evidence:.2f} | {plain_seconds:.1f} |")
    worse = int((after > before + 0.05).sum())
    print(
        f"refinement gains {(before - after).mean():.3f} nats a digit, at most {(before - after).max():.2f};"
        f" {worse} of {len(x)} are worse by more than 0.05"
    )
    kept = 2 * 4 * settings.latents
    for name, steps, copies, seconds in (
        ("amortised", 0, 10 * settings.copies, amortised_seconds),
        (f"{settings.refine_steps} steps", 2, settings.copies, refined_seconds),
    ):
        many = x.repeat(copies, 1)
        model.infer(x, steps)
        grown = memory.peak(lambda steps=steps, many=many: model.infer(many, steps))
        print(
            f"{name}: {1e6 * seconds / len(x):.0f} us a digit, peak {grown / len(many) / 1e3:.1f} kB a digit of a batch"
        )
    weights = sum(weight.nbytes for weight in model.parameters())
    print(f"to keep: {weights / 1e3:.0f} kB of weights; without an encoder {kept} bytes more for every digit")
    picture(model, history, test, x, before, after).savefig(arguments.out, dpi=90)
    print(arguments.out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
