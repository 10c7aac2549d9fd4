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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import fekernels as fe
from fekernels.bench import memory

SEED, BATCH, SIDE, ACROSS = 0, 100, 8, 12
BINARISED, SHUFFLED = 0, 1  # streams


class Epochs:
    """Batches of black and white digits, white with the probability that the grey value says: others in each epoch."""

    def __init__(self, grey: Tensor) -> None:
        self.grey, self.epoch = grey, 0

    def __iter__(self) -> Iterator[Tensor]:
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


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def tiles(images: Tensor) -> Tensor:
    framed = F.pad(images.view(-1, SIDE, SIDE), (1, 1, 1, 1), value=1.0)
    return framed.permute(1, 0, 2).reshape(SIDE + 2, -1)


def picture(history: fe.models.History, rows: dict[str, Tensor], before: Tensor, after: Tensor) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    left.plot(history.free_energy, color="#1f5a93", label="free energy, training")
    left.plot(history.validation, color="#b5523b", label="test digits")
    left.set(xlabel="epoch", ylabel="nats a digit", ylim=(None, history.free_energy[0]))
    left.legend(frameon=False, fontsize=8)
    ends = [float(after.min()), float(before.max())]
    middle.plot(ends, ends, color="#8a8a8a", lw=0.8, ls=":")
    middle.plot(before, after, ".", ms=3, color="#1f5a93", alpha=0.6)
    middle.set(xlabel="amortised free energy of a test digit", ylabel="refined")
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
    quick = arguments.quick
    epochs, latents, width, steps, samples = (4, 4, 32, 10, 50) if quick else (200, 12, 200, 100, 500)

    torch.set_num_threads(1)  # layers this small lose time to a second thread
    torch.manual_seed(SEED)
    grey = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    grey = grey[fe.random.bits((len(grey),), seed=SEED, stream=SHUFFLED).argsort()]
    training, test = grey[297:], grey[:297]
    x = binarised(test, 0)

    model, plain = (fe.models.VAE(64, latents, (width,), seed=SEED) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    model.free_energy(x, seed=SEED)  # loads the library
    history, own_seconds = timed(lambda: model.fit(Epochs(training), epochs, validation=[x]))
    _, plain_seconds = timed(lambda: plain_training(plain, Epochs(training), epochs))

    model.eval(), plain.eval()
    _, amortised_seconds = timed(lambda: model.infer(x))
    refined, refined_seconds = timed(lambda: model.infer(x, steps))
    with torch.no_grad():
        before, after, others = (
            found.free_energy(x, posterior=q, samples=samples, reduction="none").free_energy
            for found, q in ((model, None), (model, refined), (plain, None))
        )
        evidence, other = (-found.importance_weighted_bound(x, samples).mean() for found in (model, plain))
    print(history)
    print("| test digits, nats each | free energy | refined | -log p(x), importance-weighted | training, s |")
    print("|---|---|---|---|---|")
    print(f"| models.VAE | {before.mean():.2f} | {after.mean():.2f} | {evidence:.2f} | {own_seconds:.1f} |")
    print(f"| plain torch | {others.mean():.2f} | | {other:.2f} | {plain_seconds:.1f} |")
    worse = int((after > before + 0.05).sum())
    print(
        f"refinement gains {(before - after).mean():.3f} nats a digit, at most {(before - after).max():.2f};"
        f" {worse} of {len(x)} are worse by more than 0.05"
    )
    for name, k, copies, seconds in (
        ("amortised", 0, 20 if quick else 100, amortised_seconds),
        (f"{steps} steps", 2, 2 if quick else 10, refined_seconds),
    ):
        many = x.repeat(copies, 1)
        model.infer(x, k)
        grown = memory.peak(lambda k=k, many=many: model.infer(many, k)) / len(many) / 1e3
        print(f"{name}: {1e6 * seconds / len(x):.0f} us a digit, peak {grown:.1f} kB a digit of a batch")
    kept, weights = 2 * 4 * latents, sum(weight.nbytes for weight in model.parameters()) / 1e3
    print(f"to keep: {weights:.0f} kB of weights; without an encoder {kept} bytes more for every digit")
    with torch.no_grad():
        rows = {"digits": test[:ACROSS], "seen": x[:ACROSS], "reconstructed": model.reconstruct(x[:ACROSS])}
        rows["made up"] = model.sample(ACROSS, seed=SEED, mean=True)
    picture(history, rows, before, after).savefig(arguments.out, dpi=90)
    print(arguments.out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
