"""Peak memory of one pass beyond its operands, each contestant in a process of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fekernels.bench import free_energy, peers, stein
from fekernels.bench.case import SIZES, Shape
from fekernels.bench.first_use import run_python
from fekernels.stein.median import median_bandwidth

__all__ = ["CLEAR", "PASSES", "Pass", "growth", "in_process", "measure", "peak", "table"]

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # makes VmHWM what VmRSS is

Run = Callable[[], object]


@dataclass(frozen=True)
class Pass:
    """One call whose peak is taken.

    Attributes:
        name: "family/what/contestant".
        shapes: at each of ``SIZES``.
        small: a shape to run first, for threads, libraries and small allocations.
        make: the operands at a shape, and the call.
        operands: their bytes at a shape.
        aim: the most bytes beyond them at a shape; None where no goal names it.
    """

    name: str
    label: Callable[[Shape], str]
    shapes: tuple[Shape, Shape, Shape]
    small: Callable[[Shape], Shape]
    make: Callable[[Shape], Run]
    operands: Callable[[Shape], float]
    aim: Callable[[Shape], float] | None = None

    @property
    def contestant(self) -> str:
        return self.name.split("/", 2)[2]


SLACK = 0.02  # of the data: what the free energy may take beside the gradients that it returns
STEIN_BYTES = 200e6  # where one n x n matrix has 40 GB


def _energy(likelihood: str, contestant: str, shape: Shape) -> Run:
    given = free_energy.problem(likelihood, shape)
    if contestant == free_energy.COMPILED:
        run, missing = free_energy.compiled(given)  # compiles for this shape, and runs once
        if run is None:
            raise RuntimeError(missing)
        return run
    if contestant == free_energy.EAGER:
        return free_energy.step(given, peers.ENERGIES[likelihood])
    return free_energy.step(given, inplace=contestant == free_energy.INPLACE)


def _data_bytes(shape: Shape) -> float:
    return 4.0 * shape[0] * shape[1]


def _gradients(of_params: bool, shape: Shape) -> float:
    """What is returned: the latents' gradients, and the parameter's where it does not lie in the prediction."""
    return (2 * shape[2] / shape[1] + of_params + SLACK) * _data_bytes(shape)


def _energies() -> list[Pass]:
    found = []
    for likelihood in ("mse", "bernoulli"):
        for contestant in (
            free_energy.EAGER,
            free_energy.COMPILED,
            free_energy.OURS,
            free_energy.INPLACE,
        ):
            ours = contestant in (free_energy.OURS, free_energy.INPLACE)
            found.append(
                Pass(
                    f"free_energy/{likelihood}/{contestant}",
                    partial(free_energy.label, likelihood),
                    free_energy.LARGE,
                    lambda shape: (256, 64, 8),
                    partial(_energy, likelihood, contestant),
                    _data_bytes,
                    partial(_gradients, contestant == free_energy.OURS) if ours else None,
                )
            )
    return found


def _stein(call: Callable[..., object], shape: Shape) -> Run:
    return partial(call, *stein.problem(shape))


def _stein_pass(
    contestant: str,
    call: Callable[..., object],
    shapes: tuple[Shape, Shape, Shape] = ((100_000, 16), (4_000, 16), (500, 4)),
    aim: float | None = None,
) -> Pass:
    return Pass(
        f"stein/particles/{contestant}",
        lambda shape: f"n = {shape[0]:,}, d = {shape[1]}",
        shapes,
        lambda shape: (200, shape[-1]),
        partial(_stein, call),
        lambda shape: 8.0 * math.prod(shape),
        None if aim is None else lambda shape: aim,
    )


PASSES: dict[str, Pass] = {
    each.name: each
    for each in (
        *_energies(),
        _stein_pass(stein.OURS, stein.ours, aim=STEIN_BYTES),
        _stein_pass(stein.BACKWARD, partial(stein.backward, stein.ours)),
        _stein_pass(stein.DISCREPANCY, stein.discrepancy),
        _stein_pass(stein.MEDIAN, lambda x, s, h: median_bandwidth(x)),
        # On as many particles as it can still take.
        _stein_pass(stein.PLAIN, peers.plain, stein.MIDDLE),
    )
}


def _resident(field: str) -> int:
    """Bytes of a field of the process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(run: Run) -> int:
    """Bytes by which the resident set peaks over what it was before, what ``run`` returns included."""
    CLEAR.write_text(RESET_PEAK)
    before = _resident("VmRSS")
    result = run()
    grown = _resident("VmHWM") - before
    del result
    return grown


def growth(name: str, shape: Shape) -> int:
    """The peak of a pass. Call it once per process: a second one finds the buffers of the first."""
    measured = PASSES[name]
    measured.make(measured.small(shape))()
    return peak(measured.make(shape))


def in_process(name: str, shape: Shape, threads: int) -> int:
    """``growth`` in a process of its own.

    Raises:
        RuntimeError: it failed, with its last line; or this system cannot tell a peak.
    """
    if not os.access(CLEAR, os.W_OK):
        raise RuntimeError(f"this system has no {CLEAR}")
    program = "from fekernels.bench.memory import main; main()"
    return int(run_python(["-c", program, json.dumps([name, shape, threads])], 300))


def measure(family: str, size: str, threads: int) -> list[dict[str, Any]]:
    """A row per pass of the family."""
    rows = []
    for measured in PASSES.values():
        if not measured.name.startswith(f"{family}/"):
            continue
        shape = measured.shapes[SIZES.index(size)]
        row: dict[str, Any] = {
            "case": measured.label(shape),
            "contestant": measured.contestant,
            "operands_mb": measured.operands(shape) / 1e6,
        }
        try:
            row["growth_mb"] = in_process(measured.name, shape, threads) / 1e6
            if measured.aim is not None:
                reach = measured.aim(shape) / 1e6
                row |= {"reach_mb": reach, "met": row["growth_mb"] <= reach}
        except (RuntimeError, subprocess.SubprocessError) as error:
            row["missing"] = str(error)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'peak beyond the operands':28}{'by':38}{'operands MB':>12}{'MB':>9}{'at most':>9}  met"]
    for row in rows:
        start = f"{row['case']:28}{row['contestant']:38}"
        if "missing" in row:
            lines.append(f"{start}not measured: {row['missing']}")
            continue
        goal = f"{row['reach_mb']:9.1f}{'yes' if row['met'] else 'NO':>5}" if "met" in row else f"{'-':>9}"
        lines.append(f"{start}{row['operands_mb']:12.1f}{row['growth_mb']:9.1f}{goal}")
    return "\n".join(lines)


def main() -> None:
    """What ``in_process`` runs: the arguments are the last of the command line's, as JSON."""
    name, shape, threads = json.loads(sys.argv[-1])
    torch.set_num_threads(threads)
    print(growth(name, tuple(shape)))
