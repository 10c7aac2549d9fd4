"""Compiles the Triton kernels for a GPU that need not be there, and reads the machine code."""

import bisect
import functools
import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fekernels.triton import random
from fekernels.triton.launch import EXACT
from fekernels.triton.optimizers import (
    codes,
    langevin_adam,
    sgld,
    table_rows,
    variational_accumulate,
    variational_adam,
    variational_draw,
)

F32, BF16 = 0, 2
FLOAT32, ALL_BF16 = F32, BF16 | BF16 << 8 | BF16 << 16
CORRECTED, STOCHASTIC, FROZEN = 8, 16, 32
EVERYTHING = 0b111_1100_0011  # every term of the formula, and a tensor wherever there can be one


@dataclass(frozen=True)
class Spec:
    """One specialisation. reads, writes: 16-byte loads and stores of a thread, each of them of another tensor."""

    kernel: Any
    constants: dict[str, Any]
    reads: int
    writes: int
    tensors: tuple[str, ...] = ()  # of the optional ones, those that are given


def _step(noise: int, flags: int = 0, dtypes: int = FLOAT32, tensors: tuple[str, ...] = ()) -> Spec:
    adapting_maximum = bool(flags & codes.AMSGRAD.value and not flags & FROZEN)
    reads = 4 + adapting_maximum + bool(flags & codes.PRIOR.value)
    writes = 2 if flags & FROZEN else 3 + adapting_maximum
    rescale = codes.RESCALE.value if noise in (0, 3) else 0  # T = 0 with noise="momentum" rescales as well
    flags |= CORRECTED | rescale
    constants = dict(NOISE=noise, FLAGS=flags, DTYPES=dtypes, **table_rows.configuration(dtypes, flags))
    return Spec(langevin_adam.langevin_adam_kernel, constants, reads, writes, tensors)


def _sgld(flags: int, dtypes: int) -> Spec:
    constants = dict(NOISE=True, FLAGS=flags, DTYPES=dtypes, **table_rows.configuration(dtypes, flags))
    return Spec(sgld.sgld_kernel, constants, 2, 1)


def _draw(kind: int) -> Spec:
    constants = dict(DRAW=kind, ALIGNED=True, BLOCK=random.BLOCK, num_warps=random.WARPS)
    return Spec(random.fill_kernel, constants, 0, random.BLOCK // (4 * 32 * random.WARPS))


def _variational(
    kernel: Any, kind: str, value: int, dtypes: int, reads: int, writes: int, flags: int = 0
) -> Spec:
    """kind: the constant that says what a kernel is compiled for."""
    constants = {kind: value, "FLAGS": flags, "DTYPES": dtypes, **table_rows.configuration(dtypes, flags)}
    return Spec(kernel, constants, reads, writes)


_DRAW, _ADAM = variational_draw.variational_draw_kernel, variational_adam.variational_adam_kernel
_SUM = variational_accumulate.variational_accumulate_kernel
BF16_OF_FLOAT32 = BF16 | BF16 << 8  # parameters and gradients, with float32 states
SPECS = {
    "cold": _step(3),
    "momentum": _step(0),
    "preconditioned": _step(1),
    "isotropic": _step(2),
    "temperature_tensor": _step(0, codes.MAYBE_QUIET.value, tensors=("temperature_tensor",)),
    "bf16_cold": _step(3, STOCHASTIC, ALL_BF16),
    "bf16_momentum": _step(0, STOCHASTIC, ALL_BF16),
    "frozen": _step(0, FROZEN),
    "frozen_maximum": _step(3, FROZEN | codes.AMSGRAD.value),
    "bf16_frozen": _step(0, STOCHASTIC | FROZEN, ALL_BF16),
    "everything": _step(0, EVERYTHING, tensors=("lr_tensor", "grad_scale", "found_inf")),
    "sgld": _sgld(0, FLOAT32),
    "sgld_bf16": _sgld(STOCHASTIC, ALL_BF16),
    "normal": _draw(random.NORMAL),
    "variational_draw": _variational(_DRAW, "NOISE", 1, FLOAT32, 2, 2),
    "variational_draw_bf16": _variational(_DRAW, "NOISE", 1, BF16_OF_FLOAT32, 5, 3),
    "variational_sum": _variational(_SUM, "FIRST", False, FLOAT32, 3, 2),
    "variational_step": _variational(_ADAM, "KIND", 2, FLOAT32, 4, 3),
    "variational_step_bf16": _variational(_ADAM, "KIND", 2, BF16_OF_FLOAT32, 7, 7),
}

_TYPES = {
    "table": "*i64", "layouts": "*i64", "chunks": "*i32", "scratch": "*i32", "out": "*fp32",
    "lr_tensor": "*fp32", "temperature_tensor": "*fp32", "grad_scale": "*fp32", "found_inf": "*fp32",
}  # fmt: skip
_OPTIONAL = ("lr_tensor", "temperature_tensor", "grad_scale", "found_inf")


class Code:
    """Machine code in numbers. local: bytes of stack and local memory a thread; shared: bytes a program.

    loads_128, stores_128: 16 bytes of global memory each, to registers or to shared memory. tensor: instructions for
    tensor cores (HMMA up to Ampere, HGMMA on Hopper, UTC*MMA on Blackwell). What is counted in instructions is read
    when it is asked for, with all other kernels of the architecture that are compiled by then.
    """

    def __init__(self, binary: Any) -> None:
        self.ptx: str = binary.asm["ptx"]
        self.llvm: str = binary.asm["llir"]
        self.shared: int = binary.metadata.shared
        self.fuses: bool = binary.metadata.enable_fp_fusion
        self.architecture: int = binary.metadata.target.arch
        self.cubin: bytes = binary.asm["cubin"]
        usage = _run(self.cubin, "cuobjdump", "--dump-resource-usage")
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert numbers is not None, usage
        self.registers, stack, local = (int(n) for n in numbers.groups())
        self.local = stack + local
        self._sass: str | None = None
        _UNREAD.append(self)

    @property
    def sass(self) -> str:
        if self._sass is None:
            alike = [code for code in _UNREAD if code.architecture == self.architecture]
            _UNREAD[:] = [code for code in _UNREAD if code.architecture != self.architecture]
            for code, sass in zip(alike, _disassemble(alike, self.architecture), strict=True):
                code._sass = sass
        assert self._sass is not None
        return self._sass

    @property
    def spills(self) -> int:
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass))

    @property
    def loads_128(self) -> int:
        return len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*\b128\b", self.sass))

    @property
    def stores_128(self) -> int:
        return len(re.findall(r"\bSTG\.[\w.]*\b128\b", self.sass))

    @property
    def tensor(self) -> int:
        return len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", self.sass))

    @property
    def atomics(self) -> list[str]:
        return re.findall(r"\b(?:RED|REDG|ATOM|ATOMG)\.[\w.]+", self.sass)


