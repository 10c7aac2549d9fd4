"""Annealed importance sampling beside Gaussians, quadrature and closed forms of its weights."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Chi2,
    Dirichlet,
    Exponential,
    Gamma,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Uniform,
)

import fekernels as fe
from fekernels.anneal import importance_sampling, reverse_importance_sampling

D = 5
MEAN = torch.arange(D, dtype=torch.float64) / 2
STD = torch.linspace(0.2, 1.5, D, dtype=torch.float64)
BASE = Normal(torch.zeros(D, dtype=torch.float64), 2.0)
LOG_Z = float(STD.log().sum()) + D / 2 * math.log(2 * math.pi)


def gaussian(x: Tensor) -> Tensor:
    return -((x - MEAN.to(x)) / STD.to(x)).square().sum(1) / 2


def draws(n: int, seed: int) -> Tensor:
    return MEAN + STD * fe.random.normal((n, D), seed=seed).double()


def resample(x: Tensor, log_density: Any, *, beta: float, seed: int, step: int) -> Tensor:
    """Independent draws of N(0, 2)^(1-b) N(MEAN, STD)^b, which is a Gaussian: the best kernel there is."""
    precision = (1 - beta) / 4 + beta / STD**2
    noise = fe.random.normal(x.shape, seed=seed, step=step, stream=7).double()
    return beta * MEAN / STD**2 / precision + noise / precision.sqrt()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transition": "mala", "moves": 2},
        {"transition": resample},
        {"step_size": 0.15, "leapfrog_steps": 8},
    ],
)
def test_log_z_of_a_gaussian(options: dict[str, Any]) -> None:
    """Within 4 standard errors, forward, in reverse and from both; which are small."""
    forward = importance_sampling(gaussian, BASE, betas=150, particles=500, seed=3, **options)
    reverse = reverse_importance_sampling(gaussian, BASE, draws(500, 4), betas=150, seed=3, **options)
    both, error = fe.anneal.bennett_acceptance_ratio(forward, reverse)
    for found, se in (
        (forward.log_z, forward.standard_error),
        (reverse.log_z, reverse.standard_error),
        (both, error),
    ):
        assert abs(found - LOG_Z) < 4 * se < 0.25
    assert error < forward.standard_error and float(forward) == forward.log_z
    assert forward.samples.shape == (500, D) and forward.betas.shape == (151,)
    assert (forward.acceptance is None) == (options.get("transition") is resample)
    w = forward.log_weights.softmax(0)[:, None]
    found = ((w * forward.samples).sum(0) - MEAN) / STD
    assert float(found.abs().max()) < 5 / math.sqrt(forward.effective_sample_size)


@pytest.mark.parametrize("transition", ["mala", "hmc"])
def test_weights_are_unbiased_however_few_the_betas(transition: str) -> None:
    """Jarzynski: E[exp(-W)] = Z1/Z0, where the mean work is nats away from it; both ways."""
    options: dict[str, Any] = {"betas": 5, "transition": transition, "seed": 5}
    target = lambda x: -x.square().sum(1)  # noqa: E731
    exact = math.log(math.pi)
    base = Normal(torch.zeros(2, dtype=torch.float64), 1.2)
    forward = importance_sampling(target, base, particles=100_000, **options)
    samples = fe.random.normal((100_000, 2), seed=1).double() * math.sqrt(0.5)
    reverse = reverse_importance_sampling(target, base, samples, **options)
    for found in (forward, reverse):
        assert abs(found.log_z - exact) < 5 * found.standard_error < 0.05
        assert found.dissipated_work > 5 * found.standard_error
    assert -float(forward.work.mean()) < exact < float(reverse.work.mean())


@pytest.mark.parametrize(("leapfrog_steps", "beta", "size"), [(1, 1.0, 0.5), (5, 1.0, 0.6), (3, 0.4, 0.8)])
def test_a_trajectory_leaves_the_density_as_it_is(leapfrog_steps: int, beta: float, size: float) -> None:
    """A quartic, from exact draws of it; without Metropolis' rule its variance is 20 standard errors off."""
    n = 100_000
    wide = fe.random.uniform((8 * n, 1), seed=1).double() * 5 - 2.5
    height = fe.random.uniform((8 * n,), seed=2).double()
    log_p = lambda x: -(x[:, 0] ** 4)  # noqa: E731
    base = Uniform(torch.tensor([-3.0], dtype=torch.float64), 3.0)
    x = wide[height < (beta * log_p(wide)).exp()][:n]
    before = x.square().mean()
    path = fe.anneal.GeometricPath(log_p, base, leapfrog_steps=leapfrog_steps)
    path.base.log_prob = lambda x: torch.zeros(
        len(x), dtype=x.dtype
    )  # of all the line: slopes beyond it are 0 too
    one = torch.ones(1, 1, dtype=torch.float64)
    path.scales = torch.ones(1, dtype=torch.float64), torch.tensor([size], dtype=torch.float64), one
    for step in range(1, 7):
        x = path.move(x, beta, seed=3, step=step)
    assert path.acceptance is not None and 0.5 < path.acceptance < 0.99
    exact = math.gamma(3 / 4) / math.gamma(1 / 4) / math.sqrt(beta)
    assert abs(float(before) - exact) < 0.01
    assert abs(float(x.square().mean()) - exact) < 5 * float(x.square().std()) / math.sqrt(n)


