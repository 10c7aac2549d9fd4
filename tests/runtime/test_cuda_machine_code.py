"""What nvcc makes of the CUDA sources: no spills, and 128-bit accesses where the speed is."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fekernels._runtime import build
from tests.support import cuda_on_cpu
from tests.support.cuda_on_cpu import CSRC
from tests.support.made_once import made_once
from tests.support.optimizers import GPU_DTYPES, VARIATIONAL_DTYPES

pytestmark = pytest.mark.slow


# Term, dtypes of parameters and target -> four-element accesses that one thread has on their way at a time.
_BATCHES = {"Mse": 4, "Gaussian": 4, "GaussianLearned": 2, "Bernoulli": 4, "NormalKl": 4, "NormalPriorKl": 1}
_OPERANDS = {"Mse": 1, "Gaussian": 1, "GaussianLearned": 2, "Bernoulli": 1, "NormalKl": 2, "NormalPriorKl": 4}
# The kernels whose instructions are counted; of the others ptxas' own report and the PTX say what is asked.
COUNTED = re.compile(r"langevin_adam_kernelIL\w+?E0EL\w+?_0EE|plain_terms_kernel")
PICKLE = "code.pickle"
F32, BF16 = 0, 2  # of enum DType
PLAIN_TERMS = [
    (term, param, target)
    for term in _BATCHES
    for param, target in ((F32, F32), (BF16, F32), (BF16, BF16))
    if target == F32 or not term.startswith("Normal")
]


@dataclass
class MachineCode:
    """What nvcc makes of one kernel for sm_90."""

    registers: int
    stack: int
    spilled: int
    ptx: str
    sass: str | None  # None of kernels that are not COUNTED, and where there is no cuobjdump


def find_cuobjdump(nvcc: str) -> str | None:
    """Beside nvcc, on PATH, or in the triton package (looked for, not imported)."""
    places = [os.path.dirname(nvcc), os.environ["PATH"]]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(os.path.join(os.path.dirname(triton.origin), "backends", "nvidia", "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def disassemble(cuobjdump: str, cubin: Path, kernels: Sequence[str]) -> str:
    path = f"{os.path.dirname(cuobjdump)}{os.pathsep}{os.environ['PATH']}"  # it calls nvdisasm
    command = [cuobjdump, "-sass", "-fun", ",".join(kernels), str(cubin)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    ).stdout


def sections(text: str, heading: str) -> dict[str, str]:
    """The parts that begin with ``heading`` and a kernel's mangled name, by that name."""
    _, *parts = re.split(rf"^{heading}\s*(\w+)", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MachineCode]:
    try:
        nvcc = build.find_nvcc()[0]
    except build.ExtensionUnavailable as error:
        pytest.skip(str(error))
    directory = made_once(tmp_path_factory, "sm_90", lambda directory: compile_all(nvcc, directory))
    code: dict[str, MachineCode] = pickle.loads((directory / PICKLE).read_bytes())
    return code


def compile_all(nvcc: str, directory: Path) -> None:
    cuobjdump = find_cuobjdump(nvcc)
    flags = [*build.NVCC_FLAGS, "-I", str(CSRC), "-arch=sm_90", "-cubin", "-keep", "-Xptxas", "-v"]
    running = []
    for name in cuda_on_cpu.SOURCES:
        (directory / name).mkdir(parents=True)
        command = [nvcc, *flags, str(CSRC / "cuda" / f"{name}.cu"), "-o", f"{Path(name).name}.cubin"]
        running.append(subprocess.Popen(command, cwd=directory / name, stderr=subprocess.PIPE, text=True))
    code = {}
    for name, process in zip(cuda_on_cpu.SOURCES, running, strict=True):
        report = process.communicate()[1]
        assert process.returncode == 0, report
        made = directory / name / Path(name).name
        ptx = sections(made.with_suffix(".ptx").read_text(), r"(?:\.visible )?\.entry")
        counted = [kernel for kernel in ptx if COUNTED.search(kernel)]
        sass = {}
        if cuobjdump and counted:
            sass = sections(disassemble(cuobjdump, made.with_suffix(".cubin"), counted), r"\s*Function :")
            assert sass.keys() == set(counted)
        for kernel, use in sections(report, "ptxas info *: Function properties for").items():
            numbers = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill .*?Used (\d+) registers", use, re.S
            )
            assert numbers is not None, report
            stack, spilled, registers = map(int, numbers.groups())
            code[kernel] = MachineCode(registers, stack, spilled, ptx[kernel], sass.get(kernel))
    (directory / PICKLE).write_bytes(pickle.dumps(code))


