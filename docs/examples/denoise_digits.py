"""Digits denoised by a model that learns by its free energy: ``python docs/examples/denoise_digits.py [--quick]``.

An Ising model over pixels says that neighbours agree, and a noisy pixel is evidence for what it shows. How much of
either, and a field, are learned from pairs of clean and noisy digits by the gradient of the conditional log-likelihood,
energy(clean) - F, with F the Bethe free energy of ``fe.graph.belief_propagation``. Other digits are then denoised by
the largest belief. ``--out PNG`` says where the picture goes. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import fekernels as fe

SPINS = torch.tensor([-1.0, 1.0])
FLIPPED, SIDE = 0.15, 32
AT = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
EDGES = torch.cat(
    [torch.stack(pair, -1).view(-1, 2) for pair in ((AT[:-1], AT[1:]), (AT[:, :-1], AT[:, 1:]))]
)


def digits(count: int) -> tuple[Tensor, Tensor]:
    """[count, 32, 32]: digits in black and white, and with pixels flipped by chance."""
    images = torch.tensor(load_digits().images[:count] / 16, dtype=torch.float32)[:, None]
    large = torch.nn.functional.interpolate(images, size=(SIDE, SIDE), mode="bicubic")[:, 0]
    clean = (large > 0.5).long()
    flips = fe.random.uniform(clean.shape, seed=0) < FLIPPED
    return clean, clean ^ flips


def posterior(noisy: Tensor, coupling: Tensor, evidence: Tensor, field: Tensor) -> fe.graph.BeliefPropagation:
    """Of the pixels given the noisy ones: an Ising prior, every image a problem of its own over the same lattice."""
    unary = (evidence * SPINS[noisy].flatten(1)[..., None] + field) * SPINS
    return fe.graph.belief_propagation(
        unary, EDGES, coupling * torch.outer(SPINS, SPINS), damping=0.2, tol=1e-4
    )


def learn(clean: Tensor, noisy: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """Coupling, evidence and field by maximum likelihood of clean given noisy: the energy of the clean, less F."""
    settings = torch.tensor([0.2, 0.5, 0.0], requires_grad=True)
    optimizer = torch.optim.Adam([settings], lr=0.05)
    pixels = SPINS[clean].flatten(1)
    agree = (pixels[:, EDGES[:, 0]] * pixels[:, EDGES[:, 1]]).sum(1)
    history = []
    for _ in tqdm(range(steps), desc="learn"):
        coupling, evidence, field = settings
        free_energy = posterior(noisy, coupling, evidence, field).bethe_free_energy
        energy = -coupling * agree - (pixels * (evidence * SPINS[noisy].flatten(1) + field)).sum(1)
        loss = (energy - free_energy).mean() / pixels.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    return settings.detach(), history


def draw(path: Path, history: list[float], images: list[Tensor]) -> None:
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.2])
    left.plot(history, color="#c0392b")
    left.set(xlabel="step", ylabel="nats a pixel", title="-log p(clean | noisy)")
    left.spines[["top", "right"]].set_visible(False)
    right.imshow(torch.cat([torch.cat(list(row), 1) for row in images], 0).numpy(), cmap="gray_r")
    right.set(xticks=[], title=f"digits: clean, {FLIPPED:.0%} flipped, beliefs")
    right.set_yticks([16, 48, 80], ["clean", "noisy", "belief"])
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer digits and steps")
    parser.add_argument("--out", type=Path, default=Path("denoise_digits.png"), help="the picture")
    arguments = parser.parse_args()
    clean, noisy = digits(40 if arguments.quick else 400)
    half = len(clean) // 2
    settings, history = learn(clean[:half], noisy[:half], 15 if arguments.quick else 60)
    print(
        f"learned: coupling {settings[0]:.3f}, evidence {settings[1]:.3f} (log-odds of the noise halved:"
        f" {math.log((1 - FLIPPED) / FLIPPED) / 2:.3f}), field {settings[2]:.3f};"
        f" loss {history[0]:.4f} -> {history[-1]:.4f} nats a pixel"
    )
    found = posterior(noisy[half:], *settings)
    guess = found.assignment.view_as(clean[half:])
    wrong = [float((each != clean[half:]).float().mean()) for each in (noisy[half:], guess)]
    print(
        f"pixels wrong on {len(guess)} other digits: {wrong[0]:.4f} noisy, {wrong[1]:.4f} by the largest belief"
    )
    shown = slice(half, half + 8)
    beliefs = found.beliefs[..., 1].view_as(guess)
    draw(arguments.out, history, [clean[shown].float(), noisy[shown].float(), beliefs[:8]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
