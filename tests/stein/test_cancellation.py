"""Where folded sums cancel: clusters far apart (the regime "apart" of the table), and the kink of the Laplace kernel.

What pairs push each other by is a sum of differences there, and so are distances; folded, r_i x_i - sum_j w_ij x_j,
they were off by up to 5.5e-2 of the largest element, against which errors are measured here.
"""

import pytest
import torch

import fekernels as fe
from fekernels import stein
from fekernels._runtime import backends
from tests.support.stein import RADIAL, Case, Problem
from tests.support.stein_exact import exact_direction


def worst(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.cpu().double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("d", [1, 2, 3])
def test_laplace_of_ordinary_particles(d, backend):
    """Near pairs push by k / (r h): the sum of weights grows with the number of particles, and x_i times it cancels."""
    x = torch.randn(1500, d)
    problem = Problem(x, -x, stein.median_bandwidth(x))
    exact = exact_direction(problem, "laplace")
    assert worst(problem.to(backend.device).direction("laplace"), exact) < 2e-6


@pytest.mark.parametrize("d", [1, 2, 5, 8])
@pytest.mark.parametrize("n", [30, 201])
def test_median_of_clusters_far_apart(n, d, place):
    """Of the values as given: less a mean they are rounded to 1e-7 of the distance of the clusters."""
    x = Case(n, d, apart=1e3).make().x
    t = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    middle = t.flatten().sort().values[[(n * n - 1) // 2, n * n // 2]].mean()
    if obstacle := backends._obstacle(place.backend, place.device, "sq_dist_rank"):
        pytest.skip(obstacle)
    with fe.use_backend(place.backend):
        got = fe.pairwise_sq_dist_median(x.to(place.device)).cpu().double()
        least = torch.ops.fekernels.sq_dist_rank(x[None].to(place.device), [0], None).cpu().double()
    assert abs(got - middle) < 3e-7 * middle
    near = t[t > 0].min()
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