def test_the_documents_landscape_beside_quadrature() -> None:
    """Two wells; (a^2 + b^2 - 2)^2 + (a + b)^2 / 10 at T = .1."""

    def log_prob(x: Tensor) -> Tensor:
        a, b = x.unbind(1)
        return -10 * ((a**2 + b**2 - 2) ** 2 + (a + b) ** 2 / 10)

    side = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    exact = float(torch.logsumexp(log_prob(torch.cartesian_prod(side, side)), 0)) + 2 * math.log(6 / 1200)
    for dtype in (torch.float32, torch.float64):
        found = importance_sampling(
            log_prob, Normal(torch.zeros(2, dtype=dtype), 1.5), betas=200, transition="mala", seed=2
        )
        assert abs(found.log_z - exact) < 4 * found.standard_error < 0.2
        assert found.samples.dtype == dtype and found.log_weights.dtype == torch.float64


class Shifted:
    """A base that is not normalised, and knows by how much."""

    log_z = 3.0

    def sample(self, n: int, *, seed: int) -> Tensor:
        return 2 * fe.random.normal((n, D), seed=seed).double()

    def log_prob(self, x: Tensor) -> Tensor:
        return BASE.log_prob(x).sum(1) + 3


@pytest.mark.parametrize(
    "base",
    [
        Independent(BASE, 1),
        MultivariateNormal(torch.zeros(D, dtype=torch.float64), 4 * torch.eye(D, dtype=torch.float64) + 0.5),
        Uniform(torch.full((D,), -8.0, dtype=torch.float64), 8.0),
        Shifted(),
    ],
    ids=["Independent", "MultivariateNormal", "Uniform", "object"],
)
def test_bases(base: Any) -> None:
    state = torch.random.get_rng_state()
    found = importance_sampling(gaussian, base, betas=200, particles=400, transition="mala", seed=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(found.log_z - LOG_Z) < 4 * found.standard_error < 0.5
    again = importance_sampling(gaussian, base, betas=200, particles=400, transition="mala", seed=6)
    assert torch.equal(again.log_weights, found.log_weights)


@pytest.mark.filterwarnings("ignore:importance_sampling. the weights are worth")
def test_draws_are_named_by_their_seed_on_every_backend() -> None:
    first = importance_sampling(
        gaussian, BASE, betas=10, particles=50, seed=1, step_size=0.2, leapfrog_steps=2
    )
    with fe.use_backend("reference"):
        again = importance_sampling(
            gaussian, BASE, betas=10, particles=50, seed=1, step_size=0.2, leapfrog_steps=2
        )
    assert torch.equal(again.samples, first.samples)
    more = importance_sampling(
        gaussian, BASE, betas=10, particles=80, seed=1, step_size=0.2, leapfrog_steps=2
    )
    assert torch.equal(more.samples[:50], first.samples)  # a particle does not depend on how many there are
    other = importance_sampling(
        gaussian, BASE, betas=10, particles=50, seed=2, step_size=0.2, leapfrog_steps=2
    )
    assert not torch.equal(other.samples, first.samples)


def test_few_effective_particles_are_warned_of_where_they_were_asked_for() -> None:
    far = lambda x: -50 * (x - 3).square().sum(1)  # noqa: E731
    with pytest.warns(
        UserWarning, match=r"weights are worth \d\.\d of 300 particles: log_z is too low"
    ) as warned:
        found = importance_sampling(far, BASE, betas=2, particles=300, seed=1)
    assert found.effective_sample_size < 10 and warned[0].filename == __file__


def half_gaussian(x: Tensor) -> Tensor:
    return torch.where((x > 0).all(1), -x.square().sum(1) / 2, -torch.inf)


def round_gaussian(x: Tensor) -> Tensor:
    return -x.square().sum(1) / 2


class Box:
    """An object that knows its bounds in log_prob alone."""

    def sample(self, n: int, *, seed: int) -> Tensor:
        return 2 * fe.random.uniform((n, 2), seed=seed).double() - 1

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.where((x.abs() <= 1).all(1), -math.log(4), -torch.inf)


TWO = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("base", "inside"),
    [
        (Uniform(-0.5 * TWO, 0.5), math.erf(0.5 / 2**0.5) ** 2),
        (Uniform(-2 * TWO, 2.0), math.erf(2 / 2**0.5) ** 2),
        (Exponential(TWO), 0.25),
        (Box(), math.erf(1 / 2**0.5) ** 2),
    ],
    ids=["a quarter", "most", "half-lines", "object"],
)
def test_a_base_that_does_not_cover_the_target_is_warned_of(base: Any, inside: float) -> None:
    with pytest.warns(UserWarning) as warned:
        found = importance_sampling(round_gaussian, base, betas=60, particles=500, seed=1)
    assert len(warned) == 1 and warned[0].filename == __file__
    told = re.search(
        r"(\d+) of 500 samples, \S+ of their weight, lie outside of the base's", str(warned[0].message)
    )
    assert told
    far = found.samples <= 0 if isinstance(base, Exponential) else found.samples.abs() > edge(base)
    assert int(told[1]) == int(far.any(1).sum())
    # What is estimated is the target within the base; what is said to be missing is missing.
    assert abs(found.log_z - math.log(2 * math.pi * inside)) < 5 * found.standard_error
    least = float(re.findall(r"too low by (\S+) or more", str(warned[0].message))[0])
    assert found.standard_error < least < -math.log(inside)


