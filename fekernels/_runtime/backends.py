"""Which backend runs which op where, and why the others do not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from fekernels._catalogue.optimizers import OPERATIONS
from fekernels._runtime import extension, host

__all__ = [
    "BACKENDS",
    "BackendTable",
    "BackendUnavailable",
    "backends",
    "choose",
    "compiled",
    "implementation",
    "use_backend",
]

# The folder of its family and the file (in fekernels.ops and in a backend's package) that each kernel lives in.
KERNELS = {
    "philox_bits": "random",
    "philox_uniform": "random",
    "philox_normal": "random",
    **{f"{name}_": f"optimizers.{name}" for name in OPERATIONS},
    "variational_kl": "optimizers.variational_kl",
    "free_energy": "free_energy.free_energy",
    "reparameterize": "free_energy.reparameterize",
    "reparameterize_backward": "free_energy.reparameterize",
    "svgd_direction": "stein.svgd_direction",
    "svgd_direction_backward": "stein.svgd_direction",
    "kernel_stein_discrepancy": "stein.kernel_stein_discrepancy",
    "sq_dist_rank": "stein.sq_dist_rank",
    "belief_propagation": "graph.belief_propagation",
}

# What no user calls, so that no table of backends shows it: of packages alone, of all backends, and of HOST and the
# reference.
INTERNAL = {
    "svgd_direction_rows": "stein.svgd_direction",
    "scale_": "free_energy.free_energy",
    "chain_statistics": "diagnostics.chain_statistics",
}


@dataclass(frozen=True)
class Backend:
    """One way to run every op.

    Attributes:
        obstacle: of a device type and maybe a kernel: why it cannot run that there; None where it can.
        package: where its functions are, in modules as KERNELS has them; None: operators of the compiled library, which
            take contiguous memory.
        by_rows: whether an optimizer's step takes its tensors as rows, not as a table of their addresses.
    """

    obstacle: Callable[[str, str | None], str | None]
    package: str | None = None
    by_rows: bool = False


def _reference_obstacle(device_type: str, kernel: str | None) -> str | None:
    return None


def _cpp_obstacle(device_type: str, kernel: str | None) -> str | None:
    if device_type != "cpu":
        return "the C++ kernels run on CPU tensors"
    return extension.unavailable_reason()


# On a GPU, gathers and sums by variable of PyTorch's own are the kernel: the reference runs.
REFERENCE_ON_GPU = ("belief_propagation",)


def _triton_obstacle(device_type: str, kernel: str | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a GPU tensor"
    if kernel in REFERENCE_ON_GPU:
        return f"{kernel} has no Triton kernel; the reference runs there"
    return None


# These have no CUDA C++ kernel: Triton's tensor-core products are what one would be written for, and a KL is no loop's.
WITHOUT_CUDA = (
    "variational_kl",
    "svgd_direction",
    "svgd_direction_backward",
    "kernel_stein_discrepancy",
    "sq_dist_rank",
)


def _cuda_obstacle(device_type: str, kernel: str | None) -> str | None:
    if device_type != "cuda":
        return "the CUDA kernels run on GPU tensors"
    if kernel in REFERENCE_ON_GPU:
        return f"{kernel} has no CUDA C++ kernel; the reference runs there"
    if kernel in WITHOUT_CUDA:
        return f"{kernel} has no CUDA C++ kernel; triton has one"
    reason = extension.unavailable_reason()
    if reason is None and not extension.has_cuda_kernels():
        reason = (
            "the extension was built without CUDA kernels (FEKERNELS_BUILD=cuda builds them, and needs nvcc)"
        )
    return reason


RECORDS = {
    "reference": Backend(_reference_obstacle, package="fekernels.reference", by_rows=True),
    "cpp": Backend(_cpp_obstacle),
    "triton": Backend(_triton_obstacle, package="fekernels.triton"),
    "cuda": Backend(_cuda_obstacle),
}
BACKENDS = tuple(RECORDS)
# The one whose further operators, beside KERNELS, work on the CPU's memory: it is asked for where a caller has use for
# them. And the one that steps what no table of addresses can hold.
HOST, BY_ROWS = "cpp", "reference"

# What "auto" takes, the first that can run. On a GPU, Triton before CUDA C++ because it needs no toolchain; no
# measurement has put CUDA C++ ahead yet (`python -m benchmarks.gpu_check` times both).
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}


class BackendUnavailable(RuntimeError, ValueError):
    """A backend was asked for by name and cannot run; the message says why."""


def _checked(name: str, argument: str = "backend") -> str:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a string; got {type(name).__name__}")
    if name != "auto" and name not in RECORDS:
        raise ValueError(f"{argument} must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


_requested: str | None = None  # None: FEKERNELS_BACKEND decides


def requested() -> str:
    """The backend of every op: that of ``use_backend``, else FEKERNELS_BACKEND's, else "auto".

    Raises:
        ValueError: when FEKERNELS_BACKEND holds an unknown name.
    """
    if _requested is not None:
        return _requested
    name = os.environ.get("FEKERNELS_BACKEND") or "auto"
    if name != "auto" and name not in RECORDS:
        raise ValueError(f"FEKERNELS_BACKEND must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


def _obstacle(backend: str, device_type: str, kernel: str | None = None) -> str | None:
    """Why ``backend`` cannot run, or not this kernel, on tensors of ``device_type``; None when it can."""
    return RECORDS[backend].obstacle(device_type, kernel)


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def choose(device_type: str, backend: str | None = None, kernel: str | None = None) -> str:
    """The backend that runs on ``device_type``: ``backend``, else what ``use_backend`` or FEKERNELS_BACKEND names.

    Args:
        kernel: one of KERNELS, where not every backend of the device has it.

    Raises:
        BackendUnavailable: a backend was named and cannot run; the message has its reason.
    """
    name = _checked(backend) if backend is not None else requested()
    if name == "auto":
        for candidate in PREFERENCE.get(device_type, ()):
            if RECORDS[candidate].obstacle(device_type, kernel) is None:
                return candidate
        return "reference"
    obstacle = RECORDS[name].obstacle(device_type, kernel)
    if obstacle is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run on {device_type} tensors: {obstacle}")
    return name


def implementation(kernel: str, backend: str, overload: str = "default") -> Callable[..., Any]:
    """The function of ``kernel`` in ``backend``. An optimizer's step takes rows or pointer tables, see ``takes_rows``.

    ``overload``: of a compiled operator, which some have for calls of a simple form.
    """
    file = KERNELS.get(kernel) or INTERNAL[kernel]
    package = RECORDS[backend].package
    if package is None:
        return _native(kernel, overload)
    return getattr(importlib.import_module(f"{package}.{file}"), kernel)


def is_compiled(backend: str) -> bool:
    """Whether its functions are operators of the compiled library, which take contiguous memory."""
    return RECORDS[backend].package is None


def takes_rows(backend: str) -> bool:
    """Whether an optimizer's step in ``backend`` takes its tensors as rows, not as a table of their addresses."""
    return RECORDS[backend].by_rows


