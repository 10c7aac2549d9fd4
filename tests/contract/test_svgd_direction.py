"""The Stein direction and its gradients: every implementation against float64, and the bits that must agree."""

from itertools import cycle

import pytest
import torch

from tests.support.implementations import ISAS, instruction_set, threads
from tests.support.stein import (
    APART,
    BATCHES,
    DIRECTION_ROWS,
    DTYPE_ROWS,
    DTYPE_SIZES,
    GRADIENT_ROWS,
    HEAVY,
    INTERPRETED_DIRECTION,
    INTERPRETED_GRADIENT,
    NATIVE,
    NO_BANDWIDTH,
    ORDINARY,
    SIZES,
    TEMPERATURE,
    Case,
    Problem,
    Row,
    Size,
    constants,
)
from tests.support.stein_exact import (
    assert_close,
    direction_of,
    direction_scale,
    exact_direction,
    gradients_of,
)
from tests.support.stein_kernels import INTERPRETED, on_each
from tests.support.tensors import bits_equal


def each(rows, interpreted=None):
    return pytest.mark.parametrize(
        ("stein_kernels", "row"), on_each(rows, interpreted), indirect=["stein_kernels"]
    )


def direction(kernels, problem, name, precision=0):
    leaves = problem.to(kernels.device).leaves()
    return kernels.svgd_direction(*leaves, *constants(name), TEMPERATURE, precision)


def backward(kernels, upstream, problem, name, needs=7):
    operands = (upstream.to(kernels.device), *problem.to(kernels.device).leaves())
    return kernels.svgd_direction_backward(*operands, *constants(name), TEMPERATURE, 0, needs)


@each(DIRECTION_ROWS, INTERPRETED_DIRECTION)
def test_direction(stein_kernels, row, poisoned):
    problem, _, (exact,), (scale,) = direction_of(row)
    got = direction(stein_kernels, problem, row.kernel)
    assert got.dtype == torch.float32
    assert_close(got, exact, scale, str(row))


@each(DTYPE_ROWS, [row for row in DTYPE_ROWS if row.size in DTYPE_SIZES[:3]])
def test_dtypes(stein_kernels, row, poisoned):
    ordinary = Case.of(row.size).make()
    problem = Problem(ordinary.x.to(row.particles), ordinary.s.to(row.scores), ordinary.h)
    got = direction(stein_kernels, problem, row.kernel)
    assert got.dtype == row.particles
    exact, scale = exact_direction(problem, row.kernel), direction_scale(problem, row.kernel)
    # The interpreter truncates to bfloat16.
    roundings = 1.0 if stein_kernels.name == INTERPRETED else 0.5
    assert_close(got, exact, scale, str(row), roundings=roundings)


@each(GRADIENT_ROWS, INTERPRETED_GRADIENT)
def test_gradients(stein_kernels, row, poisoned):
    problem, upstream, exact, scales = gradients_of(row)
    found = backward(stein_kernels, upstream, problem, row.kernel)
    for what, got, wanted, scale in zip(
        ("particles", "scores", "bandwidth"), found, exact, scales, strict=True
    ):
        assert_close(got, wanted, scale, f"{row} {what}")
    if row.regime == NO_BANDWIDTH:
        assert not found[2].any()


TINY = [Row(size, ORDINARY, name) for size in (Size(1, 33, 3), Size(1, 20, 20)) for name in NATIVE]


@each(TINY, [TINY[0], TINY[-1]])
def test_a_bandwidth_without_an_inverse_is_none(stein_kernels, row):
    """One below the smallest normal number: particles of such distances, which would see each other, do not."""
    ordinary = row.case.make()
    problem = Problem(2e-19 * ordinary.x, ordinary.s, torch.full_like(ordinary.h, 5e-39))
    upstream = torch.randn_like(problem.x)
    none = problem.with_h(0.0)
    assert bits_equal(*(direction(stein_kernels, each, row.kernel) for each in (problem, none)))
    for got, wanted in zip(
        *(backward(stein_kernels, upstream, each, row.kernel) for each in (problem, none)), strict=True
    ):
        assert bits_equal(got, wanted)


NEEDS = [Row(size, ORDINARY, name) for size, name in zip(cycle(DTYPE_SIZES[:4]), NATIVE, strict=False)]


@each(NEEDS, NEEDS[1:2])
def test_only_the_gradients_that_are_needed(stein_kernels, row, poisoned):
    """Each has the dtype of its operand, and the bits that it has beside the others."""
    ordinary = row.case.make()
    problem = Problem(ordinary.x.bfloat16(), ordinary.s.half(), ordinary.h)
    upstream = torch.randn_like(problem.x)
    every = backward(stein_kernels, upstream, problem, row.kernel)
    for needs in (0, 1, 2, 4):
        found = backward(stein_kernels, upstream, problem, row.kernel, needs)
        for i, (got, operand) in enumerate(zip(found, problem.leaves(), strict=True)):
            assert got.dtype == operand.dtype
            assert bits_equal(got, every[i]) if needs >> i & 1 else got.shape == (0,)


IN_BATCHES = [Row(size, ORDINARY, name) for size in BATCHES for name in NATIVE]


@each(IN_BATCHES, [IN_BATCHES[-12], IN_BATCHES[-7]])  # 9 x 2 of rbf, 17 x 12 of imq
def test_a_problem_has_the_same_bits_in_any_batch(stein_kernels, row):
    problem = row.case.make()
    upstream = torch.randn_like(problem.x)
    together = [direction(stein_kernels, problem, row.kernel)]
    together += backward(stein_kernels, upstream, problem, row.kernel)
    last = slice(row.size.batch - 1, None)
    one = problem.map(lambda t: t[last])
    alone = [
        direction(stein_kernels, one, row.kernel),
        *backward(stein_kernels, upstream[last], one, row.kernel),
    ]
    for a, b in zip(alone, together, strict=True):
        assert bits_equal(a, b[last])


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("size", [*SIZES, *BATCHES, *HEAVY], ids=str)
def test_instruction_sets_and_threads_give_the_same_bits(size, name, native):
    """Every result is a sum in an order that none of them changes. The baseline takes long for large ones."""
    sets = ISAS if size.n * size.n * size.d < 1 << 22 else ISAS[:2]
    for regime in (ORDINARY, APART):
        problem = Row(size, regime, name).case.make()
        upstream = torch.randn_like(problem.x)
        operands = (*problem.leaves(), *constants(name), TEMPERATURE, 0)

        def results(operands=operands, upstream=upstream):
            return [native.svgd_direction(*operands), *native.svgd_direction_backward(upstream, *operands, 7)]

        wanted = results()
        for isa in sets:
            with instruction_set(isa), threads(1 + (isa != "baseline")):
                for got, want in zip(results(), wanted, strict=True):
                    assert bits_equal(got, want), (isa, regime)