def edge(base: Any) -> float:
    return float(base.high[0]) if isinstance(base, Uniform) else 1.0


@pytest.mark.parametrize("seed", range(3))
def test_bases_that_cover_the_target_are_not_warned_of(seed: int) -> None:
    samples = fe.random.normal((300, 2), seed=seed).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target, base in (
            (round_gaussian, Uniform(-6 * TWO, 6.0)),
            (half_gaussian, Exponential(TWO)),
            (half_gaussian, Normal(0 * TWO, 2.0)),
        ):
            importance_sampling(target, base, betas=60, particles=300, seed=seed)
        # Those of its samples that lie outside of the base weigh nothing in reverse, and all is there.
        found = reverse_importance_sampling(round_gaussian, Uniform(-TWO, 1.0), samples, betas=60, seed=seed)
    assert abs(found.log_z - math.log(2 * math.pi)) < 5 * found.standard_error


def test_moves_that_are_not_taken_are_warned_of_and_printed() -> None:
    with pytest.warns(
        UserWarning, match="of the proposals 0 were taken, .* take a smaller step_size"
    ) as warned:
        found = importance_sampling(gaussian, BASE, betas=20, particles=2000, step_size=1e3, seed=0)
    assert warned[-1].filename == __file__
    assert found.acceptance == 0 and "20 steps, 0 of the proposals taken" in repr(found)
    path = fe.anneal.GeometricPath(gaussian, BASE, transition=resample)
    assert "proposals" not in repr(fe.anneal.along_path(path, betas=20, seed=0))


def test_moves_by_gradients_over_a_discrete_base_are_warned_of() -> None:
    fair = torch.distributions.Bernoulli(torch.full((3,), 0.5).double())
    flat = lambda x: x.sum(1)  # noqa: E731
    with pytest.warns(
        UserWarning, match="no move by gradients stays in; give a transition that stays in the base's"
    ):
        importance_sampling(flat, fair, betas=20, seed=0)
    with pytest.warns(
        UserWarning, match=r"of the proposals 0\.00.* give a transition that stays in the base's"
    ):
        importance_sampling(flat, fair, betas=200, step_size=1.0, seed=0)


def test_a_temperature_schedule_drives_the_betas() -> None:
    optimizer = fe.LangevinAdam(
        [torch.nn.Parameter(torch.zeros(1))], temperature=20.0, prior_precision=1.0, seed=0
    )
    schedule = fe.optim.CosineTemperature(optimizer, T_max=99, eta_min=1.0)
    betas = fe.anneal.betas_from_temperature(schedule, 100)
    assert betas[0] == 0 and betas[-1] == 1 and len(betas) == 101 and bool((betas.diff() >= 0).all())
    assert float(betas[1]) == pytest.approx(1 / 20) and schedule.last_epoch == 0
    assert float(betas[51]) == pytest.approx(1 / float(schedule.get_temperature(50)[0]))
    found = importance_sampling(gaussian, BASE, betas=betas, particles=400, seed=3)
    assert abs(found.log_z - LOG_Z) < 4 * found.standard_error < 0.5
    by_hand = fe.anneal.betas_from_temperature(lambda k: 4.0 - k, 3)
    assert by_hand.tolist() == pytest.approx([0, 0.5, 2 / 3, 1])


