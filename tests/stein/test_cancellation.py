"""Where folded sums cancel: clusters far apart, and the kink of the Laplace kernel.

What pairs push each other by is a sum of differences there, and so are distances; folded, r_i x_i - sum_j w_ij x_j,
they were off by up to 5.5e-2 of the largest element, against which errors are measured here.
"""

import pytest
import torch

import fekernels as fe
from fekernels import stein
from tests.support.places import instruction_set
from tests.support.stein import RADIAL, SMOOTH, Problem, exact_direction, exact_discrepancy
from tests.support.tensors import bits_equal


@pytest.fixture
def backend(place):
    with fe.use_backend(place.backend):
        yield place


def clusters(n: int, d: int, apart: float, h: float = 0.2) -> Problem:
    """Two of width 1, their particles taking turns, so that no tile holds one alone; pairs near each other matter."""
    base = torch.randn(n, d)
    way = torch.nn.functional.normalize(torch.randn(d), dim=0)
    side = (torch.arange(n) % 2 * 2 - 1.0)[:, None]
    return Problem(base + side * way * apart / 2, -base, torch.tensor(h * d))


def worst(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.cpu().double() - exact).abs().max() / exact.abs().max()).item()


# Few particles; tiles of few coordinates; narrow and wide rows; the n x n weights of very many coordinates.
SHAPES = [
    (40, 3),
    (200, 1),
    (200, 2),
    (131, 3),
    (200, 4),
    (200, 6),
    (200, 8),
    (131, 12),
    (100, 37),
    (70, 2100),
]


@pytest.mark.parametrize("name", RADIAL)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_clusters_far_apart(n, d, name, backend):
    for apart in (1e2, 1e5):
        problem = clusters(n, d, apart, 0.2 if d < 100 else 1.0)
        exact = exact_direction(problem, name)
        assert worst(problem.to(backend.device).direction(name), exact) < 2e-6, apart


@pytest.mark.parametrize("name", RADIAL)
@pytest.mark.parametrize(("n", "d"), [(130, 1), (130, 2), (100, 8), (100, 37)])
def test_gradients_of_clusters_far_apart(n, d, name, backend):
    problem = clusters(n, d, 1e4)
    upstream = torch.randn(n, d)
    wide = problem.double().requiring()
    exact = torch.autograd.grad(exact_direction(wide, name), wide.leaves(), upstream.double())
    leaves = problem.to(backend.device).requiring()
    got = torch.autograd.grad(leaves.direction(name), leaves.leaves(), upstream.to(backend.device))
    for what, one, other in zip(("particles", "scores", "bandwidth"), got, exact, strict=True):
        # dphi/dh is a sum of n^2 terms of either sign, and those of laplace in one dimension are far larger.
        assert worst(one, other) < (1e-4 if what == "bandwidth" else 2e-5 if name == "laplace" else 5e-6), (
            what
        )


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("n", "d"), [(130, 1), (130, 2), (100, 8), (100, 37)])
def test_discrepancy_of_clusters_far_apart(n, d, name, backend):
    """Scores that are large and alike: of (s - s').(x - x') the products are 1e9 times as large as the differences."""
    problem = clusters(n, d, 1e4)
    problem = Problem(problem.x, problem.s + 10.0, problem.h)
    exact, size = exact_discrepancy(problem, name)
    got = problem.to(backend.device).discrepancy(name).cpu().double()
    assert abs(got - exact) < 2e-6 * size


@pytest.mark.parametrize("d", [1, 2, 3])
def test_laplace_of_ordinary_particles(d, backend):
    """Near pairs push by k / (r h): the sum of weights grows with the number of particles, and x_i times it cancels."""
    x = torch.randn(1500, d)
    problem = Problem(x, -x, stein.median_bandwidth(x))
    exact = exact_direction(problem, "laplace")
    assert worst(problem.to(backend.device).direction("laplace"), exact) < 2e-6


@pytest.mark.parametrize("d", [1, 2, 5, 8])
@pytest.mark.parametrize("n", [30, 201])
def test_median_of_clusters_far_apart(n, d, backend):
    """Of the values as given: less a mean they are rounded to 1e-7 of the distance of the clusters."""
    x = clusters(n, d, 1e3).x
    t = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    middle = t.flatten().sort().values[[(n * n - 1) // 2, n * n // 2]].mean()
    got = fe.pairwise_sq_dist_median(x.to(backend.device)).cpu().double()
    assert abs(got - middle) < 3e-7 * middle
    near = t[t > 0].min()
    least = torch.ops.fekernels.sq_dist_rank(x[None].to(backend.device), [0], None).cpu().double()
    assert abs(least - near) < 5e-7 * near


@pytest.mark.parametrize("name", RADIAL)
@pytest.mark.parametrize("d", [1, 3, 8])
def test_float64(d, name):
    """A cluster 2^40 widths away changes nothing in one at the origin: to the last digits of float64 too."""
    base = torch.randn(60, d, dtype=torch.float64).mul(2**10).round() / 2**10
    far = torch.cat([base, base + 2.0**40])
    s, h = torch.randn(60, d, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    kernel = stein.IMQ(beta=-0.999, c=1e-3) if name == "imq" else name
    upstream = torch.randn(60, d, dtype=torch.float64)

    def both(x: torch.Tensor, repeat: int) -> list[torch.Tensor]:
        x, scores = x.clone().requires_grad_(), s.repeat(repeat, 1).requires_grad_()
        phi = fe.svgd_direction(x, scores, kernel=kernel, bandwidth=h) * repeat
        found = torch.autograd.grad(phi, (x, scores), upstream.repeat(repeat, 1), create_graph=repeat == 2)
        return [t[:60] for t in (phi, *found)]

    for got, exact in zip(both(far, 2), both(base, 1), strict=True):
        # imq's tails reach across: 1e-24 of the nearest.
        assert (got - exact).abs().max() < 1e-12 * exact.abs().max()


@pytest.mark.parametrize(("n", "d"), [(200, 1), (131, 3), (70, 8), (131, 12), (100, 37)])
def test_instruction_sets_agree(n, d, isa):
    for name in RADIAL:
        problem = clusters(n, d, 1e3)
        with fe.use_backend("cpp"):
            own = problem.direction(name)
            with instruction_set("baseline"):
                assert bits_equal(problem.direction(name), own), name
