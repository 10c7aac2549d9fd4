"""The free energy's CUDA sources, run on the CPU: what contract/test_free_energy.py does not ask of all others.

The sums have one order on all devices, so results have the C++ kernels' bits, whatever the order of threads and blocks,
the alignment of what they write, and the values of the operands, infinities and NaN included.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fekernels._catalogue.free_energy import LIKELIHOODS
from tests.support.cuda_on_cpu import INVALID_VALUE, SUCCESS
from tests.support.cuda_on_cpu.free_energy import FreeEnergyKernels
from tests.support.free_energy import ELEMENTWISE, GROUPS, NONE, Call, Case, cases, to_the_bit
from tests.support.free_energy_kernels import Kernels, cpp
from tests.support.reparameterize import CASES
from tests.support.tensors import bits_equal


@pytest.fixture
def kernels(cuda_free_energy: ctypes.CDLL) -> Kernels:
    return FreeEnergyKernels(cuda_free_energy).kernels()


@pytest.fixture
def off_alignment(cuda_free_energy: ctypes.CDLL) -> Kernels:
    """What they write begins off a 16-byte address."""
    return FreeEnergyKernels(cuda_free_energy, misaligned=True).kernels()


@pytest.fixture
def backwards(cuda_free_energy: ctypes.CDLL) -> Iterator[None]:
    """Threads and blocks take their turns in descending order."""
    cuda_free_energy.cuda_on_cpu_backwards(ctypes.c_bool(True))
    yield
    cuda_free_energy.cuda_on_cpu_backwards(ctypes.c_bool(False))


def assert_bits_of_the_cpu(kernels: Kernels, call: Call) -> list[torch.Tensor]:
    peer = cpp()
    if peer is None:
        pytest.skip("no C++ kernels")
    results = call.run(kernels)
    assert not list(to_the_bit(kernels, call, results, call.run(peer))), call
    return results


@pytest.mark.parametrize("likelihood", GROUPS.values(), ids=GROUPS)
def test_backwards_and_off_alignment_the_bits_are_the_same(
    likelihood: int, off_alignment: Kernels, backwards: None
) -> None:
    for case in cases(likelihood, small=True):
        assert_bits_of_the_cpu(off_alignment, case.call())


@pytest.mark.parametrize("code", ELEMENTWISE, ids=[LIKELIHOODS[code].term for code in ELEMENTWISE])
def test_extreme_values(kernels: Kernels, code: int) -> None:
    """Every branch of the formulas; also infinities and NaN, which need not be sensible, only the same."""
    inf = float("inf")
    sizes = torch.tensor(
        [0.0, 1e-40, 1e-30, 1e-4, 0.4, 1.0, 2.5, 40.0, 800.0, 1e6, 1e15, 1e30, inf, float("nan")]
    )
    signed = torch.cat([sizes, -sizes])

    def draw() -> torch.Tensor:
        return signed[torch.randint(len(signed), (60, 128))]

    params = [draw() for _ in LIKELIHOODS[code].parameters]
    call = Call(params, draw(), None, [draw(), draw()], None, [], code, NONE, needs=0)
    assert_bits_of_the_cpu(kernels, call)
    ones = [torch.ones(60)] * 2
    call = replace(call, target=draw().abs(), latent=[draw() for _ in range(4)], upstream=ones, needs=-1)
    results = assert_bits_of_the_cpu(kernels, call)
    assert all(0.1 < r.isfinite().float().mean() for r in results[3:])


def test_a_weight_may_be_negative(kernels: Kernels) -> None:
    call = Case(2, (9, 384, 260), "fc", "ffcr", weight="random").call()
    assert_bits_of_the_cpu(kernels, replace(call, weight=-call.weight, beta=0.0))


def test_backwards_and_off_alignment_samples_are_the_same(off_alignment: Kernels, backwards: None) -> None:
    peer = cpp()
    for case in CASES if peer else ():
        assert all(map(bits_equal, case.run(off_alignment), case.run(peer))), case


def test_reparameterize_loops_over_its_blocks(kernels: Kernels) -> None:
    peer = cpp()
    if peer is None:
        pytest.skip("no C++ kernels")
    mean, logvar, key = torch.randn(4500, 500), torch.zeros(4500, 500), (5, 0, 1, 0)
    assert bits_equal(
        kernels.reparameterize(mean, logvar, *key, 1), peer.reparameterize(mean, logvar, *key, 1)
    )
    for mine, theirs in zip(
        kernels.reparameterize_backward(mean[None], logvar, *key),
        peer.reparameterize_backward(mean[None], logvar, *key),
        strict=True,
    ):
        assert bits_equal(mine, theirs)


def test_scaling_by_one_reads_and_writes_nothing(cuda_free_energy: ctypes.CDLL) -> None:
    class Elsewhere:
        dtype = torch.float32

        def data_ptr(self) -> int:
            return 64

        def numel(self) -> int:
            return 1000

    kernels = FreeEnergyKernels(cuda_free_energy)
    assert kernels.scaled([Elsewhere()], torch.tensor(1.0)) == SUCCESS  # type: ignore[list-item]
    assert kernels.scaled([Elsewhere()], torch.tensor(2.0)) != SUCCESS  # type: ignore[list-item]


def test_too_many_tensors_to_scale_are_refused_with_nothing_changed(cuda_free_energy: ctypes.CDLL) -> None:
    tensors = [torch.ones(3) for _ in range(9)]
    assert FreeEnergyKernels(cuda_free_energy).scaled(tensors, torch.tensor(2.0)) == INVALID_VALUE
    assert all((tensor == 1).all() for tensor in tensors)