def test_no_kernel_spills(machine_code):
    # Langevin-Adam, SGLD, random; of the variational a draw, two sums and two steps; free energy: the fast kernels,
    # those for everything, and the others; scale, z.
    assert (
        len(machine_code)
        == len(GPU_DTYPES) + 4 + 3 + 5 * len(VARIATIONAL_DTYPES) + len(PLAIN_TERMS) + 7 + 4 + 3 + 3 + 1 + 2
    )
    for kernel, code in machine_code.items():
        assert (code.stack, code.spilled) == (0, 0), kernel
        assert ".local" not in code.ptx, kernel
        assert code.sass is None or not re.search(r"\b(LDL|STL)\b", code.sass), kernel


def test_float32_moves_in_128_bits_with_five_blocks_a_multiprocessor(machine_code):
    names = [name for name in machine_code if re.search(r"langevin_adam_kernelIL\w+?E0EL\w+?_0EE", name)]
    assert len(names) == 1
    code = machine_code[names[0]]
    assert code.registers * 128 * 5 <= 65536
    # A first unit; four loops, one a noise placement; and one loop with the maximum and the anchor.
    loads, stores = 4 + 4 * 4 + 6, 4 * 3 + 4
    assert len(re.findall(r"\bld\.global\.cg\.v4\.u32", code.ptx)) >= loads
    assert len(re.findall(r"\bst\.global\.cg\.v4\.u32", code.ptx)) >= stores
    assert not re.search(r"\b(ld|st)\.global\.cg\.(?!v4)", code.ptx)
    if code.sass is not None:
        assert len(re.findall(r"\bLDG\.[\w.]*128", code.sass)) >= loads
        assert len(re.findall(r"\bSTG\.[\w.]*128", code.sass)) >= stores


@pytest.mark.parametrize("term, param, target", PLAIN_TERMS)
def test_the_free_energy_loads_a_batch_before_it_computes(machine_code, term, param, target):
    """As many loads as the batch has, in the widest accesses, and no store between them that would wait for one."""
    pattern = rf"plain_terms_kernel\w*?\d{term}ELi\d+ELNS_\d*DTypeE{param}ELS\w*?_{target}EEEv"
    names = [name for name in machine_code if re.search(pattern, name)]
    assert len(names) == 1
    code = machine_code[names[0]]
    batch, operands = _BATCHES[term], _OPERANDS[term]
    loads = {F32: 0, BF16: 0}
    loads[param] += batch * operands
    loads[target] += 0 if term.startswith("Normal") else batch
    stores = {F32: 0, BF16: 0, param: batch * operands}
    for dtype, suffix, width in ((F32, "v4", "128"), (BF16, "v2", "64")):
        assert len(re.findall(rf"\bld\.global\.cg\.{suffix}\.u32", code.ptx)) == loads[dtype]
        assert len(re.findall(rf"\bst\.global\.cg\.{suffix}\.(?:u32|b32)", code.ptx)) == stores[dtype]
        if code.sass is not None:
            assert len(re.findall(rf"\bLDG\.[\w.]*\b{width}\b[\w.]*\.STRONG", code.sass)) == loads[dtype]
    if code.sass is not None:
        wide = [m.start() for m in re.finditer(r"\bLDG\.[\w.]*\b(?:64|128)\b[\w.]*\.STRONG", code.sass)]
        first_store = re.search(r"\bSTG\.[\w.]*\b(?:64|128)\b", code.sass)
        assert len(wide) == sum(loads.values())
        assert first_store is not None and wide[-1] < first_store.start()
    # Six blocks a multiprocessor, 24 warps of four 16-byte loads an operand, is more than hides the memory's latency.
    assert code.registers * 128 * 6 <= 65536


def test_columns_meet_in_shared_memory(machine_code):
    """In 16 bytes at a time, and not through an access to global memory, which the shim could take for one."""
    names = [name for name in machine_code if "any_terms_kernel" in name]
    assert len(names) == 7 + 4 + 3
    for name in names:
        assert re.search(r"\bst\.shared\.v4\.(?:u32|b32|f32)", machine_code[name].ptx), name
