"""The kernelised Stein discrepancy: every implementation against float64, over the table; the bits that must agree."""

from itertools import cycle

import pytest
import torch

from tests.support.implementations import ISAS, instruction_set, threads
from tests.support.stein import (
    BATCHES,
    DISCREPANCY_ROWS,
    INTERPRETED_DISCREPANCY,
    NATIVE_FINITE,
    ORDINARY,
    WEIGHTS,
    Problem,
    Row,
    Size,
    constants,
)
from tests.support.stein_exact import assert_close, discrepancies_of, weighted_sums
from tests.support.stein_kernels import on_each
from tests.support.tensors import bits_equal


def each(rows, interpreted=None):
    return pytest.mark.parametrize(
        ("stein_kernels", "row"), on_each(rows, interpreted), indirect=["stein_kernels"]
    )


def sums(kernels, problem, weights, name):
    operands = (*problem.to(kernels.device).leaves(), weights.to(kernels.device))
    return kernels.kernel_stein_discrepancy(*operands, *constants(name))


@each(DISCREPANCY_ROWS, INTERPRETED_DISCREPANCY)
def test_discrepancy(stein_kernels, row, poisoned):
    problem, weights, (exact,), (scale,) = discrepancies_of(row)
    got = sums(stein_kernels, problem, weights, row.kernel)
    assert got.dtype == torch.float64
    assert_close(got.float(), exact, scale, str(row))


WEIGHTED = [Row(Size(3, 33, d), ORDINARY, name) for d in (5, 20) for name in NATIVE_FINITE]


@each(WEIGHTED, WEIGHTED[1:2])
def test_one_set_of_weights_for_all_problems_or_one_for_each(stein_kernels, row, poisoned):
    problem = row.case.make()
    for columns in WEIGHTS[:2]:
        for of in (1, 3):
            weights = torch.randn(of, 33, columns)
            got = sums(stein_kernels, problem, weights, row.kernel)
            assert got.shape == (3, columns)
            assert_close(got.float(), *weighted_sums(problem, row.kernel, weights), f"{of} x {columns}")


DTYPE_ROWS = [
    Row(Size(2, 20, d), ORDINARY, name) for d, name in zip(cycle((9, 3)), NATIVE_FINITE, strict=False)
]


@each(DTYPE_ROWS, DTYPE_ROWS[:1])
def test_dtypes(stein_kernels, row):
    ordinary = row.case.make()
    weights = torch.randn(1, 20, 2)
    for particles, scores in (
        (torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16),
    ):  # fmt: skip
        problem = Problem(ordinary.x.to(particles), ordinary.s.to(scores), ordinary.h)
        got = sums(stein_kernels, problem, weights, row.kernel)
        assert_close(got.float(), *weighted_sums(problem, row.kernel, weights), f"{particles} {scores}")


IN_BATCHES = [Row(size, ORDINARY, name) for size in BATCHES for name in NATIVE_FINITE]


@each(IN_BATCHES, IN_BATCHES[-2:-1])
def test_a_problem_has_the_same_bits_in_any_batch(stein_kernels, row):
    problem, weights = row.case.make(), torch.randn(row.size.batch, row.size.n, 2)
    together = sums(stein_kernels, problem, weights, row.kernel)
    last = slice(row.size.batch - 1, None)
    alone = sums(stein_kernels, problem.map(lambda t: t[last]), weights[last], row.kernel)
    assert bits_equal(alone, together[last])


@pytest.mark.parametrize("name", NATIVE_FINITE)
@pytest.mark.parametrize("size", sorted({row.size for row in DISCREPANCY_ROWS}), ids=str)
def test_instruction_sets_and_threads_give_the_same_bits(size, name, native):
    problem, weights = Row(size, ORDINARY, name).case.make(), torch.randn(1, size.n, 3)
    operands = (*problem.leaves(), weights, *constants(name))
    wanted = native.kernel_stein_discrepancy(*operands)
    for isa in ISAS:
        with instruction_set(isa), threads(1 + (isa != "baseline")):
            assert bits_equal(native.kernel_stein_discrepancy(*operands), wanted), isa
