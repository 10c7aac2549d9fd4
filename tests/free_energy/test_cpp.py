"""The free energy's C++ kernels alone: threads, large results, and whose memory a gradient is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fekernels as fe
from tests.support.free_energy import CATEGORICAL, NAMES, SUM, Call, Case, judge
from tests.support.free_energy_kernels import Kernels, cpp
from tests.support.implementations import ISAS, instruction_set, threads
from tests.support.tensors import bits_equal


@pytest.fixture
def kernels() -> Kernels:
    found = cpp()
    if found is None:
        pytest.skip("the C++ kernels cannot be compiled here")
    return found


def same_bits(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(bits_equal, ones, others))


@pytest.mark.parametrize("likelihood", range(len(NAMES)), ids=NAMES)
def test_threads_and_instruction_sets_agree(likelihood: int, kernels: Kernels) -> None:
    shape = (70, 300, 3) if likelihood == CATEGORICAL else (70, 5000, 3)
    hidden = {"masked": "some", "padded": "some", "weight": "dropped"}
    f32, bf16 = (torch.float32,) * 6, (torch.bfloat16,) * 6
    for kinds, dtypes in (("fff", f32), ("fcc", bf16), ("frs", f32)):
        call = Case(likelihood, shape, kinds, dtypes=dtypes, **hidden).call()
        wanted = call.run(kernels)
        with threads(2):
            assert same_bits(call.run(kernels), wanted)
            for isa in ISAS:
                with instruction_set(isa):
                    assert same_bits(call.run(kernels), wanted), isa


@pytest.mark.parametrize(
    "likelihood", [NAMES.index("mse1"), NAMES.index("bernoulli1")], ids=["mse", "bernoulli"]
)
def test_large_results(likelihood: int, kernels: Kernels) -> None:
    """Above 1 MB a gradient's memory is used again for the next one, above 16 MB it is written past the caches."""
    with threads(2):
        call = Case(likelihood, (1100, 4096, 2)).call()
        first, alive = call.run(kernels), call.run(kernels)
        assert first[3].data_ptr() != alive[3].data_ptr()
        kept = alive[3].clone()
        address = first[3].data_ptr()
        assert same_bits(first, alive)
        del first
        other = replace(call, params=[call.params[0] + 1])
        again = other.run(kernels)
        assert again[3].data_ptr() == address
        assert torch.equal(alive[3], kept)
        with instruction_set("baseline"):
            assert same_bits(other.run(kernels), again)
        assert not list(judge(again, other, other.exact(), other.scales()))


def test_memory_outlives_its_maker(kernels: Kernels) -> None:
    """A gradient stays whole when everything that it came from is gone, and while others come and go."""
    held = []
    for value in range(20):
        zero = torch.zeros(600, 1000)
        results = Call([torch.full_like(zero, float(value))], zero, None, [], None, [], 0, SUM).run(kernels)
        if value % 3 == 0:
            held.append((value, results[3]))
    assert all(torch.equal(gradient, torch.full_like(gradient, 2.0 * value)) for value, gradient in held)


def test_sums_over_rows_of_wide_samples(kernels: Kernels) -> None:
    """More segments than a block of rows goes through at once, and more than one block: the sums are those of the
    elements' gradients, in the order that csrc/cpu/free_energy/free_energy.h gives, whatever walks through memory there
    are."""
    rows, columns = 67, 17 * 4096 + 5
    prediction, target, scale = torch.randn(rows, columns), torch.randn(rows, columns), torch.randn(columns)

    def slope(scale: Tensor) -> Tensor:
        scale = scale.detach().requires_grad_()
        energy = fe.energy((prediction, scale), target, reduction="sum")
        return torch.autograd.grad(energy, scale)[0]

    with fe.use_backend("cpp"):
        elements = slope(scale.expand(rows, columns).contiguous())
        blocks = []
        for block in elements.split(64):
            total = block[0].clone()
            for row in block[1:]:
                total += row
            blocks.append(total.double())
        wanted = sum(blocks).float()
        for count in (1, 2):
            with threads(count):
                assert torch.equal(slope(scale), wanted)
        for isa in ISAS:
            with instruction_set(isa):
                assert torch.equal(slope(scale), wanted)
