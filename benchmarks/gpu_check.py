"""All that only a GPU can show, in one call: ``python -m benchmarks.gpu_check [--out PATH] [--quick]``.

Runs from the source tree with nothing installed but torch (and Triton, which torch brings): builds the CUDA kernels
where nvcc and ninja are, holds both backends against the CPU, runs the tests that need a GPU, times the steps. Every
part is caught and recorded, so that one failure hides nothing else, and the JSON is written after every part.
``--device cpu`` runs the same code on the CPU, without the parts that need a GPU, to try it out.

Exit code: 0; 1 when something is wrong (a missed time is not); 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import stein_times, step_times
from benchmarks.gpu.environment import backends_of, build, environment
from benchmarks.gpu.worker import MARK, chosen_checks, run_part
from fekernels._runtime import backends as _backends
from tests.gpu.checks import NotPossible

ROOT = Path(__file__).resolve().parents[1]
WORKER = ["-m", "benchmarks.gpu.worker"]
PYTEST_SECONDS = 240
SILENCE_SECONDS = 180  # after which a worker that reports nothing is taken to hang


class Report:
    """The parts so far, on the screen and in the JSON."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"parts": []}

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        """Run a part in this process. Returns its result, or None where it failed or could not be."""
        part = run_part(name, function)
        self.add(part)
        return part["result"]

    def add(self, part: dict[str, Any]) -> None:
        self.data["parts"].append(part)
        shown = part["detail"] or _brief(part["result"])
        line = f"{part['status']:13}{part['seconds']:7.1f} s  {part['name']}{'  ' + shown if shown else ''}"
        print(line if len(line) < 700 else line[:700] + " ...", flush=True)
        self.write()

    def failed(self) -> list[str]:
        return [part["name"] for part in self.data["parts"] if part["status"] == "FAILED"]

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1, default=str) + "\n")


def _brief(result: Any) -> str:
    if not isinstance(result, dict):
        return str(result) if result else ""
    if "tensors" in result:
        equal = "bit-equal"
        if result["unequal"]:
            equal = f"{result['unequal']} elements differ, at most {result['max_ulp']} ulp"
        return f"{result['tensors']} tensors, {equal}"
    return ", ".join(f"{key}: {value}" for key, value in result.items() if not isinstance(value, list))


