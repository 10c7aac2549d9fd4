"""The bootstrap test on the Stein discrepancy: its level, its power, correlated samples, its seed."""

import pytest
import torch

import fekernels as fe
from fekernels import stein
from tests.support.stein import KERNELS, Case
from tests.support.stein_exact import weighted_sums


def autoregressive(sets, n, memory):
    """Chains whose stationary law is N(0, 1)."""
    noise = torch.randn(sets, n, 1)
    x = noise.clone()
    for t in range(1, n):
        x[:, t] = memory * x[:, t - 1] + (1 - memory**2) ** 0.5 * noise[:, t]
    return x


@pytest.mark.parametrize("kernel", ["imq", "rbf", "linear"])
def test_level_and_power(kernel, backend):
    torch.manual_seed(5)
    x = torch.randn(200, 80, 2, device=backend.device)
    right = stein.goodness_of_fit(x, -x, kernel=kernel, draws=200, seed=1).p_value
    # Of 200 p-values a tenth is below 0.1 (standard error 0.021), and their mean is 1/2 (0.02).
    assert abs((right <= 0.1).double().mean().item() - 0.1) < 5 * 0.0212
    assert abs(right.double().mean().item() - 0.5) < 5 * 0.0204
    wrong = stein.goodness_of_fit(x, -(x - 0.8), kernel=kernel, draws=200, seed=1).p_value
    assert (wrong <= 0.05).double().mean() > 0.95


def test_a_chain_needs_signs_that_remember(backend):
    """Independent signs reject a slow chain from the very target; Markov signs hardly ever do."""
    torch.manual_seed(6)
    x = autoregressive(100, 300, 0.9).to(backend.device)
    rejected = {
        change: (stein.goodness_of_fit(x, -x, draws=200, change_probability=change, seed=2).p_value <= 0.05)
        .double()
        .mean()
        .item()
        for change in (0.5, 0.02)
    }
    assert rejected[0.5] > 0.4 and rejected[0.02] < 0.2, rejected
    shifted = stein.goodness_of_fit(x, -(x - 1.5), draws=200, change_probability=0.02, seed=2).p_value
    assert (shifted <= 0.05).double().mean() > 0.8


def test_is_what_it_says(backend):
    problem = Case(20, 3, (2,)).make().to(backend.device)
    found = stein.goodness_of_fit(
        problem.x, problem.s, kernel=KERNELS["imq"], bandwidth=problem.h, draws=50, seed=9
    )
    assert isinstance(found, stein.GoodnessOfFit)
    assert found.statistic.shape == found.p_value.shape == (2,) and found.null.shape == (2, 50)
    statistic = problem.discrepancy("imq")
    assert torch.allclose(found.statistic, statistic, rtol=1e-5)
    exceed = (found.null >= found.statistic[:, None]).sum(1)
    assert torch.allclose(found.p_value, (1 + exceed) / 51)
    with fe.use_backend("reference"):
        u = fe.random.uniform((20, 50), seed=9)
    signs = (1 - 2 * (u <= 0.5).cumsum(0).remainder(2)).double()
    for m in (0, 17, 49):
        exact, _ = weighted_sums(problem.map(lambda t: t[1].cpu()), "imq", signs[:, m : m + 1])
        assert abs(found.null[1, m].item() * 20 * 19 - exact.item()) < 1e-3


def test_signs_change_as_often_as_asked():
    from fekernels.stein.goodness_of_fit import _signs

    for change in (0.5, 0.1):
        signs = _signs(2000, 500, change, 3, torch.device("cpu"))
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        rate = (signs[1:] != signs[:-1]).double().mean().item()
        assert abs(rate - change) < 5 * (change * (1 - change) / 1e6) ** 0.5
        assert abs(signs[0].mean().item()) < 5 / 500**0.5


def test_a_seed_is_a_p_value(backend):
    x = torch.randn(60, 2, device=backend.device)
    one, same, other = (stein.goodness_of_fit(x, -x, draws=100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.null, same.null) and not torch.equal(one.null, other.null)
    assert torch.equal(one.statistic, other.statistic)
    more = stein.goodness_of_fit(x.double(), -x.double(), draws=100, seed=1)
    assert torch.allclose(more.null.float(), one.null, atol=1e-5) and more.p_value.float() == one.p_value


def test_no_graph_is_kept():
    x = torch.randn(10, 2, requires_grad=True)
    found = stein.goodness_of_fit(x, -x, draws=10)
    assert not (found.statistic.requires_grad or found.p_value.requires_grad)


def test_draws_that_coincide():
    """A chain that is stuck at the mode is far from the target, and no bandwidth can be had from its median."""
    x = torch.cat([torch.zeros(40, 2), torch.randn(5, 2)])
    for kernel in ("imq", "rbf"):
        with pytest.raises(ValueError, match="goodness_of_fit: bandwidth must be > 0.*got 0, the median"):
            stein.goodness_of_fit(x, -x, kernel=kernel, draws=200)
        assert stein.goodness_of_fit(x, -x, kernel=kernel, draws=200, bandwidth=1.0).p_value < 0.01
    assert stein.goodness_of_fit(x, -x, kernel="linear", draws=20).p_value.isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["particles", "scores"])
def test_numbers_that_are_not_finite_are_no_evidence(where, bad):
    x = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0))
    operands = {"particles": x, "scores": -x}
    operands[where] = operands[where].clone()
    operands[where][1, 3, 0] = bad
    found = fe.stein.goodness_of_fit(**operands, draws=100)
    assert found.p_value.isnan().tolist() == [False, True]
    alone = fe.stein.goodness_of_fit(x[0], -x[0], draws=100)
    assert float(found.p_value[0]) == float(alone.p_value) > 0.05
