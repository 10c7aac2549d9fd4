"""The baseline kernels give the same bits from other compilers and, under emulation, on another processor."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from fekernels._catalogue.stein import KERNELS
from fekernels._runtime import build
from tests.support import ROOT
from tests.support.made_once import made_once

# What is printed: fmas, normals, four steps of three tensors, 13 terms of a free energy with gradients, two samples;
# and, for every kernel and three shapes, a Stein direction with its gradients, two sums of a discrepancy, a median
# distance.
BITS = 4 * (4 + 1003 + 4 * 3 * 777) + 8 * 13 + 4 * 777 * 24 + 4 * 2 * 777
BITS += sum(kernel.native for kernel in KERNELS) * (
    4 * 3 * (150 * 20 + 70 * 3 + 10 * 2100) + 3 * (4 + 2 * 8 + 4)
)


PRINT_BITS = ROOT / "tests/runtime/portable/print_bits.cpp"
PROGRAM = "print_bits"
MOST_FMA = ("cpu/random.cpp", "cpu/free_energy/free_energy.cpp", "cpu/optimizers/langevin_adam.cpp")


def compile_baseline(folder: Path, sources: Iterable[Path], compiler: str, *flags: str) -> list[Path]:
    """Objects of the baseline kernels.

    Without optimisation, which takes a sixth of the time: the suite's own library, whose instruction sets are held
    against each other, is an optimised one.
    """
    common = [compiler, *build.CXX_FLAGS, "-O0", "-w", "-I", str(ROOT / "csrc"), "-DFE_ISA=baseline", *flags]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*common, "-c", str(source), "-o", str(objects[-1])], check=True)
    return objects


def baseline_program(folder: Path, compiler: str) -> str:
    """Build the baseline kernels alone with ``compiler``, in a program that prints bits."""
    sources = [*(ROOT / "csrc" / name for name in (*MOST_FMA, build.DISPATCH)), PRINT_BITS]
    # As the library's own: in this order, the compiler's header of intrinsics once for several.
    for i, group in enumerate(build.Sources.under(ROOT / "csrc").per_isa):
        sources.append(folder / f"group_{i}.cpp")
        sources[-1].write_text(
            "".join(f'#include "{name}"\n' for name in group[1:] + group[:1] if name not in MOST_FMA)
        )
    return link(folder, compile_baseline(folder, sources, compiler), compiler)


def link(folder: Path, objects: Iterable[Path], compiler: str) -> str:
    program = str(folder / PROGRAM)
    subprocess.run([compiler, "-static", *map(str, objects), "-o", program], check=True)
    return program


def printed_bits(program: str, *runner: str) -> bytes:
    return subprocess.run([*runner, program], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return str(made_once(tmp_path_factory, "gcc", lambda folder: baseline_program(folder, "g++")) / PROGRAM)


@pytest.fixture(scope="module")
def expected(program: str) -> bytes:
    bits = printed_bits(program)
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


def test_fma_instruction_and_its_emulation_agree(tmp_path: Path, program: str, expected: bytes) -> None:
    """In what calls it most. That all kernels agree, the contract says of the library's instruction sets."""
    if platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no separate fma instruction set")
    others = {path.name: path for path in Path(program).parent.glob("*.o")}
    sources = [*(ROOT / "csrc" / name for name in MOST_FMA), PRINT_BITS]
    with_fma = compile_baseline(tmp_path, sources, "g++", "-mfma")
    objects = others | {path.name: path for path in with_fma}
    assert len(objects) == len(others)
    assert printed_bits(link(tmp_path, objects.values(), "g++")) == expected


def test_clang(tmp_path: Path, expected: bytes) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    assert printed_bits(baseline_program(tmp_path, "clang++")) == expected


def test_arm_under_emulation(tmp_path: Path, expected: bytes) -> None:
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    assert printed_bits(baseline_program(tmp_path, "aarch64-linux-gnu-g++"), "qemu-aarch64") == expected
