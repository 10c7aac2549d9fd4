"""Class indices come from data: one that is no class gives NaN and touches no memory; one may be left out by number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels._catalogue.free_energy import CATEGORICAL
from tests.support.free_energy import NONE, Call
from tests.support.free_energy_kernels import Kernels
from tests.support.implementations import Place
from tests.support.tensors import bits_equal

INT64 = torch.iinfo(torch.int64)
# What PyTorch ignores, what lies just outside, and what 32 bits or a product with the number of classes would wrap.
NO_CLASSES = (
    *range(-1, -130, -1), -1000, -4096, -(2**31), -(2**32), -(2**40), INT64.min, INT64.min + 1, INT64.max,
    INT64.max - 127, 2**31, 2**32, 2**32 + 1, 2**40, 2**61,
)  # fmt: skip


def exact(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and gradient of every position in float64, NaN where the target is no class."""
    classes = logits.shape[-1]
    known = (target >= 0) & (target < classes)
    in_float64 = logits.double()
    hit = torch.nn.functional.one_hot(torch.where(known, target, 0), classes)
    energy = in_float64.logsumexp(-1) - (in_float64 * hit).sum(-1)
    gradient = in_float64.softmax(-1) - hit
    return (
        torch.where(known, energy, torch.nan),
        torch.where(known.unsqueeze(-1), gradient, torch.nan),
    )


@pytest.mark.parametrize("classes", [1, 10, 129])
def test_an_index_that_is_no_class_makes_nan_and_touches_nothing_else(
    free_energy_kernel: Kernels, classes: int
) -> None:
    bad = torch.tensor([*NO_CLASSES, classes, classes + 1])
    if free_energy_kernel.interpreted:  # a fifth of a second a position
        bad = bad[[0, 99, -2, -4, -6, -7, -8, -10]]
    target = torch.stack((torch.randint(classes, bad.shape), bad, torch.randint(classes, bad.shape)), 1)
    logits = torch.randn(len(bad), 3, classes)
    rows = len(bad)
    # A row an index: its sum is NaN. Then every position's gradient by itself.
    call = Call([logits], target, None, [], None, [torch.ones(rows)] * 2, CATEGORICAL, NONE)
    results = [result.cpu() for result in call.run(free_energy_kernel)]
    _, gradient = exact(logits, target)
    assert results[1].isnan().all()
    torch.testing.assert_close(results[3].double(), gradient, rtol=2e-6, atol=2e-7, equal_nan=True)
    mask = torch.tensor([True, False, True]).expand(rows, 3).contiguous()
    results = [result.cpu() for result in replace(call, mask=mask).run(free_energy_kernel)]
    energy, gradient = (value.nan_to_num(0.0) for value in exact(logits, target))
    torch.testing.assert_close(results[1].double(), energy.sum(1), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(results[3].double(), gradient, rtol=2e-6, atol=2e-7)
    assert not results[3][~mask].any()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.uint8, 255), (torch.int8, -100), (torch.int8, -128), (torch.int16, -(2**15)),
        (torch.int32, -(2**31)), (torch.int32, 2**31 - 1), (torch.int64, INT64.min), (torch.int64, INT64.max),
        (torch.uint16, 65535), (torch.uint32, 2**32 - 1), (torch.uint64, 2**64 - 1), (torch.uint64, 2**63),
    ],
    ids=str,
)  # fmt: skip
def test_every_integer_dtype(backend: Place, dtype: torch.dtype, value: int) -> None:
    logits = torch.randn(6, 10, device=backend.device)
    target = torch.tensor([0, value, 9, 3, value, 5], dtype=dtype, device=backend.device)
    energy = fe.energy(logits, target, "categorical")
    wanted = torch.nn.functional.cross_entropy(
        logits, torch.tensor([0, 1, 9, 3, 1, 5], device=backend.device), reduction="none"
    )
    wanted[[1, 4]] = torch.nan
    torch.testing.assert_close(energy, wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignore_index_leaves_positions_out(backend: Place, reduction: str, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 4, 7, device=backend.device)
    target = torch.randint(7, (5, 4), device=backend.device)
    left_out = torch.rand(5, 4, device=backend.device) < 0.4
    left_out[2] = True
    mask = torch.rand(5, 4, device=backend.device) < 0.8
    logits[left_out] = torch.nan
    ignored = torch.where(left_out, -100, target).to(dtype)
    latent = torch.randn(2, 5, 3, device=backend.device)

    def call(given: Tensor, seen: Tensor | None, **keywords: int) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        terms = fe.free_energy(
            leaf,
            given,
            *latent,
            likelihood="categorical",
            mask=seen,
            reduction=reduction,
            validate=True,
            **keywords,
        )
        terms.free_energy.sum().backward()
        assert leaf.grad is not None
        energy = fe.energy(leaf, given, "categorical", seen, reduction, validate=True, **keywords)
        return [*(t.detach() for t in terms), energy.detach(), leaf.grad]

    for seen in (None, mask):
        both = ~left_out if seen is None else ~left_out & seen
        got, wanted = call(ignored, seen, ignore_index=-100), call(target, both)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert all(value.isfinite().all() for value in got)
        assert not got[-1][~both].any() and got[-1][both].any()
    nowhere = torch.full_like(target, 3)
    assert not fe.energy(logits, nowhere, "categorical", ignore_index=3).any()


def test_ignore_index_may_be_a_class_or_numpys_integer() -> None:
    logits, target = torch.randn(3, 4), torch.tensor([0, 3, 2])
    each = fe.energy(logits, target, "categorical")
    for number in (3, np.int64(3)):
        energy = fe.energy(logits, target, "categorical", ignore_index=number)
        torch.testing.assert_close(energy, each * torch.tensor([1, 0, 1]), rtol=0, atol=0)
    loss = fe.FreeEnergyLoss("categorical", ignore_index=3, reduction="none")
    assert torch.equal(loss(logits, target, torch.zeros(3, 1), torch.zeros(3, 1)).energy, energy)
    assert "ignore_index=3" in repr(loss)


def test_ignore_index_is_checked() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="free_energy: ignore_index .* 'categorical'; got likelihood 'mse'"):
        fe.free_energy(x, x, x, x, likelihood="mse", ignore_index=0)
    with pytest.raises(ValueError, match="energy: ignore_index .*; got likelihood 'gaussian'"):
        fe.energy(x, x, ignore_index=-100)
    for wrong in (1.0, "0", True):
        with pytest.raises(TypeError, match="energy: ignore_index must be an int; got"):
            fe.energy(x, torch.zeros(3).long(), "categorical", ignore_index=wrong)
    with pytest.raises(ValueError, match=r"energy: target must hold classes in \[0, 4\)"):
        fe.energy(x, torch.tensor([-100, 1, -1]), "categorical", ignore_index=-100, validate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 10, 16, 17, 47, 48, 49, 128, 129])
