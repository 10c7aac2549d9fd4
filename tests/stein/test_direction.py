"""The public Stein direction: layouts, dtypes, what radial kernels have in common, limits, fixed points."""

import itertools
import math

import pytest
import torch

import fekernels as fe
from fekernels import stein
from fekernels._catalogue.stein import PRECISION_NAMES
from tests.support.stein import EMPTY, KERNELS, LAYOUTS, RADIAL, ROWS, SMOOTH, TEMPERATURE, Case, Problem
from tests.support.stein_exact import assert_close, at_zero, direction_scale, exact_direction, gaussian_scores
from tests.support.tensors import bits_equal

NAMES = pytest.mark.parametrize("name", KERNELS)
RADIALS = pytest.mark.parametrize("name", RADIAL)


@pytest.mark.parametrize("case", [*LAYOUTS, Case(200, 64, offset=1e4), Case(130, 3, h=1e-3)], ids=str)
@NAMES
def test_is_the_formula(name, case, backend):
    problem = case.make()
    got = problem.to(backend.device).direction(name)
    assert got.dtype == torch.float32
    assert_close(got, exact_direction(problem, name), direction_scale(problem, name), f"{case} {name}")


@NAMES
@pytest.mark.parametrize(
    ("particles", "scores"),
    [
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(particles, scores, name, backend):
    problem = Case(37, 9, (2,)).make()
    problem = Problem(problem.x.to(particles), problem.s.to(scores), problem.h)
    got = problem.to(backend.device).direction(name)
    assert got.dtype == particles
    assert_close(got, exact_direction(problem, name), direction_scale(problem, name), name)


@NAMES
def test_empty(name, backend):
    for case in EMPTY:
        problem = case.make().to(backend.device)
        for bandwidth in (problem.h, "median", 1.0):
            got = problem.direction(name, bandwidth=bandwidth)
            assert got.shape == problem.x.shape and not got.isnan().any()


@RADIALS
@pytest.mark.parametrize("d", [3, 40])
def test_tight_clusters(d, name, backend):
    """A bandwidth far below the spread: repulsion as a difference of sums over all particles cancels."""
    for width, by in (
        (0.1, backend.backend),
        (1e-4, "reference"),
    ):  # float32 holds a distance to 1e-7 of the spread
        x = torch.randn(4, d)[torch.randint(0, 4, (150,))] + width * torch.randn(150, d)
        problem = Problem(x, torch.randn(150, d), torch.tensor(2 * d * width**2))
        with fe.use_backend(by):
            got = problem.to(backend.device).direction(name)
        assert_close(got, exact_direction(problem, name), direction_scale(problem, name), f"{width}")


# What every radial kernel has in common.


@RADIALS
@pytest.mark.parametrize("case", [Case(40, 3), Case(70, 33)], ids=str)
def test_translation_rotation_permutation(case, name, backend):
    problem = case.make(torch.float64).to(backend.device).map(torch.Tensor.float)
    phi, scale = problem.direction(name), direction_scale(problem.map(torch.Tensor.cpu), name)
    moved = Problem(problem.x + 3.0, problem.s, problem.h)
    assert_close(moved.direction(name), phi.cpu().double(), scale, "translation", 3e-5)
    rotation = torch.linalg.qr(torch.randn(case.d, case.d))[0].to(backend.device)
    turned = Problem(problem.x @ rotation, problem.s @ rotation, problem.h)
    assert_close(turned.direction(name), (phi @ rotation).cpu().double(), scale * 3, "rotation")
    order = torch.randperm(case.n, device=backend.device)
    mixed = Problem(problem.x[order], problem.s[order], problem.h)
    assert_close(mixed.direction(name), phi[order].cpu().double(), scale, "permutation")


@RADIALS
def test_repulsion_alone_moves_no_centre(name, backend):
    problem = Case(150, 7).make().to(backend.device)
    phi = Problem(problem.x, torch.zeros_like(problem.s), problem.h).direction(name)
    assert phi.abs().max() > 1e-3
    assert phi.double().sum(0).abs().max() < 1e-6 * phi.double().abs().sum(0).max()


@RADIALS
@pytest.mark.parametrize("h", [1e12, math.inf])
def test_a_wide_kernel_averages_the_scores(h, name, backend):
    problem = Case(65, 5).make().to(backend.device)
    phi = problem.direction(name, bandwidth=h)
    wanted = at_zero(name) * problem.s.mean(0).expand_as(phi)
    assert torch.allclose(phi, wanted, atol=1e-5 if name in SMOOTH else 1e-4)


@RADIALS
@pytest.mark.parametrize("h", [1e-12, 1e-30, 0.0])
def test_a_narrow_kernel_leaves_each_alone(h, name, backend):
    problem = Case(65, 5).make().to(backend.device)
    phi = problem.direction(name, bandwidth=h, temperature=0.0)
    # The tail of imq is a power of u.
    bound = 1e-6 if name != "imq" or h == 0 else 2 * (1 / h) ** -0.3
    assert torch.allclose(phi, at_zero(name) * problem.s / 65, atol=bound, rtol=1e-6)


@RADIALS
def test_one_particle_follows_its_score(name, backend):
    problem = Case(1, 6, (3,)).make().to(backend.device)
    for bandwidth in ("median", 0.5, 0.0):
        assert torch.allclose(
            problem.direction(name, bandwidth=bandwidth), at_zero(name) * problem.s, rtol=1e-6
        )


@RADIALS
@pytest.mark.parametrize("d", [2, 40])
def test_coincident_particles_do_not_repel(d, name, backend):
    x, s = (
        torch.randn(1, d).expand(9, d).contiguous().to(backend.device),
        torch.randn(9, d).to(backend.device),
    )
    for bandwidth in (0.0, 1e-9, 1.0, "median"):
        phi = stein.svgd_direction(x, s, kernel=KERNELS[name], bandwidth=bandwidth)
        assert torch.allclose(phi, at_zero(name) * s.mean(0).expand_as(phi), atol=1e-6), bandwidth


@RADIALS
def test_bandwidth_is_heeded(name, backend):
    problem = Case(20, 3, (2,)).make().to(backend.device)
    narrow, wide = (problem.direction(name, bandwidth=h) for h in (1.0, 5.0))
    assert (narrow - wide).abs().max() > 1e-2
    each = problem.direction(name, bandwidth=torch.tensor([1.0, 5.0], device=backend.device))
    assert torch.equal(each[0], narrow[0]) and torch.equal(each[1], wide[1])
    for shape in ((), (1,), (2,)):
        same = problem.direction(name, bandwidth=torch.full(shape, 5.0, device=backend.device))
        assert torch.equal(same, wide)


@NAMES
def test_median_is_the_median(name, backend):
    problem = Case(21, 3, (2, 2)).make().to(backend.device)
    h = stein.median_bandwidth(problem.x)
    assert h.shape == (2, 2)
    assert torch.equal(problem.direction(name, bandwidth="median"), problem.direction(name, bandwidth=h))
    assert torch.equal(
        stein.svgd_direction(problem.x, problem.s),
        problem.direction("rbf", bandwidth="median", temperature=1.0),
    )


@NAMES
def test_temperature_is_the_factor_of_the_repulsion(name, backend):
    problem = Case(20, 3).make().to(backend.device)
    cold, warm, hot = (problem.direction(name, temperature=t) for t in (0.0, 1.0, 2.5))
    assert torch.allclose(cold + 2.5 * (warm - cold), hot, atol=1e-6)
    still = Problem(problem.x, torch.zeros_like(problem.s), problem.h)
    assert torch.equal(still.direction(name, temperature=0.0), torch.zeros_like(problem.x))


def test_kernels_by_name_and_by_class():
    problem = Case(20, 3).make()
    assert stein.IMQ() == fe.stein.kernels.IMQ(beta=-0.5, c=1.0)
    results = []
    for name, instance in ((name, row()) for name, row in ROWS.items()):
        one, other = (
            stein.svgd_direction(problem.x, problem.s, kernel=k, bandwidth=2.0) for k in (name, instance)
        )
        assert torch.equal(one, other), name
        results.append(one)
    assert all((a - b).abs().max() > 1e-2 for a, b in itertools.combinations(results, 2))


def test_precision_is_free_on_a_cpu():
    problem = Case(65, 20).make()
    exact = problem.direction("rbf")
    for precision in PRECISION_NAMES:
        assert bits_equal(problem.direction("rbf", precision=precision), exact)


@NAMES
def test_autocast_leaves_float32(name, backend):
    problem = Case(65, 20).make().to(backend.device)
    plain = problem.direction(name)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert bits_equal(problem.direction(name), plain)


# What it leads to.


def test_two_particles_rest_where_the_algebra_says(backend):
    """Target N(0, 1), fixed h: at +-a with a^2 = (h/4) log(1 + 4/h)."""
    for h in (0.3, 1.0, 7.0):
        a = math.sqrt(h / 4 * math.log1p(4 / h))
        x = torch.tensor([[-a], [a]], device=backend.device)
        assert stein.svgd_direction(x, -x, bandwidth=h).abs().max() < 1e-6
        for factor, way in ((0.8, 1), (1.25, -1)):
            moved = stein.svgd_direction(factor * x, -factor * x, bandwidth=h)
            assert (moved * x.sign() * way > 1e-3).all()


def test_annealed_pair_rests_farther_out(backend):
    """With temperature T: a^2 = (h/4) log(1 + 4T/h)... from phi = 0: -a + a k + T (4a/h) k = 0, k = exp(-4a^2/h)."""
    h, temperature = 1.0, 2.0
    a = math.sqrt(h / 4 * math.log1p(4 * temperature / h))
    x = torch.tensor([[-a], [a]], device=backend.device)
    assert stein.svgd_direction(x, -x, bandwidth=h, temperature=temperature).abs().max() < 1e-6


def test_linear_kernel_rests_at_the_exact_moments(backend):
    """For a Gaussian target, phi = 0 exactly where mean and (1/n) covariance are the target's (Liu & Wang 2018)."""
    torch.manual_seed(2)
    d, n = 3, 11
    mean = torch.randn(d, dtype=torch.float64)
    root = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, dtype=torch.float64)
    covariance = root @ root.mT
    x = torch.randn(n, d, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.mT @ x / n)).mT @ torch.linalg.cholesky(covariance).mT
    x = (x + mean).to(backend.device)

    def phi(x, dtype=torch.float64):
        scores = gaussian_scores(x, mean.to(x), covariance.to(x))
        return stein.svgd_direction(x.to(dtype), scores.to(dtype), kernel="linear")

    assert phi(x).abs().max() < 1e-13
    assert phi(x, torch.float32).abs().max() < 1e-4
    assert phi(x + 0.1).abs().max() > 1e-2 and phi(mean.to(x) + 1.1 * (x - mean.to(x))).abs().max() > 1e-2

    moving = torch.randn(n, d, dtype=torch.float64, device=backend.device)
    for _ in range(1000):
        moving = moving + 0.09 * phi(moving)
    assert (moving.mean(0) - mean.to(moving)).abs().max() < 1e-6
    centred = moving - moving.mean(0)
    assert (centred.mT @ centred / n - covariance.to(moving)).abs().max() < 1e-6


def test_temperature_of_the_cases_is_not_one():
    assert TEMPERATURE not in (0.0, 1.0)
