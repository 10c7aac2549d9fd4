"""The C++ kernels of Stein's method where their ways part: small problems, tiles in rounds, wide problems, sets."""

import subprocess
import sys

import pytest
import torch

import fekernels as fe
from tests.support.places import ISAS, instruction_set, threads
from tests.support.stein import (
    KERNELS,
    RADIAL,
    ROWS,
    Case,
    Problem,
    assert_close,
    direction_scale,
    exact_direction,
)

# The form for few particles with few coordinates; blocks of 64 particles: one; an odd and an even number of groups;
# groups of several blocks with a last one that is not full; the form for few particles with very many coordinates, in
# one segment and in several, of one block and of two.
SHAPES = [(40, 3), (64, 48), (64, 49), (200, 37), (500, 130), (2500, 9), (2624, 128), (40, 2048), (90, 3000)]


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


@pytest.mark.parametrize("n, d", SHAPES, ids=lambda size: str(size))
@pytest.mark.parametrize("name", RADIAL)
def test_instruction_sets_and_threads_give_the_same_bits(n, d, name):
    """Every result is a sum in an order that none of them changes. The plain set would take minutes on large shapes."""
    x, s = problem(n, d)
    g = torch.randn(n, d)

    def results() -> list[torch.Tensor]:
        leaves = [
            x.clone().requires_grad_(),
            s.clone().requires_grad_(),
            torch.tensor(1.7 * d, requires_grad=True),
        ]
        phi = fe.svgd_direction(*leaves[:2], kernel=KERNELS[name], bandwidth=leaves[2], temperature=0.7)
        found = [phi.detach(), *torch.autograd.grad(phi, leaves, g)]
        if ROWS[name].discrepancy:
            discrepancy = fe.kernel_stein_discrepancy(x, s, kernel=KERNELS[name], bandwidth=1.7 * d)
            found.append(discrepancy)
        return found

    with threads(1):
        want = results()
    for isa in ISAS if n * n * d < 1 << 22 else [isa for isa in ISAS if isa != "baseline"]:
        for count in (1, 2, 3):
            with instruction_set(isa), threads(count):
                got = results()
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b), (isa, count)


SMALL = (1, 2, 15, 16, 17, 33, 64)  # particles, up to where tiles take over, as they do after 48 coordinates
SMALL_DIMENSIONS = (1, 3, 4, 6, 16, 17, 48)


def small_cases(n: int, d: int) -> list[Case]:
    """Problems of their own bandwidths: ordinary, far below the spread and far from the origin, 0."""
    together = (n + 1) // 2
    return [
        Case(n, d, (5,)),
        Case(n, d, (5,), h=1e-3, offset=1e3, coincident=together),
        Case(n, d, (5,), h=0.0, coincident=together),
    ]


@pytest.mark.parametrize("n", SMALL)
@pytest.mark.parametrize("name", RADIAL)
def test_small_problems_are_right(n, name):
    for d in SMALL_DIMENSIONS:
        for case in small_cases(n, d):
            problem = case.make()
            got = problem.direction(name)
            assert_close(got, exact_direction(problem, name), direction_scale(problem, name), str(case))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")])
def test_small_problems_in_two_dtypes(dtypes):
    for n, d in ((16, 6), (33, 48)):
        problem = Case(n, d, (3,)).make()
        x, s = (t.to(getattr(torch, dtype)) for t, dtype in zip((problem.x, problem.s), dtypes, strict=True))
        problem = Problem(x, s, problem.h)
        got = problem.direction("imq")
        assert got.dtype == x.dtype
        assert_close(got, exact_direction(problem, "imq"), direction_scale(problem, "imq"))


@pytest.mark.parametrize("n", SMALL)
@pytest.mark.parametrize("name", RADIAL)
def test_a_small_problem_has_the_same_bits_in_any_batch_and_instruction_set(n, name):
    for d in SMALL_DIMENSIONS:
        for case in small_cases(n, d):
            problem = case.make()
            want = problem.direction(name)
            for i, alone in enumerate(zip(problem.x, problem.s, problem.h, strict=True)):
                assert torch.equal(Problem(*alone).direction(name), want[i]), case
            for isa in ISAS:
                with instruction_set(isa):
                    assert torch.equal(problem.direction(name), want), (isa, case)


def test_many_small_problems_are_shared_among_threads():
    """Enough of them that each thread gets some; to one thread they all go."""
    problem = Case(16, 6, (501,)).make()
    with threads(1):
        want = problem.direction("rbf")
    assert_close(want, exact_direction(problem, "rbf"), direction_scale(problem, "rbf"))
    for count in (2, 3):
        with threads(count):
            assert torch.equal(problem.direction("rbf"), want)


@pytest.mark.parametrize("n, d", [(2500, 9), (2624, 128), (8300, 5)])
def test_every_pair_meets_once(n, d):
    """In rounds of an odd and an even number of groups, of one block and of several.

    A pair left out or counted twice is an error of 1 / n, many times the bound.
    """
    x, s = problem(n, d)
    rows = torch.arange(0, n, 37)
    want, scale = rows_in_float64(x, s, 2.0 * d, rows)
    with threads(2):
        got = fe.svgd_direction(x, s, bandwidth=2.0 * d)
    assert ((got[rows] - want).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize(
    "n, d, offset",
    [(20_000, 2, 0.0), (20_000, 16, 1e4), (6_000, 784, 0.0), (6_000, 784, 1e4), (100, 100_000, 1e4)],
)
def test_large_sets_are_right_to_a_hundred_thousandth(n, d, offset):
    """float32 sums of so many terms keep their digits, since tiles are summed before they are added."""
    x, s = torch.randn(n, d) + offset, torch.randn(n, d)
    rows = torch.randint(n, (16,))
    want, _ = rows_in_float64(x, s, 2.0 * d, rows)
    with threads(2):
        got = fe.svgd_direction(x, s, bandwidth=2.0 * d)
    assert (got[rows] - want).norm() <= 1e-5 * want.norm()


MEMORY = """
import resource, torch
import fekernels as fe
torch.set_num_threads(1)
n, d = 20_000, 4
x, s = torch.randn(n, d), torch.randn(n, d)
fe.svgd_direction(x[:200], s[:200], bandwidth=1.0)
fe.kernel_stein_discrepancy(x[:200], s[:200], bandwidth=1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
leaves = x.requires_grad_(), s.requires_grad_()
phi = fe.svgd_direction(*leaves, bandwidth=1.0)
torch.autograd.grad(phi.sum(), leaves)
fe.kernel_stein_discrepancy(x.detach(), s.detach(), bandwidth=1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_as_the_particles_not_as_the_pairs():
    """A matrix of all pairs would be 1.6 GB. Particles, padded to 16 coordinates, are 1.3 MB, of which a backward has
    some thirty; huge pages round each up to 2 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(done.stdout) < 100 * 1024


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
