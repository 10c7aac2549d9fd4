"""What a GPU machine has: versions, tools, the kernels that can be built on it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from typing import Any

import torch

import fekernels as fe
from fekernels._runtime import backends, extension
from fekernels._runtime import build as _build
from fekernels.bench.timing import processor
from tests.gpu.checks import NotPossible


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the device, and which of the tools that a build needs were found."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()} {platform.release()}",
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "fekernels": fe.__version__,
    }
    for module in ("triton", "numpy", "pytest"):
        facts[module] = _version(module)
    for tool, find in (
        ("ninja", _build.find_ninja),
        ("compiler", _build.find_compiler),
        ("nvcc", _build.find_nvcc),
    ):
        try:
            facts[tool] = find()
        except _build.ExtensionUnavailable as error:
            facts[tool] = f"missing: {error}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_gb"] = round(properties.total_memory / 1e9, 1)
        facts["l2_mb"] = round(getattr(properties, "L2_cache_size", 0) / 1e6, 1)
        facts["driver"] = _query_driver()
    return facts


def _version(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "missing"
    return str(getattr(importlib.import_module(module), "__version__", "?"))


def _query_driver() -> str:
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def build(device: torch.device) -> dict[str, Any]:
    """Compile the kernels, with CUDA for a GPU, and choose by FEKERNELS_BUILD what could be had."""
    built: dict[str, Any] = {}
    failures = []
    for kind in dict.fromkeys(("cuda" if device.type == "cuda" else "cpu", "cpu")):
        started = time.perf_counter()
        try:
            library = fe.build(kind)
        except _build.ExtensionUnavailable as error:
            failures.append(f"{kind}: {error}")
            continue
        built = {
            "kernels": kind,
            "library": library.name,
            "megabytes": round(library.stat().st_size / 1e6, 2),
        }
        built["seconds"] = round(time.perf_counter() - started, 1)
        break
    os.environ["FEKERNELS_BUILD"] = built.get("kernels", "none")
    if built:
        extension.load()
    if failures:
        serving = "Triton alone serves the GPU" if device.type == "cuda" else "the reference serves the CPU"
        truth = (
            "the C++ kernels are the truth" if built else "the reference is the truth, but for the last bits"
        )
        message = f"{'; '.join(failures)}. So {serving}, and {truth}."
        # A missing tool is a fact of the machine; a compiler that fails is a fault of ours.
        if any(" failed:" in failure for failure in failures):
            raise AssertionError(message)
        raise NotPossible(message)
    return built


def backends_of(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends to check on the device, and the reasons against the others."""
    found, reasons = [], {}
    for backend in ("triton", "cuda") if device.type == "cuda" else ("cpp", "reference"):
        obstacle = backends._obstacle(backend, device.type)
        if obstacle is None:
            found.append(backend)
        else:
            reasons[backend] = obstacle
    return found, reasons
