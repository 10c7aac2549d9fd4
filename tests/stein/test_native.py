"""The C++ kernels of Stein's method where their ways part: small problems, tiles in rounds, large sets."""

import pytest
import torch

import fekernels as fe
from tests.support.implementations import ISAS, instruction_set, threads
from tests.support.pairwise import pairwise
from tests.support.stein import LARGE, NO_BANDWIDTH, ORDINARY, RADIAL, Case, Problem, Regime, Size
from tests.support.stein_exact import assert_close, direction_scale, exact_direction


@pytest.fixture(autouse=True)
def compiled(native):
    """All of these are about the compiled library."""


def problem(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d) + 2.0, torch.randn(n, d)


def rows_in_float64(
    x: torch.Tensor, s: torch.Tensor, h: float, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """phi of some rows, rbf, and the sum of its terms' absolute values."""
    x, s = x.double(), s.double()
    out, scale = [], []
    for i in rows:
        apart = x[i] - x
        k = torch.exp(-(apart * apart).sum(-1, keepdim=True) / h)
        repulsion = (2 / h) * k * apart
        out.append((k * s + repulsion).mean(0))
        scale.append((k * s).abs().mean(0) + repulsion.abs().mean(0))
    return torch.stack(out), torch.stack(scale)


@pytest.mark.parametrize(("size", "name"), [(LARGE[0], "laplace"), (LARGE[1], "rbf")], ids=str)
def test_large_sets_have_the_same_bits_on_any_threads(size, name):
    """In rounds of an odd and an even number of groups. The baseline would take minutes."""
    problem = Case.of(size).make()
    wanted = problem.direction(name)
    for isa in ("avx512", "avx2"):
        for count in (2, 3):
            with instruction_set(isa), threads(count):
                assert torch.equal(problem.direction(name), wanted), (isa, count)


SMALL = (1, 2, 15, 16, 17, 33, 64)  # particles, up to where tiles take over, as they do after 48 coordinates
SMALL_DIMENSIONS = (1, 3, 4, 6, 16, 17, 48)
SHARP = Regime("sharp", h=1e-3, offset=1e3, coincident=0.5)
SMALL_ROWS = pairwise(n=SMALL, d=SMALL_DIMENSIONS, regime=(ORDINARY, SHARP, NO_BANDWIDTH), name=RADIAL)


@pytest.mark.parametrize(SMALL_ROWS[0]._fields, SMALL_ROWS)
def test_small_problems(n, d, regime, name):
    """Rows in the lanes of a vector: right, and the same bits in any batch and instruction set."""
    problem = Case.of(Size(5, n, d), regime).make()
    got = problem.direction(name)
    assert_close(got, exact_direction(problem, name), direction_scale(problem, name))
    for i, alone in enumerate(zip(problem.x, problem.s, problem.h, strict=True)):
        assert torch.equal(Problem(*alone).direction(name), got[i]), i
    for isa in ISAS:
        with instruction_set(isa):
            assert torch.equal(problem.direction(name), got), isa


def test_many_small_problems_are_shared_among_threads():
    """Enough of them that each thread gets some; to one thread they all go."""
    problem = Case(16, 6, (501,)).make()
    with threads(1):
        want = problem.direction("rbf")
    assert_close(want, exact_direction(problem, "rbf"), direction_scale(problem, "rbf"))
    for count in (2, 3):
        with threads(count):
            assert torch.equal(problem.direction("rbf"), want)


@pytest.mark.parametrize("size", LARGE[:3], ids=str)
def test_every_pair_meets_once(size):
    """In rounds of an odd and an even number of groups, of one block and of several.

    A pair left out or counted twice is an error of 1 / n, many times the bound.
    """
    _, n, d = size
    x, s = problem(n, d)
    rows = torch.arange(0, n, 37)
    want, scale = rows_in_float64(x, s, 2.0 * d, rows)
    with threads(2):
        got = fe.svgd_direction(x, s, bandwidth=2.0 * d)
    assert ((got[rows] - want).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize(
    ("size", "offset"), [(size, 1e4 * (i > 0)) for i, size in enumerate(LARGE[3:])], ids=str
)
def test_large_sets_are_right_to_a_hundred_thousandth(size, offset):
    """float32 sums of so many terms keep their digits, since tiles are summed before they are added."""
    _, n, d = size
    x, s = torch.randn(n, d) + offset, torch.randn(n, d)
    rows = torch.randint(n, (16,))
    want, _ = rows_in_float64(x, s, 2.0 * d, rows)
    with threads(2):
        got = fe.svgd_direction(x, s, bandwidth=2.0 * d)
    assert (got[rows] - want).norm() <= 1e-5 * want.norm()


def test_not_a_number_is_not_hidden():
    """No clamp and no select on the way takes a NaN for a number."""
    for n, d in ((5, 3), (70, 20), (20, 2048)):
        x, s = problem(n, d)
        for tensor in (x, s):
            kept = tensor[1, 0].item()
            tensor[1, 0] = torch.nan
            assert fe.svgd_direction(x, s, bandwidth=float(d)).isnan().any()
            tensor[1, 0] = kept
        with pytest.raises(ValueError, match="bandwidth must be >= 0; got nan"):
            fe.svgd_direction(x, s, bandwidth=torch.tensor(torch.nan))
