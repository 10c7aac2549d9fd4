"""Times of the Stein direction on a device: all backends beside eager PyTorch, torch.compile and the floor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime import backends as _backends
from tests.gpu.stein import PRECISIONS, TEMPERATURE

__all__ = ["measure", "plot", "table", "verdicts"]

Rows = list[dict[str, Any]]

EAGER, COMPILED = "eager PyTorch, float32", "torch.compile, float32"
# Of the H200's dense peak, by precision: three products of 16-bit halves, one of TF32, and three of bfloat16. The
# direction takes 4 n^2 d operations.
PEAK = {"fp32": 990e12 / 3, "tf32": 495e12, "bf16x3": 990e12 / 3}
GOALS = {(65_536, 64, "fp32"): 0.33, (65_536, 64, "tf32"): 0.55}  # shares of that peak: 10 ms and 4


def plain(x: Tensor, s: Tensor, h: Tensor) -> Tensor:
    """rbf's direction as one writes it, an n x n matrix kept."""
    x = x - x.mean(1, keepdim=True)
    squares = x.square().sum(2)
    t = torch.baddbmm(squares.unsqueeze(2) + squares.unsqueeze(1), x, x.mT, alpha=-2).clamp_min(0)
    k = torch.exp(-t / h.view(-1, 1, 1))
    pull = 2 * TEMPERATURE / h.view(-1, 1, 1)
    return (k @ (s - pull * x) + pull * k.sum(2, keepdim=True) * x) / x.shape[1]


def seconds_of(run: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Of the device, one value per round, after one run that compiles what is compiled at first use."""
    run()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        else:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return times


def contestants(
    n: int, d: int, backends: Sequence[str], device: torch.device, largest_plain: int
) -> list[tuple[str, str, Callable[[], Any]]]:
    """(name, precision, what to run) of each."""
    generator = torch.Generator(device).manual_seed(0)
    x, s = (torch.randn(1, n, d, device=device, generator=generator) for _ in range(2))
    h = torch.full((1,), 2.0 * d / math.log(n + 1), device=device)
    found: list[tuple[str, str, Callable[[], Any]]] = []
    if n <= largest_plain:
        torch.compiler.reset()
        found.append((EAGER, "fp32", partial(plain, x, s, h)))
        found.append((COMPILED, "fp32", partial(torch.compile(plain), x, s, h)))
    for backend in backends:
        if _backends._obstacle(backend, device.type, "svgd_direction") is not None:
            continue
        run = _backends.implementation("svgd_direction", backend)
        for i, precision in enumerate(PRECISIONS):
            arguments = (x, s, h, 0, -0.5, 1.0, TEMPERATURE, i)
            found.append((f"{backend}: {precision}", precision, partial(run, *arguments)))
    return found


def measure(
    backends: Sequence[str],
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    rounds: int,
    largest_plain: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Rows:
    """One dict per contestant of each (n, d): milliseconds, and the part of the arithmetic's floor in them.

    largest_plain: particles up to which there is memory for the peers' matrices.
    """
    rows: Rows = []
    for n, d in shapes:
        progress(f"svgd_direction of {n} x {d}")
        few = rounds if n <= 100_000 else 1
        for name, precision, run in contestants(n, d, backends, device, largest_plain):
            row: dict[str, Any] = {"n": n, "d": d, "contestant": name, "precision": precision}
            try:
                times = seconds_of(run, device, few)
            except (
                Exception
            ) as error:  # of memory, or a compiler that is missing: the others are still of interest
                rows.append({**row, "missing": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})
                continue
            seconds = statistics.median(times)
            floor = 4 * n**2 * d / PEAK[precision]
            row |= {"ms": seconds * 1e3, "ms_rounds": [t * 1e3 for t in times], "floor_ms": floor * 1e3}
            rows.append({**row, "of_floor": floor / seconds})
    return rows


def verdicts(rows: Rows) -> list[dict[str, Any]]:
    """The goals in shares of the floor, as ``step_times.verdicts``."""
    results = []
    for row in rows:
        goal = GOALS.get((row["n"], row["d"], row["precision"]))
        if goal is not None and "of_floor" in row and ": " in row["contestant"]:
            results.append(
                {"case": f"{row['n']} x {row['d']}", "backend": row["contestant"].split(":")[0],
                 "goal": f"svgd_direction, {row['precision']}, share of the tensor cores' peak", "reach": goal,
                 "worst": row["of_floor"], "contestant": row["contestant"], "met": row["of_floor"] >= goal}
            )  # fmt: skip
    return results


def table(rows: Rows) -> str:
    """The times as text."""
    header = f"{'n':>9}{'d':>5}  {'contestant':32}{'ms':>12}{'floor ms':>12}{'of floor':>10}"
    lines = [header, "-" * len(header)]
    for row in rows:
        begin = f"{row['n']:9}{row['d']:5}  {row['contestant']:32}"
        if "missing" in row:
            lines.append(f"{begin}not measured: {row['missing']}")
        else:
            lines.append(f"{begin}{row['ms']:12.3f}{row['floor_ms']:12.3f}{row['of_floor']:10.2f}")
    return "\n".join(lines)


def plot(rows: Rows, path: Path) -> None:
    """The curve over n for the d with the most sizes. Needs matplotlib (ModuleNotFoundError)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if "ms" in row]
    d = statistics.mode(row["d"] for row in measured)
    measured = [row for row in measured if row["d"] == d]
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name in dict.fromkeys(row["contestant"] for row in measured):
        points = sorted((row["n"], row["ms"]) for row in measured if row["contestant"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    for precision in ("fp32", "tf32"):
        floors = sorted({(row["n"], 4e3 * row["n"] ** 2 * d / PEAK[precision]) for row in measured})
        axes.plot(*zip(*floors, strict=True), linestyle="--", color="grey")
        axes.annotate(f"floor of {precision} on an H200", floors[-1], ha="right", fontsize=8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="particles",
        ylabel="milliseconds",
        title=f"Stein direction, d = {d}",
    )
    axes.legend(fontsize=8)
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
