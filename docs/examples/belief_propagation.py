"""The Ising model, by messages: ``python docs/examples/belief_propagation.py [--quick] [--out PNG]``.

Prints the table of docs/belief_propagation.md: the Bethe free energy of a periodic lattice beside that of the infinite
tree with four neighbours, which it must equal to rounding, and beside Onsager's exact one, which it misses by the
lattice's loops. Then it denoises digits with a model whose coupling it learns by the gradient of the free energy.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import fekernels as fe

SPINS = torch.tensor([-1.0, 1.0])
COUPLINGS = (0.1, 0.2, 0.3, 0.35, 0.4, 0.4407, 0.5, 0.6, 0.8)
FLIPPED = 0.15


def lattice(rows: int, columns: int, periodic: bool) -> Tensor:
    """[E, 2]: neighbours on a square lattice, its opposite sides joined where it is periodic."""
    at = torch.arange(rows * columns).view(rows, columns)
    pairs = []
    for dim, size in ((0, rows), (1, columns)):
        last = size if periodic else size - 1
        pairs.append(
            torch.stack([at.narrow(dim, 0, last), at.roll(-1, dim).narrow(dim, 0, last)], -1).view(-1, 2)
        )
    return torch.cat(pairs)


def ising(coupling: float, rows: int) -> tuple[float, float, int]:
    """-log Z per spin and magnetisation of Bethe, and the iterations. The start leans towards +1."""
    spins, edges = SPINS.double(), lattice(rows, rows, periodic=True)
    start = torch.zeros(len(edges), 2, 2, dtype=torch.float64)
    start[..., 0] = -0.1
    found = fe.graph.belief_propagation(
        torch.zeros(rows * rows, 2, dtype=torch.float64),
        edges,
        coupling * torch.outer(spins, spins),
        messages=start,
        max_iters=20_000,
        tol=1e-12,
    )
    return (
        float(found.bethe_free_energy) / rows**2,
        float((found.beliefs @ spins).mean()),
        int(found.iterations),
    )


def bethe_lattice(coupling: float) -> tuple[float, float]:
    """The same of the infinite tree with four neighbours, from its one cavity field h = 3 u."""
    u, before = 0.1, 0.0
    while abs(u - before) > 1e-15:
        u, before = math.atanh(math.tanh(coupling) * math.tanh(3 * u)), u
    log_z_spin = math.log(2 * math.cosh(4 * u))
    log_z_edge = math.log(2 * math.exp(coupling) * math.cosh(6 * u) + 2 * math.exp(-coupling))
    return 3 * log_z_spin - 2 * log_z_edge, math.tanh(4 * u)


def onsager(coupling: float) -> tuple[float, float]:
    """The infinite lattice: -log Z per spin (Onsager 1944) and magnetisation (Yang 1952)."""
    k = 2 * math.sinh(2 * coupling) / math.cosh(2 * coupling) ** 2
    angles = (torch.arange(4000, dtype=torch.float64) + 0.5) * (math.pi / 4000)
    integral = ((1 + (1 - k * k * angles.sin() ** 2).clamp_min(0).sqrt()) / 2).log().mean() / 2
    magnetisation = max(0.0, 1 - math.sinh(2 * coupling) ** -4) ** 0.125
    return -math.log(2 * math.cosh(2 * coupling)) - float(integral), magnetisation


def temperatures(rows: int) -> list[tuple[float, ...]]:
    print(
        "| coupling | Bethe, lattice | Bethe, infinite tree | Onsager | gap | magnetisation | exact | iterations |"
    )
    print("|---|---|---|---|---|---|---|---|")
    table = []
    for coupling in COUPLINGS:
        free_energy, magnetisation, iterations = ising(coupling, rows)
        tree, exact = bethe_lattice(coupling), onsager(coupling)
        print(
            f"| {coupling} | {free_energy:.9f} | {tree[0]:.9f} | {exact[0]:.9f} | {free_energy - exact[0]:.6f}"
            f" | {magnetisation:.4f} | {exact[1]:.4f} | {iterations} |"
        )
        table.append((coupling, free_energy - exact[0], magnetisation, exact[1]))
    return table


def digits(count: int) -> tuple[Tensor, Tensor]:
    """[count, 32, 32]: digits in black and white, and with pixels flipped by chance."""
    images = torch.tensor(load_digits().images[:count] / 16, dtype=torch.float32)[:, None]
    large = torch.nn.functional.interpolate(images, size=(32, 32), mode="bicubic")[:, 0]
    clean = (large > 0.5).long()
    flips = fe.random.uniform(clean.shape, seed=0) < FLIPPED
    return clean, clean ^ flips


def posterior(noisy: Tensor, coupling: Tensor, evidence: Tensor, field: Tensor) -> fe.graph.BeliefPropagation:
    """Of the pixels given the noisy ones: an Ising prior, every image a problem of its own over the same lattice."""
    unary = (evidence * SPINS[noisy].flatten(1)[..., None] + field) * SPINS
    return fe.graph.belief_propagation(
        unary, lattice(32, 32, periodic=False), coupling * torch.outer(SPINS, SPINS), damping=0.2, tol=1e-4
    )


def learn(clean: Tensor, noisy: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """Coupling, evidence and field by maximum likelihood of clean given noisy: the energy of the clean, less F."""
    settings = torch.tensor([0.2, 0.5, 0.0], requires_grad=True)
    optimizer = torch.optim.Adam([settings], lr=0.05)
    edges = lattice(32, 32, periodic=False)
    pixels = SPINS[clean].flatten(1)
    agree = (pixels[:, edges[:, 0]] * pixels[:, edges[:, 1]]).sum(1)
    history = []
    for _ in range(steps):
        coupling, evidence, field = settings
        free_energy = posterior(noisy, coupling, evidence, field).bethe_free_energy
        energy = -coupling * agree - (pixels * (evidence * SPINS[noisy].flatten(1) + field)).sum(1)
        loss = (energy - free_energy).mean() / pixels.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    return settings.detach(), history


def draw(path: Path, table: list[tuple[float, ...]], images: list[Tensor]) -> None:
    from fekernels import plots

    figure, axes = plots.panels(1, 2, (9.0, 3.2))
    columns = list(zip(*table, strict=True))
    left = axes[0, 0]
    left.plot(columns[0], columns[2], "o-", color="#c0392b", ms=4, label="messages (Bethe)")
    left.plot(columns[0], columns[3], "s-", color="#2c3e50", ms=4, label="exact (Yang)")
    left.axvline(math.log(2) / 2, color=plots.GREY, lw=0.8, ls=":")
    left.axvline(math.log(1 + math.sqrt(2)) / 2, color=plots.GREY, lw=0.8, ls="--")
    left.set(xlabel="coupling", ylabel="magnetisation", title="Ising model on the square lattice")
    left.legend(frameon=False)
    right = axes[0, 1]
    right.imshow(torch.cat([torch.cat(list(row), 1) for row in images], 0).numpy(), cmap="gray_r")
    right.set(xticks=[], title="digits: clean, 15% flipped, beliefs")
    right.set_yticks([16, 48, 80], ["clean", "noisy", "belief"])
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller lattice, fewer digits")
    parser.add_argument("--out", type=Path, default=Path("belief_propagation.png"), help="the picture")
    arguments = parser.parse_args()
    table = temperatures(8 if arguments.quick else 32)
    clean, noisy = digits(40 if arguments.quick else 400)
    half = len(clean) // 2
    settings, history = learn(clean[:half], noisy[:half], 15 if arguments.quick else 60)
    print(
        f"\nlearned: coupling {settings[0]:.3f}, evidence {settings[1]:.3f} (log-odds of the noise halved:"
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
    draw(arguments.out, table, [clean[shown].float(), noisy[shown].float(), beliefs[:8]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
