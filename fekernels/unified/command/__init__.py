"""``python -m fekernels unified``: every system of the design document on real data, beside its exact answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import torch
from tqdm import tqdm

from fekernels import plots
from fekernels._runtime.command_line import check_outputs, painted
from fekernels._runtime.command_line import parser as command_parser
from fekernels.unified.command import pictures
from fekernels.unified.command.experiments import EXPERIMENTS, QUICK, Finding, Row, Settings

__all__ = ["main", "run", "table"]


def run(settings: Settings, seed: int) -> dict[str, Finding]:
    """Every experiment, by its name, with a bar."""
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small lose time to a second thread
    try:
        with tqdm(EXPERIMENTS.items(), unit="system") as bar:
            for name, experiment in bar:
                bar.set_description(name)
                with redirect_stdout(StringIO()):  # what the document's functions print is in the table
                    found[name] = experiment(settings, seed)
    finally:
        torch.set_num_threads(threads)
    return found


def table(rows: Sequence[Row]) -> str:
    """A line for each number: who computed it, what it is, its exact answer, how far off it is and may be."""
    lines: list[tuple[str, ...]] = [("system", "quantity", "value", "exact", "off by", "at most", "")]
    for row in rows:
        known: tuple[str, ...] = ("-", "", "", "")
        if row.exact is not None:
            off = abs(row.value - row.exact)
            known = (f"{row.exact:.6g}", f"{off:.1e}", f"{row.within:.1e}", "yes" if row.holds else "NO")
        lines.append((row.name, row.quantity, f"{row.value:.6g}", *known))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("<", "<", ">", ">", ">", ">", "<")
    rendered = [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([rendered[0], "-" * len(rendered[0]), *rendered[1:]])


def draw(found: dict[str, Finding], out: Path) -> None:
    """One page: a panel for each experiment, and one for the work of the regression's particles."""
    panels = [finding.draw for finding in found.values()]
    details = found["regression"].details
    panels.append(lambda ax: pictures.work(ax, details["work"], details["free_energy"]))
    figure, axes = plots.panels(2, 5, (24, 9))
    for ax, panel in zip(axes.flat, panels, strict=True):
        panel(ax)
    figure.savefig(out, dpi=80)


def main(argv: list[str] | None = None) -> int:
    """Run, print, draw. Returns 1 where a number is further from its exact answer than it may be, else 0."""
    parser = command_parser(
        "unified",
        "Run every system of the design document on real data, and print its numbers beside their exact answers.",
        codes="0 all agree; 1 a number is further from its exact answer than it may be (not with --quick), or "
        "something to be installed is missing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fekernels_unified.png"),
        metavar="PATH",
        help="where the pictures go",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers to PATH, too")
    parser.add_argument("--seed", type=int, default=0, help="of all noise (default 0)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps only: shows that everything runs, not that it agrees",
    )
    arguments = parser.parse_args(argv)
    check_outputs(parser, json=arguments.json)
    check_outputs(parser, picture=True, out=arguments.out)
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        found = run(QUICK if arguments.quick else Settings(), arguments.seed)
    rows = [row for finding in found.values() for row in finding.rows]
    print(f"\n{table(rows)}\n")
    draw(found, arguments.out)
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps([asdict(row) | {"holds": row.holds} for row in rows], indent=1) + "\n"
        )
    wrong = [row.quantity for row in rows if not row.holds]
    print(f"Pictures: {arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    known = sum(row.exact is not None for row in rows)
    agree = f"{known - len(wrong)} of {known} numbers with an exact answer agree with it"
    print(painted(agree, "red" if wrong else "green"))
    return 1 if wrong and not arguments.quick else 0
