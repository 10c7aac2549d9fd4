"""The public kernelised Stein discrepancy: statistics, Gaussians in closed form, gradients, compilation."""

import math

import pytest
import torch

from fekernels import stein
from fekernels._catalogue.stein import CODES
from tests.support.stein import EMPTY, FINITE, KERNELS, LAYOUTS, SMOOTH, Case, Problem
from tests.support.stein_exact import assert_close, exact_discrepancy
from tests.support.tensors import bits_equal

NAMES = pytest.mark.parametrize("name", FINITE)
CASES = [*LAYOUTS, Case(2, 1), Case(65, 3, h=1e-3), Case(50, 20, coincident=30), Case(50, 37, offset=1e4)]


@NAMES
@pytest.mark.parametrize("statistic", ["u", "v"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_formula(case, statistic, name, backend):
    problem = case.make()
    got = problem.to(backend.device).discrepancy(name, statistic=statistic)
    assert got.dtype == torch.float32
    exact, scale = exact_discrepancy(problem, name, statistic)
    assert_close(got, exact, scale, f"{case} {name}")


@NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, name, backend):
    problem = Case(37, 9, (2,)).make()
    for dtypes in ((dtype, torch.float32), (torch.float32, dtype), (dtype, dtype)):
        mixed = Problem(problem.x.to(dtypes[0]), problem.s.to(dtypes[1]), problem.h)
        for statistic in "uv":
            got = mixed.to(backend.device).discrepancy(name, statistic=statistic)
            assert got.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
            assert_close(got, *exact_discrepancy(mixed, name, statistic), f"{dtypes} {statistic}")


@NAMES
def test_small_sets(name, backend):
    """One particle has no pair: NaN for "u", its own term for "v". Nothing at all: NaN, as a mean of nothing."""
    for case in (Case(1, 3), Case(1, 2, (4,))):
        problem = case.make().to(backend.device)
        assert problem.discrepancy(name).isnan().all()
        assert_close(problem.discrepancy(name, statistic="v"), *exact_discrepancy(problem, name, "v"))
    for case in EMPTY:
        problem = case.make().to(backend.device)
        for statistic in "uv":
            got = problem.discrepancy(name, statistic=statistic)
            assert got.shape == case.batch
            assert got.isnan().all() if case.n == 0 else not got.any()


@pytest.mark.parametrize("name", SMOOTH)
def test_no_bandwidth_is_an_error(name, backend):
    """As h falls the statistic of coincident particles grows like 2 d / h: it is infinite at 0, not 0."""
    problem = Case(30, 4, coincident=25).make().to(backend.device)
    assert not stein.median_bandwidth(problem.x)
    small, smaller = (problem.with_h(h).discrepancy(name) for h in (1e-6, 1e-8))
    assert 99 < smaller / small < 101
    if backend.device == "cpu":
        for bandwidth in (0.0, torch.zeros(()), 1e-39, "median"):
            with pytest.raises(
                ValueError, match="kernel_stein_discrepancy: bandwidth must be > 0.*got (0|1e-39)"
            ):
                problem.discrepancy(name, bandwidth=bandwidth)
        operands = problem.x[None], problem.s[None], torch.zeros(1), torch.ones(1, 30, 1)
        with pytest.raises(ValueError, match="kernel_stein_discrepancy: bandwidth must be > 0.*got 0"):
            torch.ops.fekernels.kernel_stein_discrepancy(*operands, *operator_kernel(name))
    else:
        assert problem.discrepancy(name, bandwidth=0.0) == torch.inf


def test_no_bandwidth_of_one_problem_or_one_particle():
    problem = Case(6, 2, (3,)).make()
    problem.x[1] = 1.0
    with pytest.raises(
        ValueError, match="got 0 in problem 1, the median over particles of which too many coincide"
    ):
        problem.discrepancy("rbf", bandwidth="median")
    assert problem.discrepancy("linear", bandwidth="median").isfinite().all()
    one = Case(1, 2).make()
    assert one.discrepancy("rbf", bandwidth="median").isnan()
    with pytest.raises(ValueError, match="bandwidth must be > 0"):
        one.discrepancy("rbf", bandwidth="median", statistic="v")


def test_no_bandwidth_where_it_is_not_looked_at():
    problem = Case(6, 2, (2,)).make()
    values = torch.vmap(lambda x, s, h: stein.kernel_stein_discrepancy(x, s, bandwidth=h))(
        problem.x, problem.s, torch.tensor([0.0, 1.0])
    )
    assert values[0] == torch.inf
    torch.testing.assert_close(values[1], problem.with_h(1.0).discrepancy("rbf")[1])


@NAMES
def test_median_is_the_median(name, backend):
    problem = Case(21, 3, (2, 2)).make().to(backend.device)
    h = stein.median_bandwidth(problem.x)
    got = problem.discrepancy(name, bandwidth="median")
    assert torch.equal(got, problem.discrepancy(name, bandwidth=h)) and got.shape == (2, 2)


@NAMES
def test_v_statistic_is_not_negative_and_autocast_leaves_float32(name, backend):
    problem = Case(65, 20).make().to(backend.device)
    plain = problem.discrepancy(name, statistic="v")
    assert plain > 0
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert bits_equal(problem.discrepancy(name, statistic="v"), plain)


def operator_kernel(name):
    kernel = KERNELS[name]
    return (CODES[name], *((kernel.beta, kernel.c) if name == "imq" else (-0.5, 1.0)))


# Gaussians q = N(m, s^2 I) against p = N(0, I): KSD^2 = E_{x,y ~ q} [delta(x).delta(y) k(x, y)], delta = grad log p/q.


def quadrature(d, mean, deviation, count):
    """Nodes [count^d, d] and weights for N(mean, deviation^2 I): the trapezoidal rule, all but exact for such."""
    nodes = torch.linspace(-7, 7, count, dtype=torch.float64)
    grid = torch.cartesian_prod(*[nodes] * d).view(-1, d)
    w = torch.exp(-grid.square().sum(1) / 2)
    return mean + deviation * grid, w / w.sum()


@pytest.mark.parametrize("h", [1.0, 4.0])
@pytest.mark.parametrize(("m", "deviation"), [(0.7, 1.0), (0.0, 1.5), (0.0, 0.6), (0.0, 1.0)])
@pytest.mark.parametrize("d", [1, 2])
def test_gaussians_in_closed_form(d, m, deviation, h, backend):
    """Expectations by quadrature, whose weights are the operator's."""
    mean = torch.full((d,), m, dtype=torch.float64)
    x, w = quadrature(d, mean, deviation, 200 if d == 1 else 45)
    scores = -x
    wide = backend.backend == "reference"
    x, scores, w = (t if wide else t.float().to(backend.device) for t in (x, scores, w))
    sums = torch.ops.fekernels.kernel_stein_discrepancy(
        x[None], scores[None], x.new_full((1,), h), w[None, :, None], 0, -0.5, 1.0
    )
    diagonal = w.double().square() * (scores.double().square().sum(1) + 2 * d / h)
    variance = deviation**2
    narrow = (1 + 4 * variance / h) ** -0.5  # E exp(-(x - y)^2 / h) in one dimension
    if m:
        exact = d * m * m * narrow**d
    else:
        slope = 1 / variance - 1
        exact = slope**2 * d * variance / 2 * (narrow - narrow**3) * narrow ** (d - 1)
    assert abs(sums.item() + diagonal.sum().item() - exact) < (1e-10 if wide else 1e-6)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        # shift (m, ..., m): |m|^2 E k(x, y)
        ("rbf", lambda m2, d, h: m2 * (1 + 4 / h) ** (-d / 2)),
        ("linear", lambda m2, d, h: m2 * (m2 + 1)),
        ("imq", lambda m2, d, h: m2 * imq_mean(d, h)),
    ],
)
def test_samples_estimate_the_closed_form(name, exact, backend):
    """The U-statistic is unbiased: the mean over many sets within five standard errors, far from 0."""
    torch.manual_seed(4)
    d, h, m, sets, n = 3, 2.0, 0.5, 400, 60
    x = torch.randn(sets, n, d, device=backend.device) + m
    values = Problem(x, -x, torch.full((sets,), h, device=backend.device)).discrepancy(name).double()
    error = values.std().item() / math.sqrt(sets)
    wanted = exact(m * m * d, d, h)
    assert abs(values.mean().item() - wanted) < 5 * error
    assert wanted > 20 * error


