"""``python -m fekernels bench``: times on this machine's CPU as ratios to what PyTorch offers, won and lost alike."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fekernels import _extension
from fekernels.bench import free_energy, layouts, memory
from fekernels.bench import optimizers as cases
from fekernels.bench import stein as svgd
from fekernels.bench import stein_memory as svgd_memory
from fekernels.bench.timing import Timing, interleave, machine

__all__ = ["main", "measure", "table"]

FULL = cases.Sizes()
QUICK = cases.Sizes(large=2_560_000, cached=64_000, tensors=50, rounds=5, seconds=0.3, turn_seconds=0.003)
FREE_ENERGY_FULL = free_energy.Sizes()
FREE_ENERGY_QUICK = free_energy.Sizes(
    large=(1024, 4096, 128),
    middle=(512, 784, 64),
    counts=(128, 5000, 10),
    images=((8, 64, 32, 32), (8, 3, 64, 64)),
    sweep_elements=1 << 21,
    rounds=5,
    seconds=0.3,
    turn_seconds=0.003,
)
SVGD_FULL = svgd.Sizes()
SVGD_QUICK = svgd.Sizes(
    middle=(1_000, 64),
    low=(2_000, 16),
    wide=(1_000, 256),
    odd=(1_000, 37),
    planar=(2_000, 2),
    small=(200, 64),
    few=(50, 20_000),
    batch=(32, 16, 6),
    memory=(4_000, 16),
    rounds=5,
    seconds=0.2,
    turn_seconds=0.003,
)
SUBJECTS = ("optimizers", "free_energy", "svgd")

JIT_SECONDS, IMPORT_SECONDS = 30.0, 0.05

# Both run in processes of their own; the last line of what they print is the time.
BUILD_PROGRAM = """
import time
from fekernels import _extension
started = time.perf_counter()
_extension._cached_library("cpu")
print(time.perf_counter() - started)
"""
IMPORT_PROGRAM = """
import time
import torch
started = time.perf_counter()
import fekernels
print(time.perf_counter() - started)
"""


def measure(
    sizes: cases.Sizes | free_energy.Sizes | svgd.Sizes, progress: bool = False
) -> list[dict[str, Any]]:
    """Time every case. One dict a row: names, milliseconds, ratio, goal; and bandwidth where memory is the limit, pairs
    a nanosecond where it is not."""
    if isinstance(sizes, cases.Sizes):
        makers = cases.groups(sizes)
    elif isinstance(sizes, free_energy.Sizes):
        makers = [*free_energy.groups(sizes), *layouts.groups(sizes)]
    else:
        makers = svgd.groups(sizes)
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        # That weights without a gradient would walk without a prior does not matter here.
        warnings.filterwarnings("ignore", message=".*temperature > 0 with prior_precision = 0")
        for make in tqdm(makers, desc="bench", leave=False, disable=not progress):
            group = make()
            times = interleave(
                group.contestants,
                rounds=group.rounds or sizes.rounds,
                seconds=0.0 if group.rounds else sizes.seconds,
                turn_seconds=group.turn_seconds,
            )
            rows += [_row(row, group, times) for row in group.rows]
            del group
            gc.collect()  # the next group may need the memory of this one
    return rows


def _row(row: cases.Row, group: cases.Group, times: dict[str, Timing]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "case": row.case,
        "peer": row.peer,
        "reach": row.reach,
        "elements": group.elements,
    }
    if row.missing:
        return result | {"missing": row.missing}
    peer, ours = times[row.peer], times[row.ours]
    ratio = ours.median / peer.median
    result |= {
        "peer_ms": peer.median * 1e3,
        "ours_ms": ours.median * 1e3,
        "ratio": ratio,
        "met": None if row.reach is None else ratio <= row.reach,
        "peer_quartiles_ms": [t * 1e3 for t in peer.quartiles()],
        "ours_quartiles_ms": [t * 1e3 for t in ours.quartiles()],
        "rounds": len(ours.rounds),
    }
    if not row.bytes_per_element:
        return result | {"pairs_per_ns": group.elements / ours.median / 1e9}
    result |= {
        "bytes_per_element": row.bytes_per_element,
        "gb_per_s": group.elements * row.bytes_per_element / ours.median / 1e9,
    }
    if cases.COPY in times:
        copied = group.copied or group.elements
        result["copy_gb_per_s"] = copied * 8 / times[cases.COPY].median / 1e9
        result["of_copy"] = result["gb_per_s"] / result["copy_gb_per_s"]
    return result


def _process(program: str, **environment: str) -> float:
    """The time that a fresh Python prints. It finds this very package, installed or not."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode != 0:
        raise RuntimeError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process failed"
        )
    return float(done.stdout.split()[-1])


def import_seconds(times: int = 7) -> float:
    """Median time of ``import fekernels`` once torch is there, in fresh processes; one more goes before, unmeasured."""
    seconds = [_process(IMPORT_PROGRAM) for _ in range(times + 1)]
    return statistics.median(seconds[1:])


def build_seconds() -> float:
    """Time to compile the CPU kernels with nothing in the cache directory."""
    with tempfile.TemporaryDirectory() as directory:
        return _process(BUILD_PROGRAM, FEKERNELS_CACHE_DIR=directory)