@functools.cache
def _native(name: str, overload: str) -> Callable[..., Any]:
    """An operator of the compiled library, which stays. Looked up at each call it took 1 us, 12 from cold caches."""
    extension.load()
    return getattr(getattr(torch.ops.fekernels_native, name), overload)


class use_backend:  # noqa: N801 (reads as a function, and is used as one)
    """Choose the backend of every op: ``use_backend("cpp")`` from now on, ``with use_backend("cpp"):`` for a block.

    Args:
        name: "auto" (the default of the package: the fastest that can run), "reference", "cpp", "triton" or "cuda".

    Raises:
        TypeError: name is no string.
        ValueError: an unknown name; the message lists the valid ones.
        BackendUnavailable: the backend cannot run on any device of this machine; the message says why.
    """

    def __init__(self, name: str) -> None:
        global _requested
        if _checked(name, "use_backend: name of the backend") != "auto":
            obstacles = {device: _obstacle(name, device) for device in _device_types()}
            if all(obstacles.values()):
                reasons = "; ".join(f"{device}: {reason}" for device, reason in obstacles.items())
                raise BackendUnavailable(f"use_backend: backend {name!r} cannot run here ({reasons})")
        self._before = _requested
        _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._before


@dataclass(frozen=True)
class BackendRow:
    """One op on one device: the backend in use, the others that could be, and for every other one the reason.

    "none" is in use where a backend, or kernels (FEKERNELS_BUILD), were asked for by name that cannot run this op here.
    """

    op: str
    device: str
    in_use: str
    available: tuple[str, ...]
    reasons: dict[str, str]


