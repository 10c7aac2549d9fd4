"""What a step costs on 8, 64 and 1,024 GPUs, modelled: ``python docs/examples/cost_of_scale.py [--quick]``.

The tables and the picture of docs/distributed.md, by `fekernels.distributed.cost`: formulas and the numbers of data
sheets. Nothing here is measured, on any GPU. ``--out PATH`` says where the picture goes. Needs the extra "plots".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from fekernels.distributed import cost

MODELS = {"7B": (7e9, 32), "70B": (70e9, 80)}
DEVICES = (8, 64, 1024)
STYLES = {"ddp": ("DDP", "C0"), "fsdp": ("FSDP2", "C1"), "hsdp": ("HSDP, nodes of 8", "C2")}


def plan(model: str, devices: int, sharding: str, optimizer: str = "LangevinAdam") -> cost.TrainingCost:
    parameters, layers = MODELS[model]
    return cost.training(parameters, devices, sharding=sharding, optimizer=optimizer, layers=layers)


def print_training() -> None:
    print(
        "| parameters | GPUs | | sent, GB | memory, GB | arithmetic, s | sending, s | optimizer, ms | step, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for devices in DEVICES:
            for sharding, (name, _) in STYLES.items():
                if sharding == "hsdp" and devices == 8:  # one node: that of FSDP2
                    continue
                found = plan(model, devices, sharding)
                memory = sum(found.memory.values())
                held = f"{memory / 1e9:.1f}" + (" (too much)" if memory > cost.H200.memory else "")
                print(
                    f"| {model} | {devices:,} | {name} | {sum(found.sent.values()) / 1e9:.0f} | {held} "
                    f"| {found.compute:.2f} | {found.communication:.2f} | {found.optimizer * 1e3:.2f} "
                    f"| {found.seconds:.2f} |"
                )


def print_optimizers() -> None:
    print(
        "\n| optimizer, 7B on 64 GPUs by FSDP2 | states, GB | moved, GB | step of the optimizer, ms | sent for it |"
    )
    print("|---|---|---|---|---|")
    for name, kind in cost.OPTIMIZERS.items():
        found = plan("7B", 64, "fsdp", name)
        moved = kind.moved * 7e9 / 64
        states = found.memory["optimizer states"]
        print(f"| {name} | {states / 1e9:.2f} | {moved / 1e9:.2f} | {found.optimizer * 1e3:.2f} | 0 |")


def print_particles() -> None:
    print(
        "\n| particles, d = 64 | GPUs | sent, MB | arithmetic, ms | gathering, ms | n where both are even |"
    )
    print("|---|---|---|---|---|---|")
    for n in (10_000, 100_000, 1_000_000):
        for devices in DEVICES:
            found = cost.particles(n, 64, devices)
            machine = cost.H200
            rate = machine.float32_flops * machine.attained
            even = (
                2 * (devices - 1) * rate / machine.link(devices)
            )  # 8 n d (P - 1) / P bytes, 4 n^2 d / P flops
            print(
                f"| {n:,} | {devices:,} | {sum(found.sent.values()) / 1e6:.1f} | {found.compute * 1e3:.3g} "
                f"| {found.communication * 1e3:.3g} | {even:,.0f} |"
            )


def draw(path: Path) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    memory, seconds, stein = figure.subplots(1, 3)
    ranks = [2**k for k in range(3, 11)]
    for sharding, (name, color) in STYLES.items():
        for model, line in (("7B", "-"), ("70B", "--")):
            plans = [plan(model, devices, sharding) for devices in ranks]
            memory.plot(ranks, [sum(p.memory.values()) / 1e9 for p in plans], line, color=color)
            seconds.plot(ranks, [p.seconds for p in plans], line, color=color, label=f"{model}, {name}")
    memory.axhline(cost.H200.memory / 1e9, color="0.5", linewidth=0.8)
    memory.text(
        1024, cost.H200.memory / 1e9 * 1.1, "an H200 has", ha="right", va="bottom", color="0.4", fontsize=8
    )
    for axes, title in ((memory, "memory a GPU, GB, without activations"), (seconds, "seconds a step")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="GPUs")
        axes.set_xticks(DEVICES, [f"{devices:,}" for devices in DEVICES])
    seconds.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    seconds.legend(fontsize=7, loc="center right")
    sizes = [10**k for k in (3, 4, 5, 6, 7)]
    for devices, color in zip(DEVICES, ("C3", "C4", "C5"), strict=True):
        found = [cost.particles(n, 64, devices) for n in sizes]
        stein.plot(
            sizes, [f.compute * 1e3 for f in found], color=color, label=f"{devices:,} GPUs, arithmetic"
        )
        stein.plot(sizes, [f.communication * 1e3 for f in found], "--", color=color, label="gathering")
    stein.set(
        xscale="log", yscale="log", title="a Stein direction, d = 64, ms", xlabel="particles", ylim=(1e-3, 1e5)
    )  # fmt: skip
    stein.legend(fontsize=7)
    for axes in (memory, seconds, stein):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    text = "LangevinAdam, 8,192 tokens a GPU and step; SVGD: modelled from data sheets, not measured"
    figure.suptitle(text, fontsize=10)
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same: nothing here takes long")
    parser.add_argument("--out", type=Path, default=Path("cost_of_scale.png"), help="where the picture goes")
    options = parser.parse_args()
    print_training()
    print_optimizers()
    print_particles()
    draw(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
