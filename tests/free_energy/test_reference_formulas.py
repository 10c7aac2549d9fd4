"""The plain PyTorch free energy, the judge of the kernels: densities that integrate to 1, limits, gradients, masks."""

import math

import mpmath
import numpy as np
import pytest
import torch

from fekernels._catalogue.free_energy import CATEGORICAL, LIKELIHOODS, REDUCTIONS, Target
from fekernels._catalogue.free_energy import CODES as CODES_BY_NAME
from fekernels.reference.free_energy import free_energy as reference
from fekernels.reference.free_energy import special_functions as special
from fekernels.reference.free_energy.free_energy import (
    energy_elements,
    free_energy,
    kl_elements,
    values,
)
from fekernels.reference.functions import exp
from tests.support import oracle

CODES = range(len(LIKELIHOODS))
IDS = [f"{row.name}{len(row.parameters)}" for row in LIKELIHOODS]
COUNTS = [code for code, row in enumerate(LIKELIHOODS) if row.target is Target.COUNTS]
GAMMA = CODES_BY_NAME["gamma"][2]
B, D, Z = 5, 4, 3


def double(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def draw(likelihood, dtype=torch.float64):
    """Parameters, of which the last broadcasts over the batch, and a target."""
    if likelihood == CATEGORICAL:
        return [torch.randn(B, D, 3, dtype=dtype)], torch.randint(0, 3, (B, D))
    params = [torch.randn(B, D, dtype=dtype) for _ in LIKELIHOODS[likelihood].parameters]
    if LIKELIHOODS[likelihood].name == "student_t":
        params[2] = 1 + 9 * torch.rand(1, D, dtype=dtype)
    if likelihood in COUNTS[1:]:
        params[0] = params[0].exp()
        params[1] = 0.1 + 30 * torch.rand(1, D, dtype=dtype)
    if likelihood == GAMMA:
        params = [params[0].exp(), 0.1 + 30 * torch.rand(1, D, dtype=dtype)]
        return params, params[0] * torch.randn(B, D, dtype=dtype).exp()
    counts = torch.poisson(torch.full((B, D), 2.0, dtype=dtype))
    return params, counts if likelihood in COUNTS else torch.rand(B, D, dtype=dtype)


def latents(dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in ((B, Z), (B, Z), (1, Z), (B, 1))]


# The constants are kept: densities integrate, and masses sum, to one.

GRID = {
    "gaussian1": (0.3,),
    "gaussian2": (0.3, -0.7),
    "laplace2": (0.3, -0.7),
    "student_t3": (0.3, -0.7, 5.0),
}


@pytest.mark.parametrize("name", GRID)
def test_densities_integrate_to_one(name):
    # x = r + tan(t): heavy tails become a bounded interval, and the kink of laplace lies on a node
    t = torch.linspace(-math.pi / 2, math.pi / 2, 200_001, dtype=torch.float64)[1:-1]
    e = energy_elements(double(*GRID[name]), GRID[name][0] + torch.tan(t), IDS.index(name))
    total = (torch.exp(-e) / torch.cos(t) ** 2).sum() * (t[1] - t[0])
    assert abs(total.item() - 1) < (t[1] - t[0]) ** 2  # the trapezoidal rule's order


@pytest.mark.parametrize(("mu", "k"), [(2.0, 0.7), (2.0, 1.0), (0.3, 15.9), (5.0, 16.1), (1.0, 1e4)])
def test_gamma_integrates_to_one(mu, k):
    """Over t = log x, in which the density is smooth and falls off at both ends: trapezoids are exact then."""
    t = math.log(mu) + torch.linspace(-50.0, 10.0, 200_001, dtype=torch.float64)
    e = energy_elements(double(mu, k), torch.exp(t), GAMMA)
    assert abs((torch.exp(t - e).sum() * (t[1] - t[0])).item() - 1) < 1e-11


@pytest.mark.parametrize("x", [0.0, 1e-300, 1e-3, 0.9, 1.0, 3.0])
@pytest.mark.parametrize("k", [1.0, 15.9, 16.1, 1e8, 1e-3])
def test_gamma_to_fifty_digits(x, k):
    """Values against mpmath; gradients of both kinds at a shape of exactly 1, at a tie and at a target of 0 too."""
    mu = 1.0
    leaves = [leaf.requires_grad_() for leaf in double(mu, k)]
    e = energy_elements(leaves, *double(x), GAMMA)
    autograd = torch.autograd.grad(e.sum(), leaves)
    written = reference.energy_gradients(double(mu, k), *double(x), GAMMA)
    if x == 0:
        assert e.item() == (0.0 if k == 1 else math.copysign(math.inf, k - 1)) and written[0].item() == k
        assert written[1].item() == math.inf
        return
    with mpmath.workdps(50):
        exact = oracle.gamma(mpmath.mpf(x), mpmath.mpf(mu), mpmath.mpf(k))
        assert abs(e.item() - exact.value) <= 1e-14 * exact.scale
        for slopes in (autograd, written):
            for got, wanted, scale in zip(slopes, exact.gradients, exact.scales, strict=True):
                assert abs(got.item() - wanted) <= 1e-12 * scale


@pytest.mark.parametrize("logit", [0.0, 1e-5, 0.9, -1.9, 2.1, 30.0])
def test_continuous_bernoulli_integrates_to_one(logit):
    node, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(60))
    e = energy_elements(double(logit), (node + 1) / 2, CODES_BY_NAME["continuous_bernoulli"][1])
    assert abs((torch.exp(-e) * weight).sum().item() / 2 - 1) < 1e-12


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("bernoulli", (0.7,)),
        ("poisson", (1.3,)),
        ("negative_binomial", (4.0, 0.7)),
        ("negative_binomial", (4.0, 15.9)),
        ("negative_binomial", (4.0, 16.1)),
        ("negative_binomial", (4.0, 1e7)),
        ("zero_inflated_negative_binomial", (4.0, 0.7, -0.4)),
        ("zero_inflated_negative_binomial", (0.01, 20.0, 2.0)),
    ],
)
def test_masses_sum_to_one(name, params):
    x = torch.arange(2 if name == "bernoulli" else 400, dtype=torch.float64)
    total = torch.exp(-energy_elements(double(*params), x, CODES_BY_NAME[name][len(params)])).sum()
    assert abs(total.item() - 1) < 1e-12


