"""fe.SVGD: bandwidth schedules, annealed attraction, mini-batch kernels, noise."""

from __future__ import annotations

import math

import pytest
import torch

import fekernels as fe
from fekernels.stein.annealing import CyclicalAnnealing, TanhAnnealing
from fekernels.stein.particle_groups import group_direction, random_groups
from fekernels.stein.svgd import SVGD
from tests.support.stein import KERNELS, RADIAL
from tests.support.stein_exact import profile
from tests.support.svgd import draws, normal, plain, same


def test_bandwidth_schedules() -> None:
    x, seen = draws(10, 2), []

    def bandwidth(step: int):
        seen.append(step)
        return (torch.tensor(0.5), "median", 2)[step]

    sampler = SVGD(normal, x, optimizer="sgd", bandwidth=bandwidth)
    used = []
    result = sampler.run(3, progress=False, every=1, callback=lambda s: used.append(float(s.bandwidth)))
    expected = plain(x, 0.1, bandwidth=0.5)
    median = float(fe.median_bandwidth(expected))
    expected = plain(plain(expected, 0.1), 0.1, bandwidth=2.0)
    torch.testing.assert_close(sampler.particles, expected)
    assert seen == [0, 1, 2] and used == result.bandwidth.tolist() == [0.5, pytest.approx(median), 2.0]


def test_bandwidth_scale() -> None:
    x = draws(10, 2)
    for given, unscaled in ((0.5, 0.5), ("median", None), (lambda step: 0.5 if step else "median", None)):
        sampler = SVGD(normal, x, optimizer="sgd", bandwidth=given, bandwidth_scale=3.0)
        expected = x
        for step in range(2):
            sampler.step()
            h = 0.5 if unscaled or (callable(given) and step) else float(fe.median_bandwidth(expected))
            expected = plain(expected, 0.1, bandwidth=3 * h)
            assert float(sampler.bandwidth) == pytest.approx(3 * h)
        torch.testing.assert_close(sampler.particles, expected)


def test_annealing_multiplies_the_scores() -> None:
    x = draws(10, 2)
    sampler = SVGD(normal, x, optimizer="sgd", anneal=lambda step: (0.0, 0.25, 1.0)[step])
    sampler.run(3, progress=False)
    expected = plain(plain(plain(x, 0.1, gamma=0.0), 0.1, gamma=0.25), 0.1)
    torch.testing.assert_close(sampler.particles, expected)


def test_annealing_schedules() -> None:
    cyclical = CyclicalAnnealing(100, cycles=4, power=2)
    assert [cyclical(k) for k in (0, 5, 24, 25, 50, 99, 100, 10**6)] == pytest.approx(
        [0, 0.04, 0.96**2, 0, 0, 0.96**2, 1, 1]
    )
    assert [CyclicalAnnealing(10, cycles=3)(k) for k in (3, 4, 7)] == pytest.approx([0.9, 0.2, 0.1])
    tanh = TanhAnnealing(100, power=3)
    assert [tanh(k) for k in (0, 50, 99, 100)] == pytest.approx(
        [0, math.tanh(0.65**3), math.tanh(1.287**3), 1]
    )
    x = draws(6, 2)
    for name, schedule in (("cyclical", CyclicalAnnealing(8)), ("tanh", TanhAnnealing(8))):
        named, given = SVGD(normal, x, anneal=name, anneal_steps=8), SVGD(normal, x, anneal=schedule)
        named.run(10, progress=False)
        given.run(10, progress=False)
        assert torch.equal(named.particles, given.particles)
    for make in (CyclicalAnnealing, TanhAnnealing):
        with pytest.raises(ValueError, match="power must be finite and > 0; got 0"):
            make(10, power=0.0)
        with pytest.raises(ValueError, match="steps must be in"):
            make(0)
    with pytest.raises(ValueError, match="cycles must be in"):
        CyclicalAnnealing(10, cycles=0)


def test_annealing_finds_modes_that_plain_svgd_does_not() -> None:
    """Two modes 6 apart, and all particles begin at one: section 4 of D'Angelo & Fortuin 2021."""

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(normal(x + 3), normal(x - 3))

    x = draws(20, 1) - 3
    plainly = SVGD(log_prob, x)
    plainly.run(500, progress=False, every=0)
    annealed = SVGD(log_prob, x, anneal="cyclical", anneal_steps=400)
    annealed.run(500, progress=False, every=0)
    assert int((plainly.particles > 0).sum()) == 0
    assert 5 <= int((annealed.particles > 0).sum()) <= 15


@pytest.mark.parametrize(("n", "size"), [(2, 2), (3, 2), (10, 5), (11, 5), (19, 10), (7, 100), (1000, 32)])
def test_groups_deal_out_all_particles(n: int, size: int) -> None:
    groups = random_groups(n, size, 5, 1, torch.device("cpu"))
    assert sorted(torch.cat([group.flatten() for group in groups]).tolist()) == list(range(n))
    sizes = [group.shape[1] for group in groups]
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1 and max(sizes) <= max(size, 3)
    again = random_groups(n, size, 5, 1, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(groups, again, strict=True))
    if n > 10:
        other = random_groups(n, size, 5, 2, torch.device("cpu"))
        assert any(not torch.equal(a, b) for a, b in zip(groups, other, strict=True))


