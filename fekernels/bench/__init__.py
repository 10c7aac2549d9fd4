"""``python -m fekernels bench``: times on this machine's CPU as ratios to what PyTorch offers, won and lost alike."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fekernels._runtime import extension
from fekernels._runtime.command_line import check_outputs
from fekernels._runtime.command_line import parser as command_parser
from fekernels.bench import first_use, memory, report, widths
from fekernels.bench.registry import FAMILIES, peaks_of
from fekernels.bench.report import table
from fekernels.bench.runner import measure
from fekernels.bench.timing import machine

__all__ = ["main", "measure", "table"]

QUICK = "quick"  # the set of sizes that --quick measures
OLD_NAMES = {"svgd": "stein"}  # what --only has called a family


def _part(family: str, size: str, progress: bool) -> dict[str, Any]:
    """Times, and peak memory where the family has goals for it."""
    rows = measure(FAMILIES[family].cases, size, progress)
    print(f"{table(rows)}\n\n{FAMILIES[family].note}")
    if not FAMILIES[family].peaks:
        return {family: rows}
    peaks = memory.measure(family, size, torch.get_num_threads())
    print(f"\n{memory.table(peaks)}")
    return {family: rows, peaks_of(family): peaks}


def _waits(size: str) -> dict[str, Any]:
    """What a user waits for once: the build, the import."""
    waits = first_use.measure(size)
    print(f"\n{first_use.table(waits)}")
    return {"once": waits}


def _widths(size: str, plot: Path | None) -> dict[str, Any]:
    """The free energy at every width."""
    by_width = widths.measure(size)
    print(f"\n{widths.table(by_width)}")
    if plot is not None:
        _draw(by_width, plot)
    return {"free_energy_widths": by_width}


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    widths.figure(rows).savefig(path, dpi=150)
    print(f"\nwritten: {path}")


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
    for path in (arguments.json, arguments.plot):
        if path is not None:
            with suppress(OSError):  # what is missing then is told
                path.parent.mkdir(parents=True, exist_ok=True)
    check_outputs(parser, json=arguments.json)
    check_outputs(parser, picture=True, plot=arguments.plot)
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
        beside = {"optimizers": partial(_waits, size), "free_energy": partial(_widths, size, arguments.plot)}
        for family in FAMILIES if arguments.only is None else (arguments.only,):
            print("\n" * bool(measured), end="")
            measured |= _part(family, size, progress)
            if family in beside:
                measured |= beside[family]()
    finally:
        torch.set_num_threads(threads)
    if arguments.json is not None:
        written = {"machine": facts, "quick": arguments.quick} | measured
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")
        print(f"\nwritten: {arguments.json}")
    print(f"\n{report.summary(measured)}")
    return 0