def test_positions_side_by_side_are_each_alone(backend: Place, classes: int, dtype: torch.dtype) -> None:
    """Few classes are summed with one position in each lane, many with one class in each: the bits do not tell."""
    logits = (4 * torch.randn(37, 1, classes)).to(dtype)
    logits[5, 0, 0], logits[6, 0, -1], logits[7] = torch.inf, torch.nan, -torch.inf
    target = torch.randint(classes, (37, 1))
    target[9] = classes
    mask, weight = torch.rand(37, 1) < 0.7, torch.randint(3, (37,)).float()

    def of(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = logits[rows].to(backend.device).requires_grad_()
        latent = torch.zeros(len(leaf), 1, device=backend.device)
        given = [each[rows].to(backend.device) for each in (target, mask, weight)]
        terms = fe.free_energy(
            leaf, given[0], latent, latent, likelihood="categorical", mask=given[1], weight=given[2],
            reduction="none",
        )  # fmt: skip
        terms.energy.sum().backward()
        assert leaf.grad is not None
        return terms.energy.detach(), leaf.grad

    together = of(slice(None))
    alone = zip(*(of(slice(row, row + 1)) for row in range(37)), strict=True)
    for whole, parts in zip(together, alone, strict=True):
        assert bits_equal(whole.nan_to_num(nan=7e4), torch.cat(parts).nan_to_num(nan=7e4))
