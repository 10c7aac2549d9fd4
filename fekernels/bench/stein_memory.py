"""Peak memory of the Stein passes, each in a process of its own: what no n x n matrix would fit in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fekernels.bench import stein as cases
from fekernels.bench.memory import in_process, peak
from fekernels.stein.bandwidth import median_bandwidth

__all__ = ["measure", "table"]

REACH_MB = 200.0  # beyond the inputs

PASSES: dict[str, Callable[[Tensor, Tensor, float], object]] = {
    cases.OURS: cases.ours,
    "svgd_direction, backward": partial(cases.backward, cases.ours),
    "kernel_stein_discrepancy": cases.discrepancy,
    "median_bandwidth": lambda x, s, h: median_bandwidth(x),
    cases.PLAIN: cases.plain,
}


def growth(name: str, shape: cases.Shape) -> int:
    """Bytes by which the resident set peaks over what it is with the operands, the result included."""
    run = PASSES[name]
    run(*cases.problem((200, shape[-1])))  # threads, libraries and small allocations first
    return peak(partial(run, *cases.problem(shape)))


def measure(sizes: cases.Sizes, threads: int) -> list[dict[str, Any]]:
    """A row for each of our passes on many particles, and for plain PyTorch on as many as it can still take."""
    rows = []
    for name in PASSES:
        shape = sizes.middle if name == cases.PLAIN else sizes.memory
        n, d = shape
        row: dict[str, Any] = {
            "case": f"n = {n:,}, d = {d}",
            "contestant": name,
            "operands_mb": 8 * n * d / 1e6,
        }
        try:
            row["growth_mb"] = in_process("fekernels.bench.stein_memory", name, shape, threads) / 1e6
            if name == cases.OURS:
                row |= {"reach_mb": REACH_MB, "met": row["growth_mb"] <= REACH_MB}
        except (RuntimeError, subprocess.SubprocessError) as error:
            row["missing"] = str(error)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'peak beyond the operands':28}{'by':38}{'operands MB':>12}{'MB':>9}{'at most':>9}  met"]
    for row in rows:
        start = f"{row['case']:28}{row['contestant']:38}"
        if "missing" in row:
            lines.append(f"{start}not measured: {row['missing']}")
            continue
        goal = f"{row['reach_mb']:9.0f}{'yes' if row['met'] else 'NO':>5}" if "met" in row else f"{'-':>9}"
        lines.append(f"{start}{row['operands_mb']:12.1f}{row['growth_mb']:9.1f}{goal}")
    return "\n".join(lines)


def main() -> None:
    name, shape, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(growth(name, tuple(shape)))


if __name__ == "__main__":
    main()
