"""What concerns Triton's steps and draws alone: launches that are refused, and the machine code that they compile to.

That interpreted kernels give what all others give is in contract/test_optimizers.py and random/test_random.py.
"""

import re

import pytest
import torch

from tests.support.optimizer_rows import make_row
from tests.support.optimizers import BF16, F32, Case, Options

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.triton import machine_code as triton_aot  # noqa: E402

CAPABILITIES = (80, 90, 100)
ON_EVERY_ARCHITECTURE = (
    "cold",
    "momentum",
    "sgld",
    "normal",
)  # others differ from these as they do on one of them


def test_rows_of_several_dtypes_are_refused(interpret):
    rows = [make_row(Case((4,)), Options(), dtype) for dtype in (F32, BF16)]
    with pytest.raises(ValueError, match="rows of a table must all have dtypes 0x0"):
        interpret("step", "sgld_", rows, Options(), {}, False)


# Machine code.


SPECIALISED = [
    (name, capability)
    for name in triton_aot.SPECS
    for capability in CAPABILITIES
    if capability == 90 or name in ON_EVERY_ARCHITECTURE
]


@pytest.fixture(scope="module")
def all_compiled():
    """The first whose instructions are counted has all disassembled."""
    for name, capability in SPECIALISED:
        triton_aot.compiled(name, capability)


@pytest.mark.usefixtures("all_compiled")
@pytest.mark.parametrize(("name", "capability"), SPECIALISED)
def test_compiled_kernel_keeps_to_registers_and_whole_vectors(name, capability):
    spec, code = triton_aot.SPECS[name], triton_aot.compiled(name, capability)
    assert code.spills == 0 and code.local == 0
    assert code.registers <= spec.constants.get("maxnreg", 40)
    assert (code.loads_128, code.stores_128) == (spec.reads, spec.writes)
    # The slow path's reordering of a few words goes through shared memory; the fast path's must not, but where 16-bit
    # parameters have float32 states: eight elements of a thread are four of two.
    mixed = name.startswith("variational") and name.endswith("bf16")
    assert code.shared <= (4096 if mixed else 4 * 128)


@pytest.mark.parametrize("name", triton_aot.SPECS)
def test_compiled_kernel_rounds_as_written(name):
    code = triton_aot.compiled(name, 90)
    assert not code.fuses
    widths = re.findall(r"call [\w ]*?(?:<(\d+) x )?float>? @llvm\.fma", code.llvm)
    assert code.ptx.count("fma.rn.f32") == sum(int(width or 1) for width in widths) > 0
    if name == "normal":  # two counter blocks a thread, two pairs a block, and the fmas of csrc/core/normal.h
        assert code.ptx.count("fma.rn.f32") == 2 * 2 * 16
    assert "fma.rn.f64" not in code.ptx  # coefficients have none
    assert not re.search(r"\.(?:approx|full|ftz)\b", code.ptx)
    if name not in ("sgld", "variational_sum"):
        assert "sqrt.rn.f32" in code.ptx
    if name.startswith("variational"):
        assert ("div.rn.f32" in code.ptx) == (name != "variational_sum")
    elif "sgld" not in name and name != "normal":
        assert "div.rn.f32" in code.ptx and "sqrt.rn.f64" in code.ptx and "div.rn.f64" in code.ptx


def test_compiled_programs_have_all_read_before_the_last_one_writes():
    # One thread counts the program as done: not before all have read the step that the last program will advance.
    between = r"bar\.sync(?:(?!ld\.global|st\.global).)*?atom\.global\.gpu\.acq_rel"
    assert re.search(between, triton_aot.compiled("cold", 90).ptx, re.DOTALL)


def test_a_new_value_compiles_nothing():
    """Triton compiles anew for an integer that is 1 or a multiple of 16, and for such a pointer; here it must not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    def specialisations(kernel, *calls):
        bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        found = [bind(*call)[1] for call in calls]
        assert kernel.cache_key and not kernel.used_global_vals  # each would be compared at every launch
        assert all(one == found[0] for one in found), kernel.__name__
        return dict(zip(kernel.arg_names, found[0], strict=True))

    aligned, misaligned = (torch.zeros(17, dtype=torch.int64)[i:] for i in (0, 1))

    def step(pointer, count, h, temperature, seed):
        table = (pointer, count, pointer, pointer, count, pointer)
        floats = (h, None, temperature, None, 0.9, h, h, h, h)
        return (*table, *floats, seed, pointer, pointer, *(0,) * 7)

    types = specialisations(
        triton_aot.langevin_adam.langevin_adam_kernel,
        step(aligned, 1, 1e-3, 1.0, 1),
        step(misaligned, 16, 1.0, 1e-30, -(2**63)),
        step(aligned, 1000, 0.0, 1e300, 2**63 - 1),
    )
    # A Python float is float32 to Triton unless told otherwise.
    assert {types[name][0] for name in ("lr", "temperature", "beta1", "beta2", "eps", "weight_decay")} == {
        "fp64"
    }
    specialisations(
        triton_aot.random.fill_kernel,
        (aligned, 1, 1, 1, 1, 0, 0, 2, True, 1024),
        (misaligned, 16, -(2**63), 2**32 - 1, 16, 2**50, 65535, 2, True, 1024),
    )
