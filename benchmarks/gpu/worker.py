"""The process that does the work of ``gpu_check``: a kernel that breaks the device takes only this process down.

Each part is announced and reported on a line of its own; ``gpu_check`` reads them, and starts another worker behind the
part at which one ended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import free_energy_times, stein_times, step_times
from tests.gpu.checks import Check, NotPossible, Target, all_checks

MARK = "@@gpu_check "
DEVICE_IS_BROKEN = 3  # exit code


def emit(**message: Any) -> None:
    print(MARK + json.dumps(message, default=str), flush=True)


def run_part(name: str, run: Callable[[], Any]) -> dict[str, Any]:
    """Run it and say how it ended: passed, not possible, or FAILED with the reason."""
    started = time.perf_counter()
    result, status, detail = None, "passed", ""
    try:
        result = run()
    except NotPossible as reason:
        status, detail = "not possible", str(reason)
    except Exception as error:
        status, detail = "FAILED", f"{type(error).__name__}: {error}"[:3000]
        if not isinstance(error, AssertionError):
            frames = traceback.extract_tb(error.__traceback__)[-5:]
            detail += " at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    seconds = round(time.perf_counter() - started, 3)
    return {"name": name, "status": status, "seconds": seconds, "detail": detail, "result": result}


def chosen_checks(only: str, quick: bool) -> list[Check]:
    return [check for check in all_checks() if only in check.name and not (quick and check.slow)]


def check(target: Target, only: str, quick: bool, first: int) -> None:
    """The checks from number ``first`` on."""

    def run(check: Check) -> Any:
        if check.needs_gpu and target.device.type != "cuda":
            raise NotPossible("needs a GPU")
        return check.run(target)

    for index, one in enumerate(chosen_checks(only, quick)):
        if index < first:
            continue
        name = f"{target.backend}: {one.name}"
        emit(begun=name, index=index)
        part = run_part(name, lambda one=one: run(one))  # type: ignore[misc]
        emit(part=part)
        if part["status"] == "FAILED" and target.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.zeros(1, device=target.device).add_(1).item()
            except RuntimeError as error:
                emit(note=f"the device is of no more use to this process: {str(error).splitlines()[0]}")
                sys.stdout.flush()
                os._exit(DEVICE_IS_BROKEN)


def times(backends: list[str], device: torch.device, quick: bool) -> dict[str, Any]:
    cuda = device.type == "cuda"
    large = [25_600_000] if quick else [25_600_000, 256_000_000]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*temperature > 0 with prior_precision = 0")
        rows = step_times.measure(
            backends,
            device,
            sizes=large if cuda else [100_000],
            many=(200, 10_000) if cuda else (20, 100),
            rounds=(7 if quick else 31) if cuda else 2,
            free_bytes=torch.cuda.mem_get_info(device)[0] if cuda else None,
            progress=lambda text: emit(note=f"timing {text}"),
        )
    energies = free_energy_times.measure(
        backends,
        device,
        (4096, 12288, 128) if cuda else (64, 256, 8),
        rounds=(7 if quick else 31) if cuda else 2,
        progress=lambda text: emit(note=f"timing {text}"),
    )
    curve = [(n, 64) for n in (1024, 4096, 16_384, 65_536, 262_144, 1_000_000)][: 4 if quick else 6]
    directions = stein_times.measure(
        backends,
        device,
        [*curve, (65_536, 3), (20_000, 784), *([] if quick else [(1_000_000, 3)])]
        if cuda
        else [(128, 4), (256, 4)],
        rounds=(3 if quick else 9) if cuda else 1,
        largest_plain=65_536,
        progress=lambda text: emit(note=f"timing {text}"),
    )
    verdicts = step_times.verdicts(rows) + free_energy_times.verdicts(energies)
    verdicts += stein_times.verdicts(directions)
    return {"rows": rows + energies, "svgd_rows": directions, "verdicts": verdicts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("work", choices=("check", "times"))
    parser.add_argument("--backends", required=True, help="with commas between them; check takes one")
    parser.add_argument("--device", required=True)
    parser.add_argument("--truth", default="cpp")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    backends = arguments.backends.split(",")
    if arguments.work == "check":
        check(Target(backends[0], device, arguments.truth), arguments.only, arguments.quick, arguments.first)
    else:
        emit(begun="times", index=0)
        emit(part=run_part("times", lambda: times(backends, device, arguments.quick)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
