"""The CUDA kernels compiled for the CPU (see ``cuda_on_cpu.h``) and called with CPU tensors."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue import optimizers
from fekernels._runtime import build
from fekernels._runtime.pointer_table import CHUNK, DTYPE_CODES, PointerTable
from fekernels.ops.optimizers.step import StepSettings
from tests.support import ROOT
from tests.support.optimizer_rows import Row, settings_of, tables_of
from tests.support.optimizers import Options
from tests.support.tensors import clone

HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
STEP_SOURCES = ("random", *(f"optimizers/{name}" for name in optimizers.OPERATIONS))
FREE_ENERGY_SOURCES = tuple(
    f"free_energy/{name}"
    for name in (
        "count_likelihoods",
        "compute_bound",
        "memory_bound",
        "categorical",
        "free_energy",
        "reparameterize",
        "scale",
    )
)
SOURCES = FREE_ENERGY_SOURCES + STEP_SOURCES  # the slowest first

SUCCESS, INVALID_VALUE = 0, 1


class StepCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "layouts", "chunks", "scratch")),
        *((name, ctypes.c_void_p) for name in ("lr_tensor", "temperature_tensor", "grad_scale", "found_inf")),
        *((name, ctypes.c_int64) for name in ("n_rows", "n_chunks", "dtypes", "flags", "seed")),
        *((name, ctypes.c_int32) for name in ("lr_dtype", "temperature_dtype")),
    ]


def _call_of(numbers: int) -> type[ctypes.Structure]:
    """The step, and the operation's settings as a row of float64."""
    fields = [("step", StepCall), ("settings", ctypes.c_double * numbers)]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


def compiler() -> list[str] | None:
    """The host's C++ compiler, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    return [found] if found else None


def compile_kernels(
    cxx: Sequence[str], directory: Path, csrc: Path = CSRC, sources: Sequence[str] = STEP_SOURCES
) -> ctypes.CDLL:
    """Build these files of ``csrc/cuda`` in ``directory``, unless they have been, and load the library."""
    library = directory / "cuda_on_cpu.so"
    if library.exists():
        return ctypes.CDLL(str(library))
    extra = build.extra_flags()  # those of a sanitizer, say
    # A fortified longjmp refuses to change stacks.
    flags = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fPIC", "-I", str(csrc)]
    flags += ["-I", str(HERE), *extra]
    files = [csrc / "cuda" / f"{name}.cu" for name in sources] + [HERE / "kernels.cpp"]
    objects = [directory / f"{file.stem}.o" for file in files]
    running = []
    for file, made in zip(files, objects, strict=True):
        command = [*cxx, *flags, "-x", "c++", "-c", str(file), "-o", str(made)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)
    subprocess.run([*cxx, *extra, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def chunks_of(table: PointerTable) -> Tensor:
    """The blocks that a ``PointerTable`` on a GPU would list: int32 [blocks, 2]."""
    numels = table.table[:, 7].tolist()
    rows = [(row, chunk) for row, numel in enumerate(numels) for chunk in range(-(-numel // CHUNK))]
    return torch.tensor(rows, dtype=torch.int32).view(-1, 2)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Kernels:
    """The entry points, with the arguments of ``torch.ops.fekernels_native``. Each returns the error code."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in optimizers.OPERATIONS:
            supports = getattr(library, f"fe_cuda_{name}_supports")
            supports.argtypes, supports.restype = [ctypes.c_int64], ctypes.c_bool

    def run_backwards(self, backwards: bool) -> None:
        """Whether threads and blocks take their turns in descending order."""
        self._library.cuda_on_cpu_backwards(ctypes.c_bool(backwards))

    def supports(self, name: str, *dtypes: torch.dtype) -> bool:
        """Whether there is a kernel for these dtypes of parameter, gradient and states."""
        code = sum(DTYPE_CODES[dtype] << 8 * place for place, dtype in enumerate(dtypes))
        return bool(getattr(self._library, f"fe_cuda_{name}_supports")(code))

    def philox(
        self, draw: str, out: Tensor, count: int, seed: int, stream: int, step: int, offset: int, purpose: int
    ) -> int:
        """Fill the first ``count`` elements of ``out``."""
        return int(
            getattr(self._library, f"fe_cuda_philox_{draw}")(
                ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(count), ctypes.c_int64(seed), ctypes.c_uint32(stream),
                ctypes.c_uint32(step), ctypes.c_int64(offset), ctypes.c_uint32(purpose), None,
            )
        )  # fmt: skip

    def fill(self, kind: str, out: Tensor, *key: int) -> Tensor:
        """``NoiseKernel.fill``."""
        out = clone(out)
        assert self.philox(kind, out, out.numel(), *key) == SUCCESS
        return out

    def step(self, op: str, table: PointerTable, settings: StepSettings) -> int:
        """One launch of the operation over the rows of a table."""
        chunks = chunks_of(table)
        lr, temperature = settings.lr_tensor, settings.temperature_tensor
        step = StepCall(
            rows=table.table.data_ptr(),
            layouts=table.layouts.data_ptr(),
            chunks=chunks.data_ptr(),
            scratch=table.scratch.data_ptr(),
            lr_tensor=_address(lr),
            temperature_tensor=_address(temperature),
            grad_scale=_address(settings.grad_scale),
            found_inf=_address(settings.found_inf),
            n_rows=len(table.table),
            n_chunks=len(chunks),
            dtypes=table.dtypes,
            flags=settings.flags(),
            seed=settings.seed,
            lr_dtype=0 if lr is None else DTYPE_CODES[lr.dtype],
            temperature_dtype=0 if temperature is None else DTYPE_CODES[temperature.dtype],
        )
        call = _call_of(len(settings.row))(step, tuple(settings.row))
        return int(getattr(self._library, f"fe_cuda_{op.removesuffix('_')}")(ctypes.byref(call), None))

    def step_rows(self, op: str, rows: list[Row], options: Options, changes: dict[str, Any]) -> list[Row]:
        """``StepKernel.run``: copies of the rows after one step, a launch for each set of dtypes."""
        rows = [row.clone() for row in rows]
        settings = settings_of(op, rows, options, **changes)
        for table in tables_of(op, rows, options):
            assert self.step(op, table, settings) == SUCCESS
            assert table.scratch.item() == 0, "the count of finished blocks was not reset"
        return rows


__all__ = [
    "CSRC",
    "FREE_ENERGY_SOURCES",
    "INVALID_VALUE",
    "SOURCES",
    "STEP_SOURCES",
    "SUCCESS",
    "Kernels",
    "compile_kernels",
    "compiler",
]
