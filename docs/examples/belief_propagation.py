"""The Ising model, by messages: ``python docs/examples/belief_propagation.py [--quick] [--out PNG]``.

Prints the table of docs/belief_propagation.md: the Bethe free energy of a periodic lattice beside that of the infinite
tree with four neighbours, which it must equal to rounding, and beside Onsager's exact one, which it misses by the
lattice's loops. The picture: the magnetisation of both over the coupling, and what the free energy misses.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import fekernels as fe
from fekernels import plots

SPINS = torch.tensor([-1.0, 1.0], dtype=torch.float64)
COUPLINGS = (0.1, 0.2, 0.3, 0.35, 0.4, 0.4407, 0.5, 0.6, 0.8)


def ising(coupling: float, rows: int) -> tuple[float, float, int]:
    """-log Z per spin and magnetisation of Bethe, and the iterations. The start leans towards +1."""
    at = torch.arange(rows * rows).view(rows, rows)
    edges = torch.cat([torch.stack([at, at.roll(-1, dim)], -1).view(-1, 2) for dim in (0, 1)])
    start = torch.zeros(len(edges), 2, 2, dtype=torch.float64)
    start[..., 0] = -0.1
    found = fe.graph.belief_propagation(
        torch.zeros(rows * rows, 2, dtype=torch.float64),
        edges,
        coupling * torch.outer(SPINS, SPINS),
        messages=start,
        max_iters=20_000,
        tol=1e-12,
    )
    magnetisation = float((found.beliefs @ SPINS).mean())
    return float(found.bethe_free_energy) / rows**2, magnetisation, int(found.iterations)


def bethe_lattice(coupling: float) -> float:
    """-log Z per spin of the infinite tree with four neighbours, from its one cavity field h = 3 u."""
    u, before = 0.1, 0.0
    while abs(u - before) > 1e-15:
        u, before = math.atanh(math.tanh(coupling) * math.tanh(3 * u)), u
    log_z_spin = math.log(2 * math.cosh(4 * u))
    log_z_edge = math.log(2 * math.exp(coupling) * math.cosh(6 * u) + 2 * math.exp(-coupling))
    return 3 * log_z_spin - 2 * log_z_edge


def onsager(coupling: float) -> tuple[float, float]:
    """The infinite lattice: -log Z per spin (Onsager 1944) and magnetisation (Yang 1952)."""
    k = 2 * math.sinh(2 * coupling) / math.cosh(2 * coupling) ** 2
    angles = (torch.arange(4000, dtype=torch.float64) + 0.5) * (math.pi / 4000)
    integral = ((1 + (1 - k * k * angles.sin() ** 2).clamp_min(0).sqrt()) / 2).log().mean() / 2
    magnetisation = max(0.0, 1 - math.sinh(2 * coupling) ** -4) ** 0.125
    return -math.log(2 * math.cosh(2 * coupling)) - float(integral), magnetisation


def draw(path: Path, rows: list[tuple[float, ...]]) -> None:
    coupling, gap, magnetisation, exact = zip(*rows, strict=True)
    figure, axes = plots.panels(1, 2, (9.0, 3.2))
    left, right = axes[0]
    left.plot(coupling, magnetisation, "o-", color="#c0392b", ms=4, label="messages (Bethe)")
    left.plot(coupling, exact, "s-", color="#2c3e50", ms=4, label="exact (Yang)")
    left.set(ylabel="magnetisation", title="Ising model on the square lattice")
    left.legend(frameon=False)
    right.plot(coupling, gap, "o-", color="#c0392b", ms=4)
    right.set(yscale="log", ylabel="nats a spin", title="free energy of Bethe, less Onsager's")
    for ax in (left, right):  # where each of the two orders
        ax.axvline(math.log(2) / 2, color=plots.GREY, lw=0.8, ls=":")
        ax.axvline(math.log(1 + math.sqrt(2)) / 2, color=plots.GREY, lw=0.8, ls="--")
        ax.set(xlabel="coupling")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller lattice")
    parser.add_argument("--out", type=Path, default=Path("belief_propagation.png"), help="the picture")
    arguments = parser.parse_args()
    rows_a_side = 8 if arguments.quick else 32
    found = [(coupling, *ising(coupling, rows_a_side)) for coupling in tqdm(COUPLINGS, desc="couplings")]
    columns = "coupling | Bethe, lattice | Bethe, infinite tree | Onsager | gap | magnetisation | exact | iterations"
    print(f"| {columns} |\n{'|---' * 8}|")
    drawn = []
    for coupling, free_energy, magnetisation, iterations in found:
        onsagers, exact = onsager(coupling)
        gap = free_energy - onsagers
        drawn.append((coupling, gap, magnetisation, exact))
        print(
            f"| {coupling} | {free_energy:.9f} | {bethe_lattice(coupling):.9f} | {onsagers:.9f} | {gap:.6f}"
            f" | {magnetisation:.4f} | {exact:.4f} | {iterations} |"
        )
    draw(arguments.out, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