def test_categorical_sums_to_one():
    logits = torch.randn(1, 1, 7, dtype=torch.float64).expand(1, 7, 7)
    e = energy_elements([logits], torch.arange(7)[None], CATEGORICAL)
    assert abs(torch.exp(-e).sum().item() - 1) < 1e-14


def test_mse_is_a_gaussian_of_variance_one_half():
    r, x = torch.randn(2, 10, dtype=torch.float64)
    s = torch.full_like(r, -math.log(2))
    torch.testing.assert_close(
        energy_elements([r], x, 0) + math.log(math.pi) / 2,
        energy_elements([r, s], x, CODES_BY_NAME["gaussian"][2]),
    )


def test_kl_integrates():
    node, weight = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(20))
    m, v, p, w = double(0.4, -0.6, -0.3, 0.5)
    z = m + torch.exp(v / 2) * node
    gaussian = CODES_BY_NAME["gaussian"][2]
    log_ratio = energy_elements([p, w], z, gaussian) - energy_elements([m, v], z, gaussian)
    expected = (log_ratio * weight).sum() / math.sqrt(2 * math.pi)
    torch.testing.assert_close(kl_elements([m, v, p, w]).squeeze(), expected)
    torch.testing.assert_close(kl_elements([m, v]), kl_elements([m, v, *double(0.0, 0.0)]))


# Limits.

