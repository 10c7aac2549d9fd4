"""Four views of one model's loss while it trains: ``python docs/examples/views.py [--quick]``.

Trains ``fe.models.VAE`` on binarised digits, prints the table of ``fe.views.verify_equivalence`` in float32 and
float64, and draws what each view calls its parts over training: four ways to cut one curve in two.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import fekernels as fe

SEED, EVERY = 0, 5
VIEWS = {
    "physics: E - T H": (fe.views.physics, {"energy": 1, "entropy": -1}),
    "machine learning": (fe.views.machine_learning, {"reconstruction": 1, "regulariser": 1}),
    "inference": (fe.views.inference, {"negative_log_joint": 1, "log_q": 1}),
    "message passing": (fe.views.message_passing, {"forward_error": 1, "backward_error": 1}),
}


def train(model: fe.models.VAE, x: Tensor, steps: int) -> dict[str, list[tuple[float, ...]]]:
    """Of each view, (step, value, *parts) every few steps, all of the noise that the step is taken with."""
    optimizer = fe.LangevinAdam(model.parameters(), lr=2e-3)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in VIEWS}
    for step in tqdm(range(steps), desc="train"):
        batch = x[fe.random.bits((200,), seed=SEED, step=step) % len(x)]
        if step % EVERY == 0:
            for name, (view, signs) in VIEWS.items():
                with torch.no_grad():
                    value, parts = view(model, batch)
                shown = (sign * float(parts[part]) for part, sign in signs.items())
                found[name].append((step, float(value), *shown))
        optimizer.zero_grad()
        # Any of the four would do: one value, one gradient.
        fe.views.machine_learning(model, batch)[0].backward()
        optimizer.step()
    return found


def picture(found: dict[str, list[tuple[float, ...]]]) -> Figure:
    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots(1, len(found), sharex=True)
    for ax, (name, rows) in zip(axes, found.items(), strict=True):
        step, value, first, second = zip(*rows, strict=True)
        parts = [part.replace("_", " ") for part in VIEWS[name][1]]
        ax.plot(step, first, color="#b5523b", lw=1, label=parts[0])
        ax.plot(
            step, second, color="#5a8f5a", lw=1, label=f"less {parts[1]}" if "E - T" in name else parts[1]
        )
        ax.plot(step, value, color="black", lw=1.4, label="their sum: F")
        ax.axhline(0, color="#8a8a8a", lw=0.6)
        ax.set(title=name, xlabel="step")
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("nats a digit")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that everything runs")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    x = torch.tensor(load_digits().data >= 8, dtype=torch.float32)
    model = fe.models.VAE(64, 8, (64,), seed=SEED)
    found = train(model, x, 60 if arguments.quick else 600)
    for name, rows in found.items():
        step, value, *parts = rows[-1]
        print(f"{name}, step {step}: {value:.6f} = {' + '.join(f'{part:.6f}' for part in parts)}")
    for dtype in (torch.float32, torch.float64):
        print(f"\n{dtype}, trained\n{fe.views.verify_equivalence(model.to(dtype), x.to(dtype))}")
    picture(found).savefig(arguments.out, dpi=90)
    print(arguments.out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
