"""Stein directions, discrepancies and medians of random particles, against whole matrices in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import fekernels as fe
from tests.fuzz.budget import examples
from tests.fuzz.drawn_arguments import BACKENDS, on
from tests.support.stein import KERNELS, ROWS, Case, Problem
from tests.support.stein_exact import direction_scale, exact_direction, exact_discrepancy

FINITE = tuple(name for name, row in ROWS.items() if row.discrepancy)


@st.composite
def problems(draw: st.DrawFn, smallest: int = 1) -> Problem:
    batch = draw(st.sampled_from(((), (), (2,), (2, 3))))
    case = Case(
        n=draw(st.integers(smallest, 40)),
        d=draw(st.sampled_from((1, 2, 3, 5, 8, 9, 17))),
        batch=batch,
        h=10 ** draw(st.floats(-2, 1)),
        offset=draw(st.sampled_from((0.0, 0.0, 100.0))),
        layout=draw(st.sampled_from(("contiguous", "transposed", "sliced"))),
        coincident=draw(st.sampled_from((0, 0, 2))),
    )
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    return case.make(draw(st.sampled_from((torch.float32, torch.float64))))


def tolerance(tensor: Tensor) -> float:
    return 4e-6 if tensor.dtype == torch.float32 else 1e-12


@examples(0.12)
@given(problems(), st.sampled_from(tuple(KERNELS)), BACKENDS, st.sampled_from((0.0, 0.7, 1.0)))
def test_svgd_direction(problem, kernel, backend, temperature) -> None:
    got = on(backend, lambda: problem.direction(kernel, temperature=temperature))
    exact = exact_direction(problem, kernel, temperature)
    error = (got.double() - exact).abs().max()
    assert got.shape == problem.x.shape and got.dtype == problem.x.dtype
    bound = tolerance(got) * direction_scale(problem, kernel)
    assert error <= bound, f"{error:.2g} > {bound:.2g}"


@examples(0.05)
@given(problems(2), st.sampled_from(FINITE), BACKENDS, st.sampled_from(("u", "v")))
def test_kernel_stein_discrepancy(problem, kernel, backend, statistic) -> None:
    got = on(backend, lambda: problem.discrepancy(kernel, statistic=statistic))
    exact, scale = exact_discrepancy(problem, kernel, statistic)
    error = (got.double() - exact).abs()
    assert bool((error <= tolerance(problem.x) * scale).all()), (
        f"{error.max():.2g} for a scale of {scale.max():.2g}"
    )


@examples(0.08)
@given(
    st.integers(2, 40), st.sampled_from((1, 2, 5, 9)), st.sampled_from((0.0, 100.0)), BACKENDS, st.integers(0, 1 << 30),
    st.sampled_from(("liu_wang", "pairs", "blackjax", "numpyro")), st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
def test_median_bandwidth(n, d, offset, backend, seed, convention, dtype) -> None:
    x = (torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset).to(
        dtype
    )
    wide = x.double()
    squares = (wide.unsqueeze(0) - wide.unsqueeze(1)).square().sum(-1)
    i, j = torch.triu_indices(n, n, 1)
    below, whole = squares[i, j].sort().values, squares.flatten().sort().values

    def median(ordered: Tensor) -> Tensor:
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    exact = {
        "liu_wang": median(whole) / math.log(n + 1),
        "pairs": below[(len(below) - 1) // 2] / math.log(n + 1),
        "blackjax": median(below.sqrt()) ** 2 / math.log(n),
        "numpyro": median(whole.sqrt()) ** 2 / math.log(n),
    }[convention]
    assume(exact > 0)
    got = float(on(backend, lambda: fe.median_bandwidth(x, convention)))
    assert abs(got - exact) <= (2e-6 if dtype == torch.float32 else 1e-12) * exact