MU = torch.tensor([1e-3, 0.5, 7.0, 300.0], dtype=torch.float64)
X = torch.tensor([0.0, 1.0, 9.0, 310.0], dtype=torch.float64)


def test_negative_binomial_tends_to_poisson():
    poisson = energy_elements([MU.log()], X, CODES_BY_NAME["poisson"][1])
    difference = [
        energy_elements([MU, torch.full_like(MU, th)], X, CODES_BY_NAME["negative_binomial"][2]) - poisson
        for th in (1e6, 1e14)
    ]
    # The next order in 1/th is X/th of this one; the terms, of up to 2000, are rounded at 1e-13.
    torch.testing.assert_close(difference[0], (X - (X - MU) ** 2) / 2e6, rtol=310 / 1e6, atol=1e-12)
    assert difference[1].abs().max() < 1e-11


def test_student_tends_to_gaussian():
    r, s = torch.randn(2, 50, dtype=torch.float64)
    x = torch.randn(50, dtype=torch.float64)
    gaussian = energy_elements([r, s], x, CODES_BY_NAME["gaussian"][2])
    for nu in (1e6, 1e9, 1e13):
        student = energy_elements([r, s, torch.full_like(r, nu)], x, CODES_BY_NAME["student_t"][3])
        assert ((student - gaussian).abs() / (1 + gaussian.abs()) ** 2).max() < 2 / nu + 1e-15


def test_gate_of_zero_inflation():
    th = torch.full_like(MU, 0.8)
    negative_binomial = energy_elements([MU, th], X, CODES_BY_NAME["negative_binomial"][2])
    inflated = CODES_BY_NAME["zero_inflated_negative_binomial"][3]
    never = energy_elements([MU, th, torch.full_like(MU, -700.0)], X, inflated)
    torch.testing.assert_close(never, negative_binomial, rtol=0, atol=1e-12)
    always = energy_elements([MU, th, torch.full_like(MU, 700.0)], X, inflated)
    torch.testing.assert_close(
        always, torch.where(X == 0, 0.0, 700.0 + negative_binomial), rtol=0, atol=1e-12
    )


# Edge points, against 50 digits.


@pytest.mark.parametrize("x", [0, 1, 7, 1000])
@pytest.mark.parametrize("th", [1e-4, 1.0, 15.99, 16.0, 1e4, 1e6, 1e9])
def test_negative_binomial_to_fifty_digits(x, th):
    with mpmath.workdps(50):
        for mu in (1e-8, 1.0, 1e4):
            m, t = mpmath.mpf(mu), mpmath.mpf(th)
            exact = t * mpmath.log1p(m / t) + x * mpmath.log1p(t / m) + mpmath.loggamma(x + 1)
            exact -= mpmath.loggamma(x + t) - mpmath.loggamma(t)
            got = energy_elements(
                double(mu, th), *double(float(x)), CODES_BY_NAME["negative_binomial"][2]
            ).item()
            assert abs(got - exact) < 1e-11 * exact
            grown = mpmath.log1p(m / t) - mpmath.digamma(x + t) + mpmath.digamma(t) + (x - m) / (t + m)
            scale = mpmath.log1p(m / t) + x / t + mpmath.mpf(10) ** -20
            slope = reference.energy_gradients(
                double(mu, th), *double(float(x)), CODES_BY_NAME["negative_binomial"][2]
            )
            assert abs(slope[0].item() - t * (m - x) / (m * (t + m))) < 1e-14 * (1 + x / mu)
            assert abs(slope[1].item() - grown) < 1e-13 * scale


def check_special(function, exact, points, tolerance=1e-13):
    with mpmath.workdps(60):
        for point in points:
            got, wanted = function(*double(*point)).item(), exact(*map(mpmath.mpf, point))
            assert abs(got - wanted) <= tolerance * abs(wanted), point


