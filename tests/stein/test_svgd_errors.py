"""fe.SVGD refuses what makes no sense, and a step that fails changes nothing."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import fekernels as fe
from fekernels.stein.svgd import SVGD
from tests.support.svgd import draws, normal, same


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"log_prob": lambda x: x}, ValueError, r"log_prob must map \[n, d\] to \[n\]"),
        (
            {"log_prob": lambda x: x.sum(1, keepdim=True), "batched": True},
            ValueError,
            r"shape \(4,\).*got \(4, 1\)",
        ),
        ({"log_prob": lambda x: 0.0, "batched": True}, TypeError, "must return a tensor; got float"),
        ({"log_prob": None, "scores": lambda x: x[:2]}, ValueError, r"shape \(4, 2\).*got \(2, 2\)"),
        ({"log_prob": None, "scores": lambda x: x.int()}, TypeError, "floating-point.*got torch.int32"),
        ({"log_prob": None, "scores": lambda x: 0}, TypeError, "must return a tensor; got int"),
        ({"anneal": lambda k: -1.0}, ValueError, "anneal must be finite and >= 0; got -1"),
        ({"bandwidth": lambda k: math.nan}, ValueError, "bandwidth must be >= 0; got nan"),
        ({"bandwidth": lambda k: "mean"}, ValueError, "bandwidth must be .*'median'.*got 'mean'"),
        ({"log_prob": lambda x: normal(x) / 0}, ValueError, "scores must be finite"),
    ],
)
def test_a_step_that_fails_changes_nothing(settings, error, message) -> None:
    sampler = SVGD(**{"log_prob": normal, "particles": draws(4, 2), "seed": 0, **settings})
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.step()
    assert same(sampler.state_dict(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite(bad: float) -> None:
    """It names step and particle; everything is as before that step, and the sampler can go on."""
    poison = False

    def scores(x: torch.Tensor) -> torch.Tensor:
        s = -x
        if poison:
            s[4, 1] = s[6, 0] = bad
        return s

    def sampler() -> SVGD:
        return SVGD(None, draws(8, 2), scores=scores, seed=3, kernel_batch=4)

    one, other = sampler(), sampler()
    one.run(5, progress=False)
    other.run(5, progress=False)
    before = one.state_dict()
    poison = True
    with pytest.raises(ValueError, match=rf"got {bad} for particle 4 at step 6\b"):
        one.run(3, progress=False)
    assert same(one.state_dict(), before) and one.particles.grad is None
    poison = False
    one.step()
    other.step()
    assert torch.equal(one.particles, other.particles)


@pytest.mark.parametrize(
    "log_prob", [lambda x: x.log().sum(-1) - x.sum(-1), lambda x: x.log() @ torch.ones(2)]
)
def test_a_density_with_a_particle_outside_its_support(log_prob) -> None:
    """The score of a Gamma is finite there, its log-density NaN; of a square root both are NaN."""
    x = draws(6, 2).abs()
    x[3, 0] = -1.0
    sampler = SVGD(log_prob, x)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match="log_prob must be finite; got nan for particle 3 at step 1"):
        sampler.step()
    assert same(sampler.state_dict(), before) and sampler.log_prob is None
    sampler = SVGD(lambda x: x.sqrt().sum(-1) - x.sum(-1), x)
    with pytest.raises(ValueError, match="scores must be finite; got nan for particle 3 at step 1"):
        sampler.step()
    assert sampler._target.batched is True  # 0 / 0 in other rows is not taken for dependence


def test_a_density_that_is_zero_at_a_particle() -> None:
    x = draws(6, 2).abs()
    x[2, 1] = 4.0
    sampler = SVGD(lambda x: torch.where(x < 3, -x, -x - torch.inf).sum(-1), x, seed=0)
    with pytest.raises(ValueError, match="log_prob must be finite; got -inf for particle 2 at step 1"):
        sampler.step()


def by_first(x: torch.Tensor) -> torch.Tensor:
    return normal(x - 0.1 * x[:1])


def by_mean(x: torch.Tensor) -> torch.Tensor:
    return normal(x - x.mean(0)) + normal(x.mean(0))


@pytest.mark.parametrize(("n", "d"), [(50, 2), (3, 3), (2, 5)])
@pytest.mark.parametrize("log_prob", [by_first, by_mean, lambda x: normal(x.cumsum(0))])
def test_a_density_that_couples_particles(log_prob, n: int, d: int) -> None:
    """[n] numbers that depend on more than their own particle are no function of one, though it would run."""
    sampler = SVGD(log_prob, draws(n, d), optimizer="sgd")
    before = sampler.state_dict()
    with pytest.raises(
        ValueError, match="log_prob must give each particle a log-density of its own.*batched=False"
    ):
        sampler.step()
    assert same(sampler.state_dict(), before)
    for batched in (True, False):  # taken at one's word
        SVGD(log_prob if batched else normal, draws(n, d), batched=batched).step()


def partners(step: int, n: int):
    """Particles of one pair are attracted to each other, the further ones go alone."""

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        other = torch.arange(n)
        pairs = n // (2 * step) * 2 * step
        other[:pairs] = torch.arange(pairs).view(-1, 2, step).flip(1).flatten()
        return normal(x - 0.5 * x[other])

    return log_prob


@pytest.mark.parametrize("n", [12, 61])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 6])
def test_pairs_that_lie_apart_by_a_fixed_number(step: int, n: int) -> None:
    """The first of them comes last, so that its own gradient tells nothing."""
    log_prob = partners(step, n)
    state = torch.random.get_rng_state()
    sampler = SVGD(lambda x: log_prob(x.flip(0)).flip(0), draws(n, 2), optimizer="sgd", seed=0)
    drawn = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="log_prob must give each particle a log-density of its own"):
        sampler.step()
    assert torch.equal(torch.random.get_rng_state(), drawn) and len(state) == len(drawn)


def test_random_and_rounded_densities_are_not_taken_for_coupled() -> None:
    """The numbers come from one evaluation, so that dropout, a minibatch or noise of its own change nothing."""
    weight = torch.randn(40, 3)

    def dropout(x: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.dropout(x @ weight.to(x.dtype).mT, 0.5).tanh().square().sum(-1)

    def minibatch(x: torch.Tensor) -> torch.Tensor:
        rows = weight[torch.randperm(40)[:7]].to(x.dtype)
        return -torch.cdist(x, rows).logsumexp(1) + torch.randn(len(x))

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for log_prob in (dropout, minibatch) if dtype != torch.bfloat16 else (dropout,):
            for scale in (1e-6, 1.0, 1e3):
                sampler = SVGD(log_prob, draws(30, 3, dtype) * scale, optimizer="sgd", lr=0.0)
                sampler.step()
                assert sampler._target.batched is True


@pytest.mark.parametrize("settings", [{}, {"noise": "independent", "optimizer": "sgd"}])
def test_equal_particles(settings) -> None:
    """They never part, but by noise."""
    x = torch.ones(5, 2)
    if settings:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = SVGD(normal, x, seed=0, bandwidth=1.0, **settings)
            sampler.run(3, progress=False)
        assert (sampler.particles.std(0) > 0).all()
        return
    with pytest.warns(UserWarning, match="SVGD: particles are all equal"):
        sampler = SVGD(normal, x, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        result = sampler.run(3, progress=False)
        SVGD(normal, x[:1], seed=0).run(3, progress=False)
    assert result.discrepancy.isinf().all() and not sampler.particles.std(0).any()


def test_a_median_of_zero_is_said_once() -> None:
    x = torch.cat([torch.ones(8, 2), draws(2, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = SVGD(normal, x, seed=0)
    with pytest.warns(UserWarning, match="SVGD: the median bandwidth is 0 at step 1") as said:
        result = sampler.run(3, progress=False)
    assert len(said) == 1 and said[0].filename == __file__
    assert result.discrepancy[0] == math.inf


@pytest.mark.parametrize("optimizer", [None, "adam", "adagrad", torch.optim.Adam, torch.optim.RMSprop])
def test_float16_and_an_optimizer_that_divides_by_zero(optimizer) -> None:
    x = draws(6, 2, torch.float16)
    with pytest.raises(
        ValueError, match="SVGD: optimizer must not divide by 0 in float16.*eps=1e-.*got float16"
    ):
        SVGD(normal, x, optimizer=optimizer)
    SVGD(normal, x.bfloat16(), optimizer=optimizer).step()


@pytest.mark.parametrize(
    "optimizer",
    ["sgd", lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-4), lambda p: fe.LangevinAdam(p, lr=0.01)],
)
def test_float16_particles_stay_finite(optimizer) -> None:
    sampler = SVGD(normal, draws(20, 2, torch.float16), optimizer=optimizer, seed=0)
    sampler.run(20, progress=False)
    assert sampler.particles.dtype == torch.float16 and sampler.particles.isfinite().all()


PARTICLES = torch.arange(8.0).view(4, 2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"log_prob": 3}, TypeError, "log_prob must be callable; got int"),
        ({"log_prob": None}, TypeError, "one of log_prob and scores must be given; got neither"),
        ({"scores": normal}, TypeError, "one of log_prob and scores must be given; got both"),
        ({"log_prob": None, "scores": 3}, TypeError, "scores must be callable; got int"),
        ({"log_prob": None, "scores": normal, "batched": True}, ValueError, "batched belongs to log_prob"),
        ({"batched": "yes"}, TypeError, "batched must be None, True or False; got str"),
        ({"particles": [[0.0]]}, TypeError, "particles must be a tensor; got list"),
        ({"particles": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "particles must be .*; got int64"),
        ({"particles": torch.zeros(4)}, ValueError, r"particles must have shape \[n, d\].*got \(4,\)"),
        ({"particles": torch.zeros(0, 2)}, ValueError, r"particles must have shape \[n, d\].*got \(0, 2\)"),
        ({"particles": torch.tensor([[0.0], [math.nan]])}, ValueError, "finite; got nan in particle 1"),
        (
            {"optimizer": "adamw"},
            ValueError,
            r"optimizer must be one of \['adagrad', 'adam', 'sgd'\].*got 'adamw'",
        ),
        (
            {"optimizer": torch.optim.Adam([PARTICLES])},
            TypeError,
            "optimizer must be .*; got an instance of Adam",
        ),
        ({"optimizer": 3}, TypeError, "optimizer must be .*; got int"),
        (
            {"optimizer": lambda p: None},
            TypeError,
            "optimizer must return a torch.optim.Optimizer; got NoneType",
        ),
        (
            {"optimizer": lambda p: torch.optim.Adam([PARTICLES])},
            ValueError,
            r"optimizer must hold the particles.*\[\(4, 2\)\]",
        ),
        (
            {"optimizer": lambda p: torch.optim.Adam(p), "lr": 0.1},
            ValueError,
            "lr belongs to a named optimizer",
        ),
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0; got -1"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got str"),
        ({"kernel": "cosine"}, ValueError, "kernel must be one of rbf, imq, laplace, .*linear.*got 'cosine'"),
        ({"bandwidth": "mean"}, ValueError, "bandwidth must be .*; got 'mean'"),
        ({"bandwidth": -1.0}, ValueError, "bandwidth must be >= 0; got -1"),
        ({"bandwidth": torch.zeros(3)}, TypeError, "bandwidth must be a number; got Tensor"),
        ({"bandwidth_scale": 0.0}, ValueError, "bandwidth_scale must be finite and > 0; got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0; got -1"),
        ({"anneal": "linear"}, ValueError, r"anneal must be .*\['cyclical', 'tanh'\]; got 'linear'"),
        ({"anneal": "tanh"}, ValueError, "anneal_steps must be given"),
        ({"anneal": 0.5}, TypeError, "anneal must be .*; got float"),
        ({"anneal_steps": 3}, ValueError, "anneal_steps belongs to a named schedule"),
        ({"anneal": "tanh", "anneal_steps": 0}, ValueError, "anneal_steps must be in .*; got 0"),
        ({"kernel_batch": 1}, ValueError, "kernel_batch must be in .*; got 1"),
        ({"kernel_batch": 2.0}, TypeError, "kernel_batch must be an int; got float"),
        ({"kernel_batch": 2, "kernel": "linear"}, ValueError, "kernel_batch must have a radial kernel"),
        (
            {"noise": "white"},
            ValueError,
            r"noise must be None or one of \['independent', 'kernel'\]; got 'white'",
        ),
        ({"noise_rate": 1.0}, ValueError, "noise_rate must be None without noise"),
        ({"noise": "kernel"}, ValueError, "optimizer must be plain descent.*got Adam"),
        (
            {"noise": "independent", "optimizer": lambda p: torch.optim.SGD(p, momentum=0.9)},
            ValueError,
            "optimizer must be plain descent.*got SGD",
        ),
        (
            {"noise": "kernel", "optimizer": "sgd", "kernel": "linear"},
            ValueError,
            "must have a radial kernel",
        ),
        ({"noise": "kernel", "optimizer": "sgd", "kernel_batch": 2}, ValueError, "got kernel_batch=2"),
        (
            {"noise": "kernel", "optimizer": "sgd", "noise_rate": -1.0},
            ValueError,
            "noise_rate must be .*got -1",
        ),
        ({"precision": "fp8"}, ValueError, "precision must be one of .*got 'fp8'"),
        ({"seed": 1.0}, TypeError, "seed must be an int; got float"),
    ],
)
def test_bad_settings(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        SVGD(**{"log_prob": normal, "particles": PARTICLES, **settings})
    assert torch.equal(PARTICLES, torch.arange(8.0).view(4, 2))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be in .*; got -1"),
        ({"steps": 2.0}, TypeError, "steps must be an int; got float"),
        ({"every": -1}, ValueError, "every must be in .*; got -1"),
        ({"discrepancy": "laplace"}, ValueError, "kernel must be one of rbf, imq.*, linear; got 'laplace'"),
        ({"batches": 3}, TypeError, "batches must be iterable; got int"),
        ({"batches": []}, ValueError, "batches must hold an item"),
    ],
)
def test_bad_runs(settings, error, message) -> None:
    sampler = SVGD(normal, draws(4, 2), seed=0)
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.run(**{"steps": 2, "progress": False, **settings})
    assert same(sampler.state_dict(), before)
