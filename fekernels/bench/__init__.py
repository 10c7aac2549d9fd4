"""``python -m fekernels bench``: times on this machine's CPU as ratios to what PyTorch offers, won and lost alike."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fekernels._runtime import extension
from fekernels._runtime.command_line import parser as command_parser
from fekernels.bench import first_use, memory, report, widths
from fekernels.bench.registry import FAMILIES
from fekernels.bench.report import table
from fekernels.bench.runner import measure
from fekernels.bench.timing import machine

__all__ = ["main", "measure", "table"]

QUICK = "quick"  # the set of sizes that --quick measures
OLD_NAMES = {"svgd": "stein"}  # what --only has called a family


def _random(size: str, progress: bool) -> dict[str, Any]:
    rows = measure(FAMILIES["random"], size, progress)
    print(table(rows))
    print(
        "\nFills of float32 and int32. Floor: the larger of moving as many bytes and of the noise in cache."
    )
    return {"random": rows}


def _optimizers(size: str, progress: bool) -> dict[str, Any]:
    rows = measure(FAMILIES["optimizers"], size, progress)
    print(table(rows))
    print(
        "\nMedians of interleaved rounds. GB/s: the bytes that a step cannot avoid, over its time.\n"
        "Floor: the larger of moving those bytes and of the noise, roots and divisions alone, in the same rounds.\n"
    )
    waits = first_use.measure(size)
    print(first_use.table(waits))
    return {"rows": rows, "once": waits}


def _free_energy(size: str, progress: bool, plot: Path | None) -> dict[str, Any]:
    """Forward and backward, their peak memory, and every width."""
    rows = measure(FAMILIES["free_energy"], size, progress)
    print(table(rows))
    print(
        "\nForward + backward, float32. GB/s: operands read once and gradients written once, over the time.\n"
    )
    peaks = memory.measure("free_energy", size, torch.get_num_threads())
    print(f"{memory.table(peaks)}\n")
    by_width = widths.measure(size)
    print(widths.table(by_width))
    if plot is not None:
        _draw(by_width, plot)
    return {"free_energy": rows, "free_energy_memory": peaks, "free_energy_widths": by_width}


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    widths.figure(rows).savefig(path, dpi=150)
    print(f"\nwritten: {path}")


def _stein(size: str, progress: bool) -> dict[str, Any]:
    """Times, and peak memory where no n x n matrix could be kept."""
    rows = measure(FAMILIES["stein"], size, progress)
    print(table(rows))
    print("\nfloat32, the bandwidth given. Pairs: n^2 per problem, over the time of ours.\n")
    peaks = memory.measure("stein", size, torch.get_num_threads())
    print(memory.table(peaks))
    return {"svgd": rows, "svgd_memory": peaks}


# What stands below the table of a family that is measured by its times alone.
NOTES = {
    "posterior": "float32. Chains: the whole step of all of them, and what is not forward and backward.",
    "rbm": "float32. Free energy: the mean over the rows with all gradients; the products: v W and v^T x.",
    "vae": "float32. Training: forward, backward, the optimizer's step. Views: values, gradients where they part.",
    "graph": "float32. A sweep: both messages of every edge, of a call of 100 with all that it sets up.",
    "distributed": "Processes of one thread each, over gloo. A time is that of the slowest rank.",
}


def _times(family: str, size: str, progress: bool) -> dict[str, Any]:
    rows = measure(FAMILIES[family], size, progress)
    print(table(rows))
    print(f"\n{NOTES[family]}")
    return {family: rows}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "bench",
        "Time the kernels on this machine's CPU beside what PyTorch offers: tables of ratios, won and lost alike.",
        codes="0 measured, also where an aim is missed; 1 there are no compiled kernels to time",
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the rows and the machine's facts to PATH"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="PATH",
        help="measure nothing: print the tables of docs/benchmarks.md, and draw --plot, from what --json wrote",
    )
    parser.add_argument(
        "--only", choices=[*FAMILIES, *OLD_NAMES], help="one of the parts; svgd is stein's old name"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw the free energy's bandwidth over the width to PATH"
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes, in a minute; no figures to quote"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch, default 2")
    arguments = parser.parse_args(argv)
    arguments.only = OLD_NAMES.get(arguments.only, arguments.only)
    if arguments.threads < 1:
        parser.error(f"--threads must be 1 or more; got {arguments.threads}")
    if arguments.plot is not None and arguments.only not in (None, "free_energy"):
        parser.error(f"--plot draws the free energy, which --only {arguments.only} leaves out")
    if arguments.markdown is not None and not arguments.markdown.is_file():
        parser.error(f"--markdown must be a file that --json wrote; got {arguments.markdown}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables and write the JSON. 0 also where a goal is missed: it is a measurement, not a test."""
    arguments = _arguments(argv)
    if arguments.markdown is not None:
        written = json.loads(arguments.markdown.read_text())
        print(report.markdown(written))
        if arguments.plot is not None:
            _draw(written["free_energy_widths"], arguments.plot)
        return 0
    reason = extension.unavailable_reason()
    if reason is not None:
        print(f"bench: no compiled kernels to time: {reason}", file=sys.stderr)
        return 1

    threads, progress = torch.get_num_threads(), sys.stderr.isatty()
    size = QUICK if arguments.quick else "full"
    measured: dict[str, Any] = {}
    torch.set_num_threads(arguments.threads)
    try:
        facts = machine()
        print(
            f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}, {facts['threads']} threads, "
            f"load {facts['load']} at the start, {facts['date']}\n"
            f"fekernels {facts['fekernels']} ({facts['compiled']}), torch {facts['torch']}, Python {facts['python']}\n"
        )
        if arguments.quick:
            print("--quick: smaller sizes and fewer rounds. No figures to hold against the goals.\n")
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "random": partial(_random, size, progress),
            "optimizers": partial(_optimizers, size, progress),
            "free_energy": partial(_free_energy, size, progress, arguments.plot),
            "stein": partial(_stein, size, progress),
            **{family: partial(_times, family, size, progress) for family in NOTES},
        }
        for family in FAMILIES if arguments.only is None else (arguments.only,):
            print("\n" * bool(measured), end="")
            measured |= parts[family]()
    finally:
        torch.set_num_threads(threads)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        written = {"machine": facts, "quick": arguments.quick} | measured
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")
        print(f"\nwritten: {arguments.json}")
    print(f"\n{report.summary(measured)}")
    return 0
