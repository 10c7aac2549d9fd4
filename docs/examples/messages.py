"""The error messages of a network while it learns: ``python docs/examples/messages.py [--quick]``.

A network of five layers learns scikit-learn's digits twice, by plain gradient steps: with sigmoids, and with ReLUs.
``fe.messages.GradientMessages`` listens: what error reaches which layer, how far it turns from step to step, and how
much of it is more than the noise of the batch. The picture shows both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fekernels as fe

SEED, LAYERS, WIDTH, LR = 0, 5, 48, 0.3
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "ReLU": nn.ReLU}


def network(activation: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(SEED)
    sizes = [64, *[WIDTH] * (LAYERS - 1), 10]
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Sequential, x: Tensor, y: Tensor, steps: int) -> dict[str, fe.messages.LayerHistory]:
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    with fe.messages.GradientMessages(model, layers=linear) as messages:
        for step in tqdm(range(steps), desc="train"):
            rows = fe.random.bits((100,), seed=SEED, step=step) % len(x)
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            messages.update(LR)
    return messages.history


def picture(histories: dict[str, dict[str, fe.messages.LayerHistory]]) -> Figure:
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes = figure.subplots(len(histories), 3, sharex=True, sharey="col")
    for row, (name, history) in zip(axes, histories.items(), strict=True):
        for k, layer in enumerate(history.values()):
            color = colormaps["viridis"](k / (len(history) - 1))
            for ax, values in zip(row, (layer.norm, layer.angle, layer.signal_to_noise), strict=True):
                width = max(len(values) // 60, 1)
                means = torch.tensor(values)[: len(values) // width * width].view(-1, width).nanmean(1)
                ax.plot(torch.arange(len(means)) * width, means, color=color, lw=1.1, label=f"layer {k + 1}")
        row[0].set(yscale="log", ylabel=f"{name}\nnorm of the message")
        row[1].set(ylabel="angle to the step before")
        row[2].set(yscale="log", ylabel="signal to noise")
        row[2].axhline(1, color="#8a8a8a", lw=0.8, ls=":")
        row[1].axhline(90, color="#8a8a8a", lw=0.8, ls=":")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    axes[0, 0].legend(frameon=False, fontsize=7, ncols=2)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("messages.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that everything runs")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    steps = 60 if arguments.quick else 1500
    histories = {}
    for name, activation in ACTIVATIONS.items():
        model = network(activation)
        histories[name] = train(model, x[:1400], y[:1400], steps)
        accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean()
        norms = [sum(layer.norm[:20]) / 20 for layer in histories[name].values()]
        print(
            f"{name}: the first layer is sent {norms[0] / norms[-1]:.2g} of what the last one is, over 20 steps;"
            f" test accuracy {accuracy:.3f}"
        )
    picture(histories).savefig(arguments.out, dpi=70)
    print(arguments.out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
