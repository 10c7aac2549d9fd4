"""The baseline kernels give the same bits from other compilers and, under emulation, on another processor."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fekernels._catalogue.stein import KERNELS
from fekernels._runtime import build
from tests.support import ROOT

# What is printed: fmas, normals, four steps of three tensors, 13 terms of a free energy with gradients, two samples;
# and, for every kernel and three shapes, a Stein direction with its gradients, two sums of a discrepancy, a median
# distance.
BITS = 4 * (4 + 1003 + 4 * 3 * 777) + 8 * 13 + 4 * 777 * 24 + 4 * 2 * 777
BITS += sum(kernel.native for kernel in KERNELS) * (
    4 * 3 * (150 * 20 + 70 * 3 + 10 * 2100) + 3 * (4 + 2 * 8 + 4)
)


def baseline_program(folder: Path, compiler: str, *flags: str) -> str:
    """Build the baseline kernels alone with ``compiler``, in a program that prints bits.

    Without optimisation, which takes a sixth of the time: the suite's own library, whose instruction sets are held
    against each other, is an optimised one.
    """
    common = [compiler, *build.CXX_FLAGS, "-O0", "-w", "-I", str(ROOT / "csrc")]
    kernels = build.Sources.under(ROOT / "csrc").per_isa
    sources = [(ROOT / "csrc" / kernel, ["-DFE_ISA=baseline", *flags]) for kernel in kernels]
    sources.append((ROOT / "csrc/cpu/dispatch.cpp", []))
    sources.append((ROOT / "tests/runtime/portable/print_bits.cpp", [*flags]))
    objects = []
    for source, extra in sources:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([*common, *extra, "-c", str(source), "-o", objects[-1]], check=True)
    program = str(folder / "print_bits")
    subprocess.run([compiler, "-static", *objects, "-o", program], check=True)
    return program


def printed_bits(folder: Path, compiler: str, *flags: str, runner: tuple[str, ...] = ()) -> bytes:
    program = baseline_program(folder, compiler, *flags)
    return subprocess.run([*runner, program], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return baseline_program(tmp_path_factory.mktemp("gcc"), "g++")


@pytest.fixture(scope="module")
def expected(program: str) -> bytes:
    bits = subprocess.run([program], check=True, capture_output=True).stdout
    assert len(bits) == BITS
    return bits


def test_a_library_of_one_instruction_set_refuses_the_others(program: str) -> None:
    done = subprocess.run(
        [program],
        env=os.environ | {"FEKERNELS_ISA": "avx2"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode != 0
    assert "FEKERNELS_ISA must be one of auto, all, " in done.stderr and "baseline; got 'avx2'" in done.stderr
    if platform.machine() == "x86_64":
        assert re.search(
            r"avx2 \((not in this library: FEKERNELS_ISA=all compiles every one|not on this processor)\)",
            done.stderr,
        )


def test_fma_instruction_and_its_emulation_agree(tmp_path: Path, expected: bytes) -> None:
    if platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no separate fma instruction set")
    assert printed_bits(tmp_path, "g++", "-mfma") == expected


def test_clang(tmp_path: Path, expected: bytes) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    assert printed_bits(tmp_path, "clang++") == expected


def test_arm_under_emulation(tmp_path: Path, expected: bytes) -> None:
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    assert printed_bits(tmp_path, "aarch64-linux-gnu-g++", runner=("qemu-aarch64",)) == expected
