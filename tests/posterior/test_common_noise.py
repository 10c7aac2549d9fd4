"""Chains that got one noise are told, wherever they began; chains of noise of their own never."""

import warnings

import pytest
import torch

import fekernels as fe
from fekernels.diagnostics.common_noise import Together, moving_together
from fekernels.posterior import run as run_module
from fekernels.posterior import verdict

POINTS = 40
TOLD = r"chains 0 and 1 move together \(correlation (0\.9\d+|1\.0+) of their changes\)"


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(POINTS, 4, generator=generator)
    return x, x[:, :1] + 0.1 * torch.randn(POINTS, 1, generator=generator)


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def course(start, seed, steps=400, every=5):
    """Draws [steps / every, weights] of a chain by itself, as each process of a launch has one."""
    model = network(start)
    optimizer = fe.LangevinAdam(
        model.parameters(), lr=0.02, temperature=1 / POINTS, prior_precision=1 / POINTS, seed=seed
    )
    x, y = data()
    states = []
    for step in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().div(2).backward()
        optimizer.step()
        if step % every == 0:
            states.append({name: p.detach().clone() for name, p in model.state_dict().items()})
    return states


def as_draws(*courses):
    return torch.stack(
        [torch.stack([torch.cat([t.flatten() for t in s.values()]) for s in c]) for c in courses]
    )


@pytest.fixture(scope="module")
def courses():
    """Two with one seed, from different starts, and two with seeds of their own from one start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return course(0, 7), course(1, 7), course(0, 8), course(0, 9)


def collected(*courses):
    samples = fe.PosteriorSamples(network(0), chains=len(courses))
    for states in zip(*courses, strict=True):
        for state in states:
            samples.collect(state)
    return samples


@pytest.mark.parametrize("name", ["split_rhat", "effective_sample_size", "chain_statistics"])
def test_one_noise_is_told_by_the_diagnostics(courses, name):
    function = getattr(fe.diagnostics, name)
    with pytest.warns(UserWarning, match=f"{name}: {TOLD}"):
        function(as_draws(*courses[:2]))
    with pytest.warns(UserWarning, match=r"chains 1 and 2 move together"):
        function(as_draws(courses[2], *courses[:2], courses[3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(as_draws(*courses[1:]))
        function(as_draws(courses[0]))


def test_one_noise_is_told_by_samples(courses):
    samples = collected(*courses[:2])
    with pytest.warns(UserWarning, match=f"PosteriorSamples.diagnostics: {TOLD}"):
        found = samples.diagnostics()
    assert found.together[:2] == (0, 1) and found.together.correlation > 0.9
    assert "seed=rank" in str(found)
    with pytest.warns(UserWarning, match=f"PosteriorSamples.predict: {TOLD}"):
        samples.predict(data()[0], activation=None)
    apart = collected(*courses[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apart.diagnostics().together is None


def test_sample_posterior_does_not_believe_one_noise(monkeypatch):
    monkeypatch.setattr(verdict, "moving_together", lambda draws: Together(0, 1, 0.99))
    monkeypatch.setattr(run_module, "TRAIN_STEPS", 20)
    x, y = data()
    run = fe.sample_posterior(
        network(0), lambda net, b: (net(b[0]) - b[1]).square().mean() / 2, [(x, y)], data_size=POINTS,
        prior_precision=1.0, chains=2, samples=4, burn_in=5, thinning=1, seed=0, progress=False,
    )  # fmt: skip
    assert any("chains 0 and 1 move together" in told for told in run.report.warnings)
    assert not run.report.converged


def walks(seed, chains, draws, weights, memory):
    generator = torch.Generator().manual_seed(seed)
    kicks = torch.randn(chains, draws, weights, generator=generator, dtype=torch.float64)
    x = kicks.clone()
    for t in range(1, draws):
        x[:, t] = memory * x[:, t - 1] + kicks[:, t]
    return x


@pytest.mark.parametrize("memory", [-0.9, 0.0, 0.9, 1.0])
@pytest.mark.parametrize("draws", [4, 8, 30, 200])
@pytest.mark.parametrize("weights", [1, 2, 50])
def test_noise_of_their_own_is_silent(memory, draws, weights):
    """Short, slow and alternating chains; weights that are all one; a descent that all share, short or long."""
    t = torch.arange(draws, dtype=torch.float64)[:, None]
    for seed in range(10):
        x = walks(seed, 4, draws, weights, memory)
        for each in (
            x,
            x[:, :, :1].expand(-1, -1, weights),
            x + 1000 * torch.exp(-t / 10),
            1e-3 * x + 1000 * torch.exp(-t / (4 * draws)),
            x + 100 * torch.sin(t / 3),
        ):
            assert moving_together(each) is None


def test_what_two_of_many_chains_share_is_found():
    x = walks(0, 50, 100, 3, 0.95)
    x[31] = x[17] + torch.tensor([5.0, -3.0, 1.0]) + 1e-3 * x[3]
    assert moving_together(x)[:2] == (17, 31)
    assert moving_together(x.float() * torch.tensor([1.0, 1e-6, 1e6]))[:2] == (17, 31)
    x[:, :, 1] = torch.nan  # and what does not move says nothing
    assert moving_together(x)[:2] == (17, 31)
    assert moving_together(torch.zeros(3, 100, 2)) is None
    half = x[:, :, :1].clone()
    half[31] = half[17] + walks(1, 1, 100, 1, 0.95)[0]  # correlation 0.71
    assert moving_together(half) is None


def test_the_same_few_draws_are_told_only_where_chance_does_not_make_them():
    x = walks(0, 1, 12, 50, 0.5)
    assert moving_together(x.expand(2, -1, -1)) is not None
    assert moving_together(x[:, :, :1].expand(2, -1, -1)) is None
    assert moving_together(walks(0, 1, 100, 1, 0.5).expand(2, -1, -1)) is not None
