"""fe.SVGD: steps, optimizers, targets, runs, checkpoints."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch

import fekernels as fe
from fekernels.stein.svgd import SVGD
from tests.support.svgd import draws, normal, one_normal, plain, same


def test_a_step_of_descent_is_the_direction() -> None:
    x = draws(20, 3)
    given = x.clone()
    for settings in ({}, {"bandwidth": 0.7}, {"kernel": fe.kernels.IMQ(-0.3, 2.0)}, {"temperature": 0.5}):
        sampler = SVGD(normal, x, optimizer="sgd", lr=0.3, **settings)
        sampler.step()
        sampler.step()
        torch.testing.assert_close(sampler.particles, plain(x, 0.3, 2, **settings))
        assert sampler.iteration == 2
    assert torch.equal(x, given)  # the sampler works on a copy
    assert sampler.particles.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = draws(20, 3, dtype)
    sampler = SVGD(normal, x, optimizer="sgd", lr=1.0, bandwidth=1.0)
    sampler.step()
    assert sampler.particles.dtype == dtype
    wide = plain(x.double(), 1.0, bandwidth=1.0)
    bound = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(sampler.particles.double(), wide, rtol=bound, atol=bound)


def test_one_particle_climbs_the_density() -> None:
    sampler = SVGD(normal, torch.tensor([[1.0, 2.0]]), optimizer="sgd", lr=0.5)
    sampler.step()
    torch.testing.assert_close(sampler.particles, torch.tensor([[0.5, 1.0]]))


@pytest.mark.parametrize(
    ("optimizer", "lr", "same"),
    [
        (None, None, lambda p: torch.optim.Adam(p, lr=0.1)),
        ("adam", None, lambda p: torch.optim.Adam(p, lr=0.1)),
        ("adagrad", 0.02, lambda p: torch.optim.Adagrad(p, lr=0.02)),
        ("sgd", None, lambda p: torch.optim.SGD(p, lr=0.1)),
        (torch.optim.RMSprop, None, lambda p: torch.optim.RMSprop(p)),
        (torch.optim.SGD, 0.4, lambda p: torch.optim.SGD(p, lr=0.4)),
        (lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9), None, None),
        (lambda p: torch.optim.SGD([p], lr=0.2, momentum=0.9), None, None),
        (functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9), None, None),
        (functools.partial(fe.LangevinAdam, lr=0.1, seed=0), None, lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
)
def test_optimizers(optimizer, lr, same) -> None:
    x = draws(12, 2)
    sampler = SVGD(normal, x, optimizer=optimizer, lr=lr, bandwidth=1.0)
    expected = x.clone()
    other = (same or (lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9)))([expected])
    for _ in range(3):
        sampler.step()
        expected.grad = -fe.svgd_direction(expected, -expected, bandwidth=1.0)
        other.step()
    torch.testing.assert_close(sampler.particles, expected)
    assert not torch.equal(expected, x)


def test_a_learning_rate_scheduler() -> None:
    sampler = SVGD(normal, draws(5, 2), optimizer="sgd", lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(sampler.optimizer, 1, gamma=0.5)
    sampler.run(3, progress=False, callback=lambda s: scheduler.step())
    assert sampler.optimizer.param_groups[0]["lr"] == 0.125


def test_whether_a_density_is_batched_is_found_out() -> None:
    x = draws(6, 3)
    cases = {
        "batched": (normal, True),
        "a distribution": (
            torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob,
            True,
        ),
        "one particle": (one_normal, False),
        "one particle, a sum": (lambda x: -(x**2).sum() / 2, False),
        "one particle by its coordinates": (lambda x: -(x[0] ** 2 + x[1] ** 2 + x[2] ** 2) / 2, False),
    }
    expected = plain(x, 0.1)
    for name, (log_prob, batched) in cases.items():
        sampler = SVGD(log_prob, x, optimizer="sgd")
        sampler.step()
        assert sampler._target.batched is batched, name
        torch.testing.assert_close(sampler.particles, expected, msg=name)
        told = SVGD(log_prob, x, optimizer="sgd", batched=batched)
        told.step()
        assert torch.equal(told.particles, sampler.particles), name
        assert sampler.log_prob.shape == (6,)


def test_as_many_particles_as_dimensions_are_not_mistaken() -> None:
    """[n] numbers come back, and each depends on all particles: that is a density of one, whatever the shape says."""
    x, widths = draws(3, 3), torch.tensor([1.0, 2.0, 3.0])
    sampler = SVGD(lambda x: -(x[0] ** 2 + x[1] ** 2 / 2 + x[2] ** 2 / 3) / 2, x, optimizer="sgd")
    sampler.step()
    torch.testing.assert_close(sampler.particles, x + 0.1 * fe.svgd_direction(x, -x / widths))


def test_scores_in_place_of_a_density() -> None:
    x = draws(8, 2)
    sampler = SVGD(None, x, scores=lambda x: -x.double(), optimizer="sgd")
    result = sampler.run(2, progress=False)
    torch.testing.assert_close(sampler.particles, plain(x, 0.1, 2))
    assert sampler.log_prob is None and result.log_prob.isnan().all()


def test_minibatches_reach_a_density_that_is_called_once_a_step() -> None:
    calls: list[float] = []

    def log_prob(x: torch.Tensor, scale: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        calls.append(float(scale))
        return normal(x - shift) * scale

    x = draws(8, 2)
    sampler = SVGD(log_prob, x, optimizer="sgd")
    data = [torch.tensor(1.0), (torch.tensor(2.0), 1.0)]  # an item that is a tuple is unpacked
    sampler.run(3, batches=data, progress=False)
    assert calls == [1, 2, 1]
    expected = x
    for scale, shift in ((1, 0), (2, 1), (1, 0)):
        expected = expected + 0.1 * fe.svgd_direction(expected, scale * (shift - expected))
    torch.testing.assert_close(sampler.particles, expected)


def test_a_vmapped_density_is_called_once_a_step_too() -> None:
    calls = 0

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return one_normal(x)

    sampler = SVGD(log_prob, draws(8, 2), batched=False)
    sampler.run(3, progress=False)
    assert calls == 3


def test_a_density_that_switches_gradients_off_says_so() -> None:
    @torch.no_grad()
    def log_prob(x: torch.Tensor) -> torch.Tensor:
        return normal(x)

    with pytest.raises(ValueError, match="log_prob must depend on the particles"):
        SVGD(log_prob, draws(4, 2)).step()
    with torch.no_grad():  # a caller's own no_grad is no obstacle
        SVGD(normal, draws(4, 2)).step()


def test_what_a_run_returns(capsys: pytest.CaptureFixture[str]) -> None:
    x = draws(20, 2)
    seen = []
    sampler = SVGD(normal, x, optimizer="sgd", lr=1.0)
    result = sampler.run(8, every=3, callback=lambda s: seen.append(s.particles.clone()))
    assert "8/8" in capsys.readouterr().err
    states = [x, *seen]
    assert result.steps.tolist() == [0, 3, 6, 7]
    for i, step in enumerate(result.steps.tolist()):
        entering = states[step]
        squared = fe.kernel_stein_discrepancy(entering, -entering, statistic="v")
        assert float(result.discrepancy[i]) == pytest.approx(float(squared), rel=1e-6)
        assert float(result.bandwidth[i]) == pytest.approx(float(fe.median_bandwidth(entering)), rel=1e-6)
        assert float(result.log_prob[i]) == pytest.approx(float(normal(entering).mean()), rel=1e-6)
    assert torch.equal(result.particles, sampler.particles) and result.particles is not sampler.particles
    assert result.discrepancy[-1] < result.discrepancy[0] and "20, 2" in repr(result)
    more = sampler.run(5, progress=False)
    assert more.steps.tolist() == [8, 9, 10, 11, 12] and sampler.iteration == 13
    assert capsys.readouterr().err == ""
    assert len(sampler.run(3, progress=False, every=0).discrepancy) == 0
    assert len(sampler.run(0, progress=False).discrepancy) == 0 and sampler.iteration == 16
    assert "iteration=16" in repr(sampler)


def test_the_kernel_of_the_trace() -> None:
    x = draws(20, 2)
    laplace = SVGD(normal, x, kernel="laplace").run(1, progress=False)
    squared = fe.kernel_stein_discrepancy(x, -x, kernel="imq", statistic="v")
    assert float(laplace.discrepancy) == pytest.approx(float(squared), rel=1e-6)
    chosen = SVGD(normal, x, bandwidth=3.0).run(1, progress=False, discrepancy=fe.kernels.IMQ(c=2.0))
    squared = fe.kernel_stein_discrepancy(x, -x, kernel=fe.kernels.IMQ(c=2.0), bandwidth=3.0, statistic="v")
    assert float(chosen.discrepancy) == pytest.approx(float(squared), rel=1e-6)


def test_the_seed_decides() -> None:
    x = draws(10, 2)

    def path(seed: int | None) -> torch.Tensor:
        sampler = SVGD(normal, x, optimizer="sgd", noise="kernel", seed=seed)
        sampler.run(3, progress=False)
        return sampler.particles

    assert torch.equal(path(1), path(1)) and not torch.equal(path(1), path(2))
    torch.manual_seed(5)
    drawn = path(None)
    assert not torch.equal(drawn, path(None))
    torch.manual_seed(5)
    assert torch.equal(drawn, path(None))


SETTINGS = {
    "adam": {},
    "groups": {"kernel_batch": 3, "optimizer": "adagrad", "anneal": "cyclical", "anneal_steps": 9},
    "noise": {"optimizer": "sgd", "noise": "kernel", "noise_rate": 0.1, "bandwidth": lambda step: 1 + step},
    "momentum": {"optimizer": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), "kernel": "imq"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_goes_on_along_the_same_path(name: str, tmp_path) -> None:
    def make(seed: int) -> SVGD:
        return SVGD(normal, draws(10, 2) + seed, seed=seed, **SETTINGS[name])

    one = make(1)
    one.run(7, progress=False)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    held = one.state_dict()
    one.run(6, progress=False)
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), held):
        other = make(2)  # other particles and another seed, both replaced
        other.run(2, progress=False)
        other.load_state_dict(state)
        assert other.iteration == 7 and other.seed == 1
        other.run(6, progress=False)
        assert torch.equal(one.particles, other.particles)
        assert same(one.state_dict(), other.state_dict())


def test_states_that_do_not_fit() -> None:
    sampler = SVGD(normal, draws(10, 2), seed=1)
    sampler.run(2, progress=False)
    before, state = sampler.state_dict(), sampler.state_dict()
    wrong = [
        (TypeError, "state must be a dict; got int", 3),
        (ValueError, "state must hold 'seed'", {k: v for k, v in state.items() if k != "seed"}),
        (ValueError, r"shape \(10, 2\); got torch.float32 of \(9, 2\)", {**state, "particles": draws(9, 2)}),
        (
            ValueError,
            "must be torch.float32.*got torch.float64",
            {**state, "particles": draws(10, 2).double()},
        ),
        (ValueError, "iteration must be in .*; got -1", {**state, "iteration": -1}),
        (TypeError, "seed must be an int; got str", {**state, "seed": "one"}),
        (TypeError, "optimizer must be a dict; got int", {**state, "optimizer": 3}),
        (ValueError, "parameter group", {**state, "optimizer": {**state["optimizer"], "param_groups": []}}),
        (ValueError, r"target must hold \[\]; got \['mean'\]", {**state, "target": {"mean": draws(1, 1)}}),
    ]
    for error, message, bad in wrong:
        with pytest.raises(error, match=message):
            sampler.load_state_dict(bad)
        assert same(sampler.state_dict(), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_their_own_way(copied) -> None:
    one = SVGD(normal, draws(10, 2), seed=1, kernel_batch=4)
    one.run(3, progress=False)
    other = copied(one)
    before = one.particles.clone()
    other.run(4, progress=False)
    assert torch.equal(one.particles, before)
    assert other.optimizer.param_groups[0]["params"][0] is other.particles
    one.run(4, progress=False)
    assert torch.equal(one.particles, other.particles) and same(one.state_dict(), other.state_dict())