def imq_mean(d, h, beta=-0.3, c=1.2):
    """E (c^2 + |z|^2/h)^beta, z ~ N(0, 2 I_d), as |z|^2 = 2 chi^2_d by quadrature of d = 3's density."""
    assert d == 3
    r = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    density = math.sqrt(2 / math.pi) * r**2 * torch.exp(-(r**2) / 2)
    return torch.trapezoid(density * (c**2 + 2 * r**2 / h) ** beta, r).item()


def test_tells_the_target_from_others(backend):
    torch.manual_seed(1)
    x = torch.randn(500, 2, device=backend.device)
    for name in FINITE:
        right = stein.kernel_stein_discrepancy(x, -x, kernel=KERNELS[name])
        for wrong in (-(x - 0.5), -x / 2):
            assert stein.kernel_stein_discrepancy(x, wrong, kernel=KERNELS[name]) > 5 * right.abs()


# Gradients.


def gradients(value, leaves, **keywords):
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True, **keywords)


@NAMES
@pytest.mark.parametrize("statistic", ["u", "v"])
@pytest.mark.parametrize("case", [Case(2, 1), Case(33, 5, (2,)), Case(65, 20), Case(40, 3, h=1e-2)], ids=str)
def test_gradients_are_those_of_the_formula(case, statistic, name, backend):
    problem = case.make()
    leaves = problem.to(backend.device).requiring()
    upstream = torch.randn(case.batch)
    value = leaves.discrepancy(name, statistic=statistic)
    got = gradients(value, leaves.leaves(), grad_outputs=upstream.to(backend.device))
    wide = problem.double().requiring()
    value = exact_discrepancy(wide, name, statistic)[0]
    exact = gradients(value, wide.leaves(), grad_outputs=upstream.double())
    for one, other in zip(got, exact, strict=True):
        assert (one.cpu().double() - other).abs().max() <= 1e-5 * other.abs().max()