def test_special_functions_to_sixty_digits():
    near = [(sign * y,) for y in (1e-12, 1e-5, 0.09, 0.11, 0.49, 0.51, 0.99, 1.01, 30.0) for sign in (-1, 1)]
    check_special(special.expm1_excess, lambda d: mpmath.expm1(d) - d, near)
    check_special(special.excess, lambda w: w - mpmath.log1p(w), [p for p in near if p[0] > -1])
    check_special(special.log_sinhc, lambda y: mpmath.log(mpmath.sinh(y) / y), [*near, (400.0,), (-400.0,)])
    check_special(special.langevin, lambda y: mpmath.coth(y) - 1 / y, [*near, (400.0,), (-400.0,)])
    pairs = [(nu, u) for nu in (1e-5, 0.3, 2.0, 1e6, 1e12) for u in (1e-9, 0.1, 3.0, 1e5)]
    check_special(special.scaled_log1p, lambda nu, u: nu * mpmath.log1p(u / nu), pairs)
    check_special(special.scaled_log1p_slope, lambda nu, u: mpmath.log1p(u / nu) - u / (nu + u), pairs)
    freedoms = [(nu,) for nu in (0.01, 1.0, 31.9, 32.1, 1e3, 1e6, 1e12)]
    check_special(
        special.log_student_constant,
        lambda nu: mpmath.log(nu * mpmath.pi) / 2 + mpmath.loggamma(nu / 2) - mpmath.loggamma((nu + 1) / 2),
        freedoms,
    )
    check_special(
        special.student_constant_slope,
        lambda nu: (1 / nu + mpmath.digamma(nu / 2) - mpmath.digamma((nu + 1) / 2)) / 2,
        freedoms,
        1e-11,
    )


# Gradients: autograd's of the energies, the written ones, and gradients of gradients.


@pytest.mark.parametrize("likelihood", CODES, ids=IDS)
def test_gradcheck(likelihood):
    params, x = draw(likelihood)
    operands = [operand.requires_grad_() for operand in (*params, *latents())]
    weight, n = torch.rand(B), len(params)

    def call(*operands):
        return values(list(operands[:n]), x, None, list(operands[n:]), weight, likelihood, 1, 0.7)

    assert torch.autograd.gradcheck(call, operands)
    assert torch.autograd.gradgradcheck(call, operands)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("reduction", [0, 1, 2], ids=REDUCTIONS)
@pytest.mark.parametrize("likelihood", CODES, ids=IDS)
def test_written_gradients_are_those_of_autograd(likelihood, reduction, masked, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2 * D)  # two rows at a time, categorical one
    params, x = draw(likelihood)
    latent = latents() if reduction else latents()[:2]
    weight, mask = torch.rand(B), torch.rand(B, D) < 0.7 if masked else None
    if mask is not None:
        params[0][~mask] = math.nan
        if likelihood != CATEGORICAL:
            x[~mask] = math.nan
    operands = [operand.clone().requires_grad_() for operand in (*params, *latent)]
    n = len(params)
    upstream = [torch.rand(B), torch.rand(B)] if reduction == 0 else []
    terms = values(operands[:n], x, mask, operands[n:], weight, likelihood, reduction, 0.7)
    objective = sum((t * u).sum() for t, u in zip(terms[1:], upstream or (1, 1), strict=True))
    expected = torch.autograd.grad(objective, operands)
    results = free_energy(
        params, x, mask, latent, weight, upstream, likelihood, reduction, 0.7, (1 << len(operands)) - 1, False
    )
    # float64 on both sides: sums of twenty terms near 100, some of which cancel.
    torch.testing.assert_close(results, [*terms, *expected], rtol=1e-12, atol=1e-13)
    if mask is not None:
        assert all(part.isfinite().all() for part in (*results, *expected))
        assert (results[3][~mask] == 0).all() and (expected[0][~mask] == 0).all()