_UNREAD: list[Code] = []


@functools.cache
def compiled(name: str, capability: int) -> Code:
    """The specialisation `name` for compute capability `capability` (90: sm_90)."""
    spec = SPECS[name]
    constants = {key: value for key, value in spec.constants.items() if key not in ("num_warps", "maxnreg")}
    constants |= {key: None for key in _OPTIONAL if key in spec.kernel.arg_names and key not in spec.tensors}
    types = {p.name: p.annotation_type or _TYPES.get(p.name) for p in spec.kernel.params}
    return machine_code(
        spec.kernel, types, constants, capability, spec.constants["num_warps"], spec.constants.get("maxnreg")
    )


def machine_code(
    kernel: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    capability: int,
    warps: int,
    registers_at_most: int | None,
) -> Code:
    """The kernel compiled with what is not in `constants` of these types."""
    signature = {name: "constexpr" if name in constants else of for name, of in types.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "maxnreg": registers_at_most, **EXACT}
    return Code(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))


def _run(content: bytes, tool: str, *options: str) -> str:
    """What a tool of the Triton wheel says of a file."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ.get('PATH', '')}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [tools / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def _instructions(cubin: bytes) -> bytes:
    """The sections ``.text.*`` of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = headers[of_names][4]
    parts = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", names + name)
    ]
    assert parts
    return b"".join(parts)


def _disassemble(codes: Sequence[Code], architecture: int) -> list[str]:
    """SASS of each, by one process, which takes 0.3 s to begin."""
    binaries = [_instructions(code.cubin) for code in codes]
    name = f"SM{architecture}{'a' if architecture >= 90 else ''}"
    printed = _run(b"".join(binaries), "nvdisasm", "--binary", name)
    ends = list(itertools.accumulate(map(len, binaries)))
    lines: list[list[str]] = [[] for _ in codes]
    for line in printed.splitlines():
        if found := re.match(r"\s*/\*([0-9a-f]+)\*/", line):
            lines[bisect.bisect_right(ends, int(found[1], 16))].append(line)
    # Each instruction has 16 bytes, of which none may go unread.
    assert [16 * len(each) for each in lines] == [len(binary) for binary in binaries]
    return ["\n".join(each) for each in lines]
