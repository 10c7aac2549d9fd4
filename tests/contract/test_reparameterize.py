"""The reparameterised sample's kernels and the scaling of gradients, every implementation of them."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from tests.support.free_energy_kernels import Kernels, cpp
from tests.support.implementations import GPU_IMPLEMENTATIONS
from tests.support.reparameterize import CASES, SHAPES, Case
from tests.support.tensors import bits_equal


@functools.cache
def judged(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    peer = cpp()
    return *case.exact(), case.run(peer) if peer else None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_case(shape: tuple[int, int], free_energy_kernel: Kernels, poisoned: None) -> None:
    """Within roundings of float32 and one to the dtype, and with the same bits everywhere."""
    for case in CASES:
        if case.shape != shape or (free_energy_kernel.interpreted and case.samples * math.prod(shape) > 5000):
            continue
        exact, scales, peer = judged(case)
        results = case.run(free_energy_kernel)
        for i, (got, wanted, scale) in enumerate(zip(results, exact, scales, strict=True)):
            got, dtype = got.cpu(), case.logvar if i == 2 else case.mean
            assert (got.dtype, got.shape) == (dtype, wanted.shape), (case, i)
            info = torch.finfo(dtype)
            limit = 2e-6 * scale + info.eps / 2 * wanted.abs() + info.smallest_normal * info.eps
            fits = wanted.abs() + limit < info.max
            assert ((got.double() - wanted).abs() <= limit)[fits].all(), (case, i)
            assert peer is None or not free_energy_kernel.exact or bits_equal(got, peer[i]), (case, i)


@pytest.mark.parametrize("factor", [1.0, 0.37, 0.0, torch.nan])
@pytest.mark.parametrize(
    "free_energy_kernel",
    # A CPU's gradients are scaled where they are computed.
    [
        "reference",
        "cuda_on_cpu",
        "triton_interpreted",
        *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_IMPLEMENTATIONS),
    ],
    indirect=True,
)
def test_scale(factor: float, free_energy_kernel: Kernels) -> None:
    sizes = (
        (15, torch.float32, 0),
        (0, torch.float32, 0),
        (4096, torch.bfloat16, 0),
        (297, torch.float16, 1),
    )
    sizes += ((9100, torch.bfloat16, 0), (41, torch.float32, 3))
    buffers, tensors = [], []
    for count, dtype, shift in sizes:
        buffers.append(torch.randn(count + 64).to(dtype).to(free_energy_kernel.device))
        tensors.append(buffers[-1][32 + shift : 32 + shift + count])
    tensors[0][5] = torch.inf
    wanted = [buffer.cpu().clone() for buffer in buffers]
    for (count, dtype, shift), buffer in zip(sizes, wanted, strict=True):
        part = buffer[32 + shift : 32 + shift + count]
        part.copy_((part.float() * factor).to(dtype))
    free_energy_kernel.scale_(tensors, torch.tensor(factor, device=free_energy_kernel.device))
    for buffer, right in zip(buffers, wanted, strict=True):
        assert torch.equal(buffer.cpu().nan_to_num(7.0), right.nan_to_num(7.0))
