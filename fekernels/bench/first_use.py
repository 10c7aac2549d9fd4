"""What a user waits for once: the build at first use, and the import; each in processes of its own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["build_seconds", "import_seconds", "measure", "run_python", "table"]

BUILD_SECONDS, IMPORT_SECONDS = 30.0, 0.05  # the aims, of two cores

# The last line of what they print is the time.
BUILD_PROGRAM = """
import time
from fekernels._runtime import extension, host
started = time.perf_counter()
extension._cached_library("cpu")
seconds = time.perf_counter() - started
if reason := host.unavailable_reason():
    raise RuntimeError(f"no compiled host module: {reason}")
print(seconds)
"""
IMPORT_PROGRAM = """
import time
import torch
started = time.perf_counter()
import fekernels
print(time.perf_counter() - started)
"""


def run_python(arguments: Sequence[str], timeout: float, **environment: str) -> str:
    """The last word that a fresh Python prints. It finds this very package, installed or not.

    Raises:
        RuntimeError: it failed, with the last line of what it said.
        subprocess.SubprocessError: it took longer than ``timeout`` seconds.
    """
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else "the process failed")
    return done.stdout.split()[-1]


def import_seconds(times: int = 7) -> float:
    """Median time of ``import fekernels`` once torch is imported, in fresh processes; one more goes before, unmeasured.

    That one compiles the modules, as an installation does: the others find them compiled. Where this process is not to
    write such files, they go to a directory of their own, torch's too, which takes seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        compiled = {}
        if sys.dont_write_bytecode:
            compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": directory}
        seconds = [float(run_python(["-c", IMPORT_PROGRAM], 900, **compiled)) for _ in range(times + 1)]
    return statistics.median(seconds[1:])


def build_seconds() -> float:
    """Time to compile the kernels for this processor and the host module, with nothing in the cache directory."""
    with tempfile.TemporaryDirectory() as directory:
        return float(
            run_python(["-c", BUILD_PROGRAM], 900, FEKERNELS_CACHE_DIR=directory, FEKERNELS_ISA="auto")
        )


def measure(size: str) -> list[dict[str, Any]]:
    """A row per wait; the build is left out but at full size."""
    rows: list[dict[str, Any]] = []
    for case, reach, program in (
        ("cold build, host module included", BUILD_SECONDS, build_seconds if size == "full" else None),
        (
            "import fekernels, after torch",
            IMPORT_SECONDS,
            lambda: import_seconds(7 if size == "full" else 1),
        ),
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
    lines = []
    for row in rows:
        if "missing" in row:
            lines.append(f"{row['case']:51}not measured: {row['missing']}")
        else:
            met = "yes" if row["met"] else "NO"
            lines.append(f"{row['case']:51}{row['seconds']:.3f} s, at most {row['reach_s']:g} s: {met}")
    return "\n".join(lines)