@pytest.mark.parametrize("kernel", ["rbf", fe.kernels.IMQ(c=2.0), "laplace", fe.kernels.Matern32()])
def test_the_mean_over_all_deals_is_the_direction(kernel) -> None:
    x = draws(4, 3, torch.float64)
    scores = draws(8, 3, torch.float64)[4:]
    pairings = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]]]
    settings = {"bandwidth": 1.5, "temperature": 0.7}
    directions = [group_direction(x, scores, [torch.tensor(p)], kernel, **settings) for p in pairings]
    expected = fe.svgd_direction(x, scores, kernel=kernel, **settings)
    torch.testing.assert_close(torch.stack(directions).mean(0), expected)


def test_kernel_batches_in_the_sampler() -> None:
    x = draws(13, 2)
    one, other, whole = (SVGD(normal, x, seed=4, kernel_batch=m) for m in (5, 5, 13))
    for sampler in (one, other, whole):
        sampler.run(20, progress=False)
    assert torch.equal(one.particles, other.particles)
    different = SVGD(normal, x, seed=5, kernel_batch=5)
    different.run(20, progress=False)
    assert not torch.equal(one.particles, different.particles)
    full = SVGD(normal, x)
    full.run(20, progress=False)
    assert torch.equal(whole.particles, full.particles)
    # The median of the groups' own pairs stands for the median of all pairs.
    x = draws(400, 2)
    sampler = SVGD(normal, x, seed=4, kernel_batch=40)
    sampler.step()
    pairs = fe.pairwise_sq_dist_median(x, include_diagonal=False) / math.log(401)
    assert float(sampler.bandwidth) == pytest.approx(float(pairs), rel=0.1)


def test_independent_noise_is_langevin_dynamics_beside_svgd() -> None:
    x, lr, rate = draws(7, 3), 0.01, 2.5
    sampler = SVGD(
        normal, x, optimizer="sgd", lr=lr, noise="independent", noise_rate=rate, seed=9, temperature=0.8
    )
    sampler.step()
    xi = fe.random.normal((7, 3), seed=9, stream=0, step=1, purpose=0)
    expected = plain(x, lr, temperature=0.8) - lr * rate * x + math.sqrt(2 * lr * 0.8 * rate) * xi
    torch.testing.assert_close(sampler.particles, expected)


@pytest.mark.parametrize("name", RADIAL)
def test_kernel_noise_has_the_kernel_matrix_as_its_covariance(name: str) -> None:
    """Over 20,000 dimensions, each a draw of its own; 5 standard errors."""
    kernel, d, lr, rate, h = KERNELS[name], 20_000, 0.01, 0.05, 4.0e4
    x = draws(5, d)
    sampler = SVGD(
        None, x, scores=torch.zeros_like, kernel=kernel, bandwidth=h, temperature=1.0,
        optimizer="sgd", lr=lr, noise="kernel", noise_rate=rate, seed=2,
    )  # fmt: skip
    sampler.step()
    drift = lr * fe.svgd_direction(x, torch.zeros_like(x), kernel=kernel, bandwidth=h)
    kick = (sampler.particles - x - drift).double()
    u = torch.cdist(x.double(), x.double()).square() / h
    covariance = 2 * lr * (profile(name, u) / 5 + rate * torch.eye(5))
    error = (covariance.square() + covariance.diagonal().outer(covariance.diagonal())).div(d).sqrt()
    measured = kick @ kick.T / d
    assert ((measured - covariance).abs() < 5 * error).all()
    off = ~torch.eye(5, dtype=torch.bool)
    assert ((covariance / error)[off] > 20).all()  # independent noise would be seen


def test_kernel_noise_leaves_the_target_invariant() -> None:
    """Four particles of N(0, I_32): SVGD alone stands still at a variance of .08, with its noise they have 1.

    The means of 12 stretches of 100 steps tell the standard error. Euler's own error is lr / 2 times an eigenvalue of
    K / n, whose mean is 1/4: .0125.
    """
    x = draws(4, 32, torch.float64)
    alone = SVGD(normal, x, optimizer="sgd", lr=1.0, bandwidth=32.0)
    alone.run(200, progress=False, every=0)
    collapsed = float(alone.particles.square().mean())
    sampler = SVGD(normal, x, optimizer="sgd", lr=0.1, bandwidth=32.0, noise="kernel", seed=1)
    values: list[float] = []
    sampler.run(
        1200, progress=False, every=0, callback=lambda s: values.append(float(s.particles.square().mean()))
    )
    means = torch.tensor(values).view(12, 100).mean(1)
    error = float(means.std() / math.sqrt(12))
    assert error < 0.04
    assert abs(float(means.mean()) - 1) < 5 * error + 0.025
    assert abs(collapsed - 1) > 20 * error


def test_noise_at_zero_temperature_is_none() -> None:
    x = draws(4, 2)
    sampler = SVGD(normal, x, optimizer="sgd", temperature=0.0, noise="independent", seed=1)
    sampler.step()
    torch.testing.assert_close(sampler.particles, plain(x, 0.1, temperature=0.0) - 0.1 * x)


def test_noise_notices_that_the_optimizer_was_changed() -> None:
    sampler = SVGD(normal, draws(4, 2), optimizer="sgd", noise="kernel", seed=1)
    sampler.optimizer.param_groups[0]["momentum"] = 0.9
    before = sampler.state_dict()
    with pytest.raises(ValueError, match="optimizer must be plain descent"):
        sampler.step()
    assert same(sampler.state_dict(), before)
