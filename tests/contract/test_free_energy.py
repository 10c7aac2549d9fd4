"""The free energy's kernels, every implementation of them: values to float64, promised bits, the memory they touch."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.free_energy import (
    DTYPES,
    GROUPS,
    NAMES,
    NONE,
    REDUCTIONS,
    SUM,
    Call,
    Case,
    cases,
    judge,
    to_the_bit,
)
from tests.support.free_energy_kernels import Kernels, cpp

GAUSSIAN, BERNOULLI = NAMES.index("gaussian2"), NAMES.index("bernoulli1")


@functools.cache
def judged(case: Case) -> tuple[Call, list[Tensor], list[Tensor], list[Tensor] | None]:
    """A case's call, what is right, the scale of its errors, and the C++ kernels' results where there are such."""
    call = case.call()
    peer = cpp()
    return call, call.exact(), call.scales(), call.run(peer) if peer else None


@pytest.mark.parametrize("likelihood", GROUPS.values(), ids=GROUPS)
def test_every_case(likelihood: int, free_energy_kernel: Kernels, poisoned: None) -> None:
    wrong = []
    for case in cases(likelihood, small=free_energy_kernel.interpreted):
        call, exact, scales, peer = judged(case)
        results = call.run(free_energy_kernel)
        wrong += [f"{case}: {what}" for what in judge(results, call, exact, scales)]
        if peer is not None:
            for i in to_the_bit(free_energy_kernel, call, results, peer):
                wrong.append(f"{case}: result {i} has other bits than in C++")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_nothing(reduction: int, free_energy_kernel: Kernels, poisoned: None) -> None:
    """Its mean is NaN, its sum 0, and gradients of what all rows share are 0 or NaN with it."""
    call = Case(GAUSSIAN, (0, 5, 3), "fc", "ffcs", reduction=reduction).call()
    values = [value.cpu() for value in call.run(free_energy_kernel)[:3]]
    if reduction == NONE:
        assert all(value.shape == (0,) for value in values)
    else:
        assert all(value.item() == 0 if reduction == SUM else value.isnan() for value in values)


@pytest.mark.parametrize("likelihood", range(len(NAMES)), ids=NAMES)
def test_a_row_does_not_depend_on_its_batch(likelihood: int, free_energy_kernel: Kernels) -> None:
    hidden = {"masked": "some", "padded": "some", "weight": "dropped"}
    rows, columns, latents = (7, 40, 21) if free_energy_kernel.interpreted else (70, 513, 21)
    call = Case(likelihood, (rows, columns, latents), reduction=NONE, upstream=True, **hidden).call()
    whole = call.run(free_energy_kernel)
    for begin, end in ((0, 1), (rows // 5, rows // 2), (rows - 1, rows)):
        part = call.rows(begin, end).run(free_energy_kernel)
        assert same_bits(part, [result[begin:end] for result in whole])


def test_only_what_is_needed(free_energy_kernel: Kernels) -> None:
    for latent in ("ff", "ffcs"):
        call = Case(GAUSSIAN, (6, 40, 7), "fc", latent, weight="random").call()
        count = len(call.operands)
        everything = call.run(free_energy_kernel)
        subsets = range((1 << count) - 1)
        if free_energy_kernel.interpreted:  # one, and all but one
            subsets = [
                0,
                *(1 << i for i in range(count)),
                *((1 << count) - 1 - (1 << i) for i in range(0, count, 2)),
            ]
        for needs in subsets:
            some = replace(call, needs=needs).run(free_energy_kernel)
            wanted = everything[:3] + [g for i, g in enumerate(everything[3:]) if needs >> i & 1]
            assert same_bits(some, wanted), needs


@pytest.mark.parametrize("likelihood", range(len(NAMES)), ids=NAMES)
def test_inplace_is_the_same_in_other_memory(likelihood: int, free_energy_kernel: Kernels) -> None:
    few = free_energy_kernel.interpreted
    for dtype in DTYPES[:1] if few else DTYPES[:2]:
        for columns in (24,) if few else (24, 131):
            call = Case(likelihood, (5, columns, 3), dtypes=(dtype,) * 6, masked="some").call()
            wanted = call.run(free_energy_kernel)
            there = replace(call, inplace=True).to(free_energy_kernel.device)
            got = there.run(free_energy_kernel)
            assert same_bits(got, wanted)
            assert got[3].data_ptr() == there.params[0].data_ptr()


def test_energy_or_kl_alone(free_energy_kernel: Kernels) -> None:
    both = Case(BERNOULLI, (5, 130, 7), latent="ffcs").call()
    energy, kl = replace(both, latent=[]), replace(both, params=[], target=None)
    wanted, of_energy, of_kl = (call.run(free_energy_kernel) for call in (both, energy, kl))
    assert same_bits([of_energy[1], of_energy[3]], [wanted[1], wanted[3]])
    assert same_bits([of_kl[2], *of_kl[3:]], [wanted[2], *wanted[4:]])
    assert of_energy[2].item() == 0.0 and of_kl[1].item() == 0.0


def test_sums_are_right_to_the_last_digits(free_energy_kernel: Kernels) -> None:
    """Sums of 100,000 terms, where float32 alone would lose three digits."""
    call = Case(0, (1, 100_003, 1), latent="", reduction=NONE, needs=0).call()
    got, exact = call.run(free_energy_kernel)[1].cpu(), call.exact()[1]
    torch.testing.assert_close(got.double(), exact, rtol=1e-7, atol=0)


def same_bits(ones: list[Tensor], others: list[Tensor]) -> bool:
    """All NaNs are one."""
    return len(ones) == len(others) and all(
        (a.dtype, a.shape) == (b.dtype, b.shape)
        and torch.equal(a.cpu().nan_to_num(7.0), b.cpu().nan_to_num(7.0))
        for a, b in zip(ones, others, strict=True)
    )