@pytest.mark.parametrize("likelihood", CODES, ids=IDS)
def test_at_ties_and_zeros(likelihood):
    """r = x, x = 0, logit 0, mu = 0: where branches meet, autograd and the written gradients agree and are finite."""
    params, x = draw(likelihood)
    params = [
        torch.zeros_like(p) if i != len(params) - 1 or len(params) < 2 else p for i, p in enumerate(params)
    ]
    if likelihood in COUNTS[1:]:
        params[1] = torch.full((1, D), 16.0, dtype=torch.float64)
    x = torch.zeros_like(x)
    if likelihood == GAMMA:  # of positive numbers: x = mu
        params, x = [torch.ones_like(params[0]), torch.full((1, D), 16.0, dtype=torch.float64)], x + 1
    leaves = [p.requires_grad_() for p in params]
    autograd = torch.autograd.grad(energy_elements(leaves, x, likelihood).sum(), leaves)
    results = free_energy(params, x, None, [], None, [], likelihood, 2, 1.0, (1 << len(params)) - 1, False)
    for leaf, ours, theirs in zip(leaves, results[3:], autograd, strict=True):
        assert ours.isfinite().all() and ours.shape == leaf.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("likelihood", CODES, ids=IDS)
def test_what_is_masked_adds_nothing(likelihood):
    params, x = draw(likelihood)
    mask = torch.arange(D).expand(B, D) < 2
    first = [p[:, :2] for p in params]
    whole, cut = (
        free_energy(p, t, m, [], None, [], likelihood, 0, 1.0, 0, False)[1]
        for p, t, m in ((params, x, mask), (first, x[:, :2], None))
    )
    torch.testing.assert_close(whole, cut, rtol=1e-14, atol=0)


def test_needs_and_dtypes():
    params, x = draw(CODES_BY_NAME["gaussian"][2], torch.float32)
    latent = [operand.bfloat16() for operand in latents(torch.float32)]
    operands = [*params, *latent]
    all_of_it = free_energy(params, x, None, latent, None, [], 2, 1, 1.0, 0b111111, False)
    assert [r.dtype for r in all_of_it] == [torch.float32] * 3 + [o.dtype for o in operands]
    some = free_energy(params, x, None, latent, None, [], 2, 1, 1.0, 0b101001, False)
    assert len(some) == 6
    for got, i in zip(some[3:], (0, 3, 5), strict=True):
        assert torch.equal(got, all_of_it[3 + i])
    alone = free_energy([], None, None, latent, None, [], 0, 2, 1.0, 0, False)
    assert alone[1] == 0 and alone[0] == alone[2] > 0


def test_inplace(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2 * D)
    params, x = draw(CODES_BY_NAME["bernoulli"][1], torch.float32)
    expected = free_energy(params, x, None, [], None, [], 3, 1, 1.0, 1, False)[3]
    got = free_energy(params, x, None, [], None, [], 3, 1, 1.0, 1, True)[3]
    assert got is params[0] and torch.equal(got, expected)


def test_empty_batch():
    r, x, m = torch.empty(0, D), torch.empty(0, D), torch.empty(0, Z)
    mean, total, rows = (
        free_energy([r], x, None, [m, m], None, [], 0, how, 1.0, 7, False) for how in (1, 2, 0)
    )
    assert all(value.isnan() for value in mean[:3]) and total[:3] == [0, 0, 0]
    assert [tuple(r.shape) for r in rows] == [(0,)] * 3 + [(0, D), (0, Z), (0, Z)]


def test_exp_keeps_seven_digits_everywhere():
    x = torch.linspace(-103.0, 88.7, 100_001)
    exact = torch.exp(x.double())
    error = (exp(x).double() - exact).abs()
    assert (error / exact)[x > -87].max() < 1.2e-7
    assert error[x <= -87].max() < 2**-149  # of the subnormal results, within the last place
    special = exp(torch.tensor([-math.inf, 0.0, math.inf, math.nan, 88.8]))
    assert special[:3].tolist() == [0.0, 1.0, math.inf] and special[3].isnan() and special[4] == math.inf
