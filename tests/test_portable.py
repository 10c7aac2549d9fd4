"""The baseline kernels give the same bits from other compilers and, under emulation, on another processor."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fekernels import _build

ROOT = Path(__file__).parents[1]
# What is printed: fmas, normals, four steps of three tensors, 13 terms of a free energy with gradients, two samples;
# and, for three kernels and shapes, a Stein direction with its gradients, two sums of a discrepancy, a median distance.
BITS = 4 * (4 + 1003 + 4 * 3 * 777) + 8 * 13 + 4 * 777 * 24 + 4 * 2 * 777
BITS += 3 * (4 * 3 * (150 * 20 + 70 * 3 + 10 * 2100) + 3 * (4 + 2 * 8 + 4))


def printed_bits(folder: Path, compiler: str, *flags: str, runner: tuple[str, ...] = ()) -> bytes:
    """Build the baseline kernels with ``compiler`` and return what they print."""
    common = [compiler, *_build.CXX_FLAGS, "-w", "-I", str(ROOT / "csrc")]
    kernels = _build.Sources.under(ROOT / "csrc").per_isa
    sources = [(ROOT / "csrc" / kernel, ["-DFE_ISA=baseline", *flags]) for kernel in kernels]
    sources += [(ROOT / "csrc/cpu/dispatch.cpp", []), (ROOT / "tests/portable/print_bits.cpp", [*flags])]
    objects = []
    for source, extra in sources:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([*common, *extra, "-c", str(source), "-o", objects[-1]], check=True)
    program = str(folder / "print_bits")
    subprocess.run([compiler, "-static", *objects, "-o", program], check=True)
    return subprocess.run([*runner, program], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    bits = printed_bits(tmp_path_factory.mktemp("gcc"), "g++")
    assert len(bits) == BITS
    return bits


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