class BackendTable:
    """What runs where and why: iterate over its rows, index it by ``(op, device)``, or print it."""

    def __init__(self, rows: list[BackendRow], checks: str = "") -> None:
        self._rows = rows
        self._checks = checks

    def __iter__(self) -> Iterator[BackendRow]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: tuple[str, str]) -> BackendRow:
        for row in self._rows:
            if (row.op, row.device) == key:
                return row
        ops, devices = (dict.fromkeys(getattr(row, name) for row in self._rows) for name in ("op", "device"))
        raise KeyError(
            f"backends: a key must be (op, device) with an op of {', '.join(ops)} and a device of"
            f" {', '.join(devices)}; got {key!r}"
        )

    def __str__(self) -> str:
        width = max(len(row.op) for row in self._rows) + 2
        lines = [f"{'op':<{width}}{'device':<8}{'in use':<11}could also run"]
        for row in self._rows:
            others = ", ".join(name for name in row.available if name != row.in_use) or "-"
            lines.append(f"{row.op:<{width}}{row.device:<8}{row.in_use:<11}{others}")
        reasons: dict[tuple[str, str], None] = {}
        for row in self._rows:
            reasons.update({(row.device, f"{name}: {why}"): None for name, why in row.reasons.items()})
        lines += ["", "not available"] + [f"  {device:<6}{why}" for device, why in reasons]
        return "\n".join([*lines, *(["", self._checks] if self._checks else [])])

    __repr__ = __str__


def _in_use(device_type: str, kernel: str) -> str:
    try:
        return choose(device_type, kernel=kernel)
    except (BackendUnavailable, extension.ExtensionUnavailable):
        return "none"


def _told(backend: str, device_type: str, kernel: str) -> str | None:
    """:func:`_obstacle`, also where FEKERNELS_BUILD names kernels that cannot be had, for which every op raises."""
    try:
        return _obstacle(backend, device_type, kernel)
    except extension.ExtensionUnavailable as error:
        return str(error)


def backends() -> BackendTable:
    """Which backend is in use for each op on each device of this machine, and why every other one is not available.

    Finds or builds the extension, since only that tells whether the compiled kernels can run.
    """
    rows = []
    for op in KERNELS:
        for device in _device_types():
            obstacles = {backend: _told(backend, device, op) for backend in BACKENDS}
            rows.append(
                BackendRow(
                    op=op,
                    device=device,
                    in_use=_in_use(device, op),
                    available=tuple(name for name, why in obstacles.items() if why is None),
                    reasons={name: why for name, why in obstacles.items() if why is not None},
                )
            )
    missing = host.unavailable_reason()
    module = "compiled" if missing is None else f"none, Python instead ({missing})"
    return BackendTable(rows, f"host module (gradient check, calls of free energies and samples): {module}")


def compiled(name: str) -> Callable[..., Any]:
    """An operator of the compiled library that computes what no other backend does in such parts."""
    return _native(name, "default")


def native_op(name: str) -> Any:
    """An op of the compiled library that takes no tensor (``isa``, ``set_isa``, ``build_info``)."""
    extension.load()
    return getattr(torch.ops.fekernels_native, name)
