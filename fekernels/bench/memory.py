"""Peak memory of one forward and backward of the free energy, each contestant in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fekernels.bench import free_energy as cases

__all__ = ["CLEAR", "in_process", "measure", "peak", "table"]

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # makes VmHWM what VmRSS is

SLACK = 0.02  # of the data: what ours may take beside the gradients that it returns


def _resident(field: str) -> int:
    """Bytes of a field of the process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(run: Callable[[], object]) -> int:
    """Bytes by which the resident set peaks over what it was before, what ``run`` returns included."""
    CLEAR.write_text(RESET_PEAK)
    before = _resident("VmRSS")
    result = run()
    grown = _resident("VmHWM") - before
    del result
    return grown


def growth(likelihood: str, contestant: str, shape: cases.Shape) -> int:
    """The peak of one forward and backward. Call it once a process: ours keeps a buffer."""

    def runner(given: cases.Problem) -> Any:
        if contestant == cases.COMPILED:
            run, missing = cases.compiled(given)
            if run is None:
                raise RuntimeError(missing)
            return run
        if contestant == cases.EAGER:
            return cases.step(given, cases.PEERS[likelihood])
        return cases.step(given, inplace=contestant == cases.INPLACE)

    # Threads, libraries and small allocations first.
    small = runner(cases.problem(likelihood, (256, 64, 8)))
    small()
    given = cases.problem(likelihood, shape)
    return peak(runner(given))  # compiles for this shape first where that is to be done, and runs it once


def measure(shape: cases.Shape, threads: int) -> list[dict[str, Any]]:
    """A row for each likelihood and contestant."""
    rows = []
    for likelihood in ("mse", "bernoulli"):
        for contestant in (cases.EAGER, cases.COMPILED, cases.OURS, cases.INPLACE):
            row: dict[str, Any] = {
                "case": f"{likelihood} {shape[0]} x {shape[1]}",
                "contestant": contestant,
                "data_mb": shape[0] * shape[1] * 4 / 1e6,
            }
            try:
                grown = _in_process(likelihood, contestant, shape, threads)
                row |= {"growth_mb": grown / 1e6, "of_data": grown / (shape[0] * shape[1] * 4)}
                if contestant in (cases.OURS, cases.INPLACE):
                    reach = 2 * shape[2] / shape[1] + (contestant == cases.OURS) + SLACK
                    row |= {"reach": reach, "met": row["of_data"] <= reach}
            except (RuntimeError, subprocess.SubprocessError) as error:
                row["missing"] = str(error)
            rows.append(row)
    return rows


def _in_process(likelihood: str, contestant: str, shape: cases.Shape, threads: int) -> int:
    return in_process("fekernels.bench.memory", likelihood, contestant, shape, threads)


def in_process(module: str, *arguments: Any) -> int:
    """The number that a module of this package, run with the arguments as JSON, prints last.

    Raises:
        RuntimeError: it failed, with its last line; or this system cannot tell a peak.
    """
    if not os.access(CLEAR, os.W_OK):
        raise RuntimeError(f"this system has no {CLEAR}")
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else "the process failed")
    return int(done.stdout.split()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'peak of forward + backward':28}{'by':38}{'MB':>8}{'x data':>8}{'at most':>9}  met"]
    for row in rows:
        start = f"{row['case']:28}{row['contestant']:38}"
        if "missing" in row:
            lines.append(f"{start}not measured: {row['missing']}")
            continue
        goal = f"{row['reach']:9.2f}{'yes' if row['met'] else 'NO':>5}" if "reach" in row else f"{'-':>9}"
        lines.append(f"{start}{row['growth_mb']:8.1f}{row['of_data']:8.2f}{goal}")
    return "\n".join(lines)


def main() -> None:
    likelihood, contestant, shape, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(growth(likelihood, contestant, tuple(shape)))


if __name__ == "__main__":
    main()
