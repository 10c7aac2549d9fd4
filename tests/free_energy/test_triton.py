"""The machine code of the free energy's and the reparameterisation's Triton kernels, compiled ahead without a GPU.

Their results, interpreted, are in contract/test_free_energy.py and contract/test_reparameterize.py.
"""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.triton import free_energy_machine_code as aot  # noqa: E402

CAPABILITIES = (80, 90, 100)


TERMS = [
    (name, capability)
    for name in aot.PARAMS
    for capability in CAPABILITIES
    if capability == 90 or name in ("mse", "bernoulli", "normal_kl", "zero_inflated_negative_binomial")
]
OTHERS = ("finalize", "categorical", "scale", "reparameterize", "reparameterize_backward")


@pytest.fixture(scope="module")
def all_compiled() -> None:
    """The first whose instructions are counted has all disassembled."""
    for name, capability in TERMS:
        aot.term(name, capability)
    for name in OTHERS:
        aot.other(name, 90)


@pytest.mark.usefixtures("all_compiled")
@pytest.mark.parametrize(
    ("name", "capability"), TERMS, ids=lambda value: value if isinstance(value, str) else f"sm_{value}"
)
def test_compiled_term_keeps_to_registers_and_whole_vectors(name, capability):
    code = aot.term(name, capability)
    assert code.spills == 0 and code.local == 0
    # Reductions over the warps' totals alone go through shared memory.
    assert code.shared <= 32
    operands, gradients = aot.PARAMS[name] + ("kl" not in name), aot.PARAMS[name]
    vectors = aot.free_energy.TILE[name] // (4 * 32 * aot.free_energy.WARPS)
    assert (code.loads_128, code.stores_128) == (operands * vectors, gradients * vectors)
    assert not code.fuses and not re.search(r"\.(?:approx|full|ftz)\b", code.ptx)


@pytest.mark.usefixtures("all_compiled")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("capability", [90])
def test_other_compiled_kernels_keep_to_registers(name, capability):
    code = aot.other(name, capability)
    assert code.spills == 0 and code.local == 0
    assert (code.loads_128, code.stores_128) == {
        "finalize": (0, 0), "categorical": (2, 2), "scale": (2, 2), "reparameterize": (2, 1),
        "reparameterize_backward": (2, 2),
    }[name]  # fmt: skip


def test_compiled_variants_keep_to_registers():
    variants = (
        ("mse", dict(dtype="*bf16"), (2, 1)),
        ("bernoulli", dict(dtype="*bf16"), (2, 1)),
        ("normal_kl", dict(columns=32), (2, 2)),
        ("negative_binomial", dict(shapes=(0, 1, 0, 0)), (2, 1)),
    )
    codes = [aot.term(name, 90, **options) for name, options, _ in variants]
    for code, (name, _, vectors) in zip(codes, variants, strict=True):
        assert code.spills == 0 and code.local == 0, name
        assert (code.loads_128, code.stores_128) == vectors, name