@NAMES
@pytest.mark.parametrize("statistic", ["u", "v"])
def test_gradcheck(statistic, name):
    leaves = Case(5, 3, (2,), h=1.0).make().double().requiring()

    def function(*operands):
        return Problem(*operands).discrepancy(name, statistic=statistic)

    assert torch.autograd.gradcheck(function, leaves.leaves())
    assert torch.autograd.gradgradcheck(function, leaves.leaves())


@NAMES
def test_second_derivatives(name, backend):
    start = Case(9, 4, (2,)).make()  # three dimensions: the operators take the very tensors
    results = []
    for dtype, device in ((torch.float32, backend.device), (torch.float64, "cpu")):
        x = start.x.to(device, dtype).requires_grad_()
        problem = Problem(x, -x * x.detach().sin(), x.square().mean())
        value = problem.discrepancy(name) if dtype == torch.float32 else exact_discrepancy(problem, name)[0]
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), x)])
    for one, other in zip(*results, strict=True):
        assert (one.cpu().double() - other).abs().max() < 1e-5 * other.abs().max()


@NAMES
def test_empty_gradients(name, backend):
    for case in EMPTY:
        leaves = case.make().to(backend.device).requiring()
        for got, leaf in zip(
            gradients(leaves.discrepancy(name).sum(), leaves.leaves()), leaves.leaves(), strict=True
        ):
            assert got.shape == leaf.shape


def test_weights_get_no_gradient(backend):
    problem = Case(5, 2, (1,)).make().to(backend.device).requiring()
    weights = torch.ones(1, 5, 1, device=backend.device, requires_grad=True)
    value = torch.ops.fekernels.kernel_stein_discrepancy(*problem.leaves(), weights, 0, -0.5, 1.0)
    with pytest.raises(RuntimeError, match="weights get no gradient"):
        value.sum().backward()


@NAMES
def test_vmap_and_forward_mode(name, backend):
    problem = Case(11, 3, (4,)).make().to(backend.device)
    wanted = problem.discrepancy(name)
    got = torch.func.vmap(lambda *operands: Problem(*operands).discrepancy(name))(*problem.leaves())
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)
    tangent = torch.randn_like(problem.x)
    x = problem.x.clone().requires_grad_()
    reverse = (gradients(Problem(x, problem.s, problem.h).discrepancy(name).sum(), [x])[0] * tangent).sum()
    _, forward = torch.func.jvp(
        lambda x: Problem(x, problem.s, problem.h).discrepancy(name).sum(), (problem.x,), (tangent,)
    )
    assert torch.allclose(forward, reverse, rtol=1e-4)


# The operators.


@pytest.mark.parametrize("name", ["imq", "linear"])  # operators of one schema
def test_opcheck(name, backend):
    for dtype, grad in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        problem = Case(7, 3, (2,)).make(dtype)
        leaves = problem.requiring().leaves() if grad else problem.leaves()
        for weights in (torch.ones(1, 7, 1), torch.randn(2, 7, 3)):
            result = torch.library.opcheck(
                torch.ops.fekernels.kernel_stein_discrepancy.default,
                (*leaves, weights, *operator_kernel(name)),
            )
            assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
    upstream = torch.randn(2, 3, dtype=torch.float64)
    result = torch.library.opcheck(
        torch.ops.fekernels.kernel_stein_discrepancy_backward.default,
        (upstream, *problem.leaves(), weights, *operator_kernel(name), 5),
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "statistic"), [("rbf", "u"), ("linear", "v")])
def test_compiles_whole_and_once(statistic, name, backend):
    torch._dynamo.reset()

    def function(x, s):
        return stein.kernel_stein_discrepancy(x, s, kernel=KERNELS[name], statistic=statistic)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, n, d in ((2, 5, 3), (3, 6, 4), (5, 17, 7)):
        once = torch._dynamo.config.patch(error_on_recompile=n != 5)
        x, s = (torch.randn(batch, n, d, device=backend.device) for _ in range(2))
        leaves = [x.requires_grad_(), s.requires_grad_()]
        with once:
            got = compiled(*leaves)
        wanted = function(*leaves)
        assert torch.allclose(got, wanted, rtol=1e-5)
        for one, other in zip(gradients(got.sum(), leaves), gradients(wanted.sum(), leaves), strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