def once(quick: bool) -> list[dict[str, Any]]:
    """What a user waits for once: the build at first use (left out by ``quick``) and the import."""
    rows: list[dict[str, Any]] = []
    for case, reach, program in (
        ("cold build of the kernels", JIT_SECONDS, None if quick else build_seconds),
        ("import fekernels, after torch", IMPORT_SECONDS, lambda: import_seconds(1 if quick else 7)),
    ):
        row: dict[str, Any] = {"case": case, "reach_s": reach}
        try:
            if program is None:
                row["missing"] = "left out by --quick"
            else:
                seconds = program()
                row |= {"seconds": seconds, "met": seconds <= reach}
        except (RuntimeError, subprocess.SubprocessError) as error:
            row["missing"] = str(error)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The ratio table as text."""
    pairs = any("pairs_per_ns" in row for row in rows)
    header = f"{'case':51}{'peer = 1':38}{'peer ms':>9}{'ours ms':>9}{'ratio':>7}{'reach':>7}  met"
    header += f"{'pairs/ns':>10}" if pairs else f"{'GB/s':>7}{'of copy':>9}"
    lines = [header, "-" * len(header)]
    for row in rows:
        start = f"{row['case']:51}{row['peer']:38}"
        if "missing" in row:
            lines.append(f"{start}not measured: {row['missing']}")
            continue
        goal = f"{'-':>7}{'':5}"
        if row["reach"] is not None:
            goal = f"{row['reach']:7.3g}{'yes' if row['met'] else 'NO':>5}"
        of_copy = f"{row['of_copy']:9.2f}" if "of_copy" in row else f"{'-':>9}"
        rate = f"{row['pairs_per_ns']:10.3f}" if pairs else f"{row['gb_per_s']:7.1f}{of_copy}"
        ratio = f"{row['ratio']:7.2f}" if row["ratio"] >= 0.1 else f"{row['ratio']:7.3f}"
        lines.append(f"{start}{row['peer_ms']:9.3f}{row['ours_ms']:9.3f}{ratio}{goal}{rate}")
    return "\n".join(lines)


def _once_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "missing" in row:
            lines.append(f"{row['case']:51}not measured: {row['missing']}")
        else:
            met = "yes" if row["met"] else "NO"
            lines.append(f"{row['case']:51}{row['seconds']:.3f} s, at most {row['reach_s']:g} s: {met}")
    return "\n".join(lines)


def _optimizers(quick: bool, progress: bool) -> dict[str, Any]:
    """Measure and print the optimizers' part."""
    rows = measure(QUICK if quick else FULL, progress)
    print(table(rows))
    copies = [row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row]
    print(
        f"\nMedians of interleaved rounds. GB/s: the bytes that a step cannot avoid, over its time; a copy in the same "
        f"rounds moved {min(copies):.1f} to {max(copies):.1f}, reads and writes counted.\n"
    )
    waits = once(quick)
    print(_once_table(waits))
    return {"rows": rows, "once": waits}


def _free_energies(quick: bool, progress: bool, plot: Path | None) -> dict[str, Any]:
    """Measure and print the free energy's part: forward and backward, their peak memory, and every width."""
    sizes = FREE_ENERGY_QUICK if quick else FREE_ENERGY_FULL
    rows = measure(sizes, progress)
    print(table(rows))
    print(
        "\nForward + backward, float32. GB/s: operands read once and gradients written once, over the time.\n"
    )
    peaks = memory.measure(sizes.large, torch.get_num_threads())
    print(f"{memory.table(peaks)}\n")
    widths = free_energy.sweep(sizes)
    print(free_energy.sweep_table(widths))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        free_energy.sweep_figure(widths).savefig(plot, dpi=150)
        print(f"\nwritten: {plot}")
    return {"free_energy": rows, "free_energy_memory": peaks, "free_energy_widths": widths}


def _stein(quick: bool, progress: bool) -> dict[str, Any]:
    """Measure and print the Stein direction's part: times, and peak memory where no n x n matrix could be kept."""
    sizes = SVGD_QUICK if quick else SVGD_FULL
    rows = measure(sizes, progress)
    print(table(rows))
    print("\nfloat32, the bandwidth given. Pairs: n^2 a problem, over the time of ours.\n")
    peaks = svgd_memory.measure(sizes, torch.get_num_threads())
    print(svgd_memory.table(peaks))
    return {"svgd": rows, "svgd_memory": peaks}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables and write the JSON. 0 also where a goal is missed: it is a measurement, not a test."""
    parser = argparse.ArgumentParser(prog="python -m fekernels bench", description=__doc__)
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the rows and the machine's facts there"
    )
    parser.add_argument("--only", choices=SUBJECTS, help="one of the three parts")
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw the free energy's bandwidth over the width there"
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes, in a minute; no figures to quote"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch, default 2")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads must be 1 or more; got {arguments.threads}")
    if arguments.plot is not None and arguments.only not in (None, "free_energy"):
        parser.error(f"--plot draws the free energy, which --only {arguments.only} leaves out")
    reason = _extension.unavailable_reason()
    if reason is not None:
        print(f"bench: no compiled kernels to time: {reason}", file=sys.stderr)
        return 1

    threads, progress = torch.get_num_threads(), sys.stderr.isatty()
    report: dict[str, Any] = {}
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
            "optimizers": partial(_optimizers, arguments.quick, progress),
            "free_energy": partial(_free_energies, arguments.quick, progress, arguments.plot),
            "svgd": partial(_stein, arguments.quick, progress),
        }
        for subject in SUBJECTS if arguments.only is None else (arguments.only,):
            print("\n" * bool(report), end="")
            report |= parts[subject]()
    finally:
        torch.set_num_threads(threads)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": facts, "quick": arguments.quick} | report
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten: {arguments.json}")
    return 0