def test_sigmoid_betas() -> None:
    betas = fe.anneal.sigmoid_betas(10)
    x = [1 / (1 + math.exp(-4 * (2 * k / 10 - 1))) for k in range(11)]
    assert betas.tolist() == pytest.approx([(each - x[0]) / (x[-1] - x[0]) for each in x])


X = torch.zeros(3, D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: importance_sampling(3, BASE), TypeError, "log_prob must be callable; got int"),
        (lambda: importance_sampling(gaussian, 3), TypeError, "base must be a torch.distributions.Distribution or"),
        (lambda: importance_sampling(gaussian, Normal(0.0, 1.0)), ValueError, r"over vectors \(d,\).*; got shape \(\)"),
        (lambda: importance_sampling(lambda x: x, BASE), ValueError, r"here \(200, 5\) to \(200,\); got \(200, 5\)"),
        (lambda: importance_sampling(gaussian, BASE, particles=0), ValueError, r"particles must be in \[1"),
        (lambda: importance_sampling(gaussian, BASE, betas=0), ValueError, r"betas must be in \[1"),
        (lambda: importance_sampling(gaussian, BASE, betas=[0, 0.7, 0.3, 1]), ValueError, "1, falling in between"),
        (lambda: importance_sampling(gaussian, BASE, betas=[0.1, 1]), ValueError, "rise from 0 to 1; got 0.1 to 1"),
        (lambda: importance_sampling(gaussian, BASE, transition="gibbs"), ValueError, "must be one of hmc, mala; got"),
        (lambda: importance_sampling(gaussian, BASE, step_size=0), ValueError, "step_size must be finite and > 0"),
        (lambda: importance_sampling(gaussian, BASE, progress=1), TypeError, "progress must be a bool; got int"),
        (lambda: importance_sampling(lambda x: x.sum(1) * math.nan, BASE, betas=3), ValueError, "weight of particle 0"),
        (lambda: reverse_importance_sampling(gaussian, BASE, X[0]), ValueError, r"samples must have shape \(n, d\)"),
        (lambda: reverse_importance_sampling(gaussian, BASE, X.float()), ValueError, "got float32 \\(3, 5\\)"),
        (lambda: importance_sampling(gaussian, BASE, transition=lambda x, p, **_: x[:1]), ValueError, "transition"),
        (lambda: fe.anneal.along_path(3), TypeError, "path must be a fe.anneal.Path; got int"),
        (lambda: fe.anneal.betas_from_temperature(lambda k: k + 1, 3), ValueError, "temperature of step 1 must"),
        (lambda: fe.anneal.betas_from_temperature(lambda k: 0, 3), ValueError, "temperature of step 0 must be"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


POSITIVE = torch.ones(2, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:importance_sampling. the weights are worth")
@pytest.mark.filterwarnings(
    "ignore:importance_sampling. .* samples, .* lie outside"
)  # all the plane is the target's
@pytest.mark.parametrize("transition", ["hmc", "mala"])
@pytest.mark.parametrize(
    "base",
    [
        LogNormal(0 * POSITIVE, 1.0),
        MixtureSameFamily(
            Categorical(POSITIVE), Independent(Gamma(torch.tensor([[2.0, 3.0], [4.0, 2.0]]).double(), 1.0), 1)
        ),
        Exponential(POSITIVE),
        Chi2(3 * POSITIVE),
        Beta(2 * POSITIVE, 3.0),
        Dirichlet(torch.ones(3, dtype=torch.float64)),
    ],
    ids=lambda base: type(base).__name__,
)
def test_proposals_outside_of_the_base_are_not_taken(base: Any, transition: str) -> None:
    """The target is the base times 3, but knows no bounds: log Z is log 3 where none goes outside."""
    whole = base if base.event_shape else Independent(base, 1)

    def target(x: Tensor) -> Tensor:
        inside = whole.support.check(x)
        known = whole.log_prob(torch.where(inside[:, None], x, whole.mean))
        return torch.where(inside, known, 0) + math.log(3)

    found = importance_sampling(target, base, betas=20, particles=100, transition=transition, seed=2)
    assert found.log_z == pytest.approx(math.log(3), abs=1e-9)
    assert found.acceptance is not None and (found.acceptance > 0.5 or isinstance(base, Dirichlet))