def follow(report: Report, arguments: list[str]) -> tuple[dict[str, Any] | None, str]:
    """Run one worker and record its parts. Returns the part that it began and did not end, and how the worker ended."""
    environment = {**os.environ, "PYTHONPATH": _path(), "PYTHONUNBUFFERED": "1"}
    worker = subprocess.Popen(
        [sys.executable, *WORKER, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert worker.stdout is not None
    begun: dict[str, Any] | None = None
    last_words: deque[str] = deque(maxlen=12)
    started = time.perf_counter()
    timer = threading.Timer(SILENCE_SECONDS, worker.kill)
    timer.start()
    try:
        for line in worker.stdout:
            if not line.startswith(MARK):
                last_words.append(line.strip())
                continue
            timer.cancel()
            timer = threading.Timer(SILENCE_SECONDS, worker.kill)
            timer.start()
            message = json.loads(line[len(MARK) :])
            if "begun" in message:
                begun, started = message, time.perf_counter()
            elif "part" in message:
                begun = None
                report.add(message["part"])
            else:
                print(f"  {message['note']}", flush=True)
    finally:
        timer.cancel()
        worker.stdout.close()
        code = worker.wait()
    if begun is not None:
        begun["seconds"] = round(time.perf_counter() - started, 1)
    return begun, f"the process ended with code {code}: {' | '.join(last_words)}" if code else ""


def work(report: Report, arguments: list[str], parts: int) -> None:
    """Run workers until all parts are done, each starting behind the part at which the one before ended."""
    first = 0
    while first < parts:
        done = len(report.data["parts"])
        begun, ending = follow(report, [*arguments, "--first", str(first)])
        first += len(report.data["parts"]) - done
        if begun is not None:
            report.add(_failure(begun["begun"], begun["seconds"], ending))
            first += 1
        elif len(report.data["parts"]) == done:  # it did not come as far as its first part
            report.add(_failure(" ".join(arguments), 0.0, ending))
            return


def _failure(name: str, seconds: float, detail: str) -> dict[str, Any]:
    return {"name": name, "status": "FAILED", "seconds": seconds, "detail": detail, "result": None}


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def run_pytest() -> str:
    """The tests that need a GPU, but for those that are this program's own checks."""
    if importlib.util.find_spec("pytest") is None:
        raise NotPossible("pytest is not installed")
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--ignore=tests/gpu"]
    if importlib.util.find_spec("xdist") is not None:  # most of the time goes into compiling Triton's kernels
        options += ["-n", str(max(1, min(6, (os.cpu_count() or 1) // 2)))]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "tests"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": _path()},
            capture_output=True,
            text=True,
            timeout=PYTEST_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"pytest -m gpu took more than {PYTEST_SECONDS} s") from error
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    last = lines[-1] if lines else done.stderr[-300:]
    if done.returncode == 5:  # nothing was selected
        raise NotPossible(f"no other test needs a GPU: {last}")
    assert done.returncode == 0, "; ".join(
        [last, *(line for line in lines if re.match(r"FAILED|ERROR", line))][:20]
    )
    return last


def verdict_table(verdicts: list[dict[str, Any]]) -> str:
    lines = [f"{'case':28}{'backend':11}{'goal':58}{'worst':>7}{'reach':>7}  met"]
    for verdict in verdicts:
        lines.append(
            f"{verdict['case']:28}{verdict['backend']:11}{verdict['goal']:58}{verdict['worst']:7.2f}{verdict['reach']:7.2f}"
            f"  {'yes' if verdict['met'] else 'NO, by ' + verdict['contestant']}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, help="of the JSON; default benchmarks/results/gpu_check-DEVICE-DATE.json"
    )
    parser.add_argument(
        "--quick", action="store_true", help="without the slow checks, the tests and the largest size"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try this program out"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only the checks with it in their names; no tests, no times",
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        built_with = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(f"gpu_check: no CUDA device (torch {torch.__version__}, {built_with})", file=sys.stderr)
        return 2
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if arguments.device == "cuda"
        else torch.device("cpu")
    )

    out = arguments.out
    if out is None and device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
        out = (
            ROOT
            / "benchmarks"
            / "results"
            / f"gpu_check-{name}-{datetime.now(timezone.utc):%Y-%m-%d-%H%M}.json"
        )
    report = Report(out)
    started = time.perf_counter()
    before = {name: os.environ.get(name) for name in ("FEKERNELS_CACHE_DIR", "FEKERNELS_BUILD")}
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("FEKERNELS_CACHE_DIR", cache)  # an empty one, so that the build is a cold one
        try:
            _run(arguments, device, report)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    report.data["seconds"] = round(time.perf_counter() - started, 1)
    report.data["failed"] = report.failed()
    report.write()
    _print_end(report)
    return 1 if report.failed() else 0


def _run(arguments: argparse.Namespace, device: torch.device, report: Report) -> None:
    report.data["environment"] = report.run("environment", lambda: environment(device))
    report.run("build", lambda: build(device))
    backends, reasons = backends_of(device)
    report.data["backends"] = {"checked": backends, "left out": reasons}
    for backend, reason in reasons.items():
        print(f"  {backend} cannot be checked here: {reason[:300]}", flush=True)
    truth = "cpp" if _backends._obstacle("cpp", "cpu") is None else "reference"
    common = ["--device", str(device), "--truth", truth, *(["--quick"] if arguments.quick else [])]
    parts = len(chosen_checks(arguments.only, arguments.quick))
    for backend in backends:
        work(report, ["check", "--backends", backend, "--only", arguments.only, *common], parts)
    if arguments.only:
        return
    if not arguments.quick:
        report.run("pytest -m gpu", run_pytest)
    timed = [backend for backend in backends if backend != "reference"]
    if timed:
        work(report, ["times", "--backends", ",".join(timed), *common], 1)


def _print_end(report: Report) -> None:
    parts = report.data["parts"]
    times = parts[-1]["result"] if parts[-1]["name"] == "times" else None
    if times:
        print(f"\n{step_times.table(times['rows'])}\n\n{stein_times.table(times['svgd_rows'])}")
        print(f"\n{verdict_table(times['verdicts'])}")
        if report.path is not None and importlib.util.find_spec("matplotlib") is not None:
            picture = report.path.with_suffix(".svgd.png")
            stein_times.plot(times["svgd_rows"], picture)
            print(f"\ncurve: {picture}")
    counts: dict[str, int] = {}
    for part in parts:
        counts[part["status"]] = counts.get(part["status"], 0) + 1
    print(f"\n{', '.join(f'{n} {status}' for status, n in counts.items())} in {report.data['seconds']:.0f} s")
    for part in parts:
        if part["status"] == "not possible" and part["detail"] != "needs a GPU":
            print(f"not possible: {part['name']}: {part['detail'][:300]}")
    for name in report.failed():
        print(f"FAILED: {name}")
    if report.path is not None:
        print(f"written: {report.path}")


if __name__ == "__main__":
    sys.exit(main())
