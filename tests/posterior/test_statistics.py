"""Running statistics of batch norms: measured again for every sample, on its own weights."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from fekernels.posterior.samples import PosteriorSamples
from tests.support.posterior_samples import Constant


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Tanh(), nn.Linear(4, 2))


def sampled(model, directory=None, count=3):
    with pytest.warns(UserWarning, match="running statistics"):
        samples = PosteriorSamples(model, directory=directory)
    for _ in range(count):
        model.train()
        nn.init.normal_(model[0].weight)
        model(torch.randn(16, 3) * 3 + 1)
        samples.collect()
    return samples


@pytest.mark.parametrize("on_disk", [False, True])
def test_statistics_are_those_of_update_bn_for_every_sample(tmp_path, on_disk):
    model, directory = network(), tmp_path / "chain" if on_disk else None
    samples = sampled(model, directory)
    loader = [(torch.randn(size, 3) + size, torch.zeros(size)) for size in (8, 8, 5)]
    stale, twins = list(samples), []
    for state in stale:
        twin = copy.deepcopy(model)
        twin.load_state_dict(state)
        update_bn(loader, twin)
        twins.append(twin)
    model.train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    assert samples.refresh_statistics(loader, progress=True) is samples
    kept = samples
    if on_disk:
        with pytest.warns(UserWarning, match="running statistics"):
            kept = PosteriorSamples(model, directory=directory)
    for state, twin, old in zip(kept, twins, stale, strict=True):
        assert not torch.equal(state["1.running_var"], old["1.running_var"])
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)
    x = torch.randn(6, 3)
    expected = torch.stack([twin.eval()(x).detach().double() for twin in twins]).mean(0)
    torch.testing.assert_close(kept.predict(x, None).mean, expected, rtol=1e-12, atol=1e-12)
    # Nothing of the model has moved, its momentum and modes among it.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.3 and [m.training for m in model] == [True, True, False, True]
    if on_disk:
        assert len(list(directory.iterdir())) == 3 + 1
        assert len(sampled(model, directory, count=1)) == 4


def test_batches_of_other_kinds_and_other_norms():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm1d(2, track_running_stats=True)
            self.plain = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x, shift):
            return self.plain(self.norm(x + shift))

    model = Two()
    with pytest.warns(UserWarning, match=r"'norm', InstanceNorm1d, is the first of 1"):
        samples = PosteriorSamples(model)
    samples.collect()
    x, shift = torch.randn(5, 2, 7), torch.tensor(3.0)
    expected = (x + shift).mean(2).mean(0)
    for batch in ({"x": x, "shift": shift}, [(x, shift), torch.zeros(5)]):
        again = {"x": x + 2, "shift": shift} if isinstance(batch, dict) else [(x + 2, shift)]
        samples.refresh_statistics([batch, again], device="cpu")
        torch.testing.assert_close(samples[0]["norm.running_mean"], expected + 1)
    lone = nn.BatchNorm1d(3)
    with pytest.warns(UserWarning, match="'the model', BatchNorm1d"):
        alone = PosteriorSamples(lone)
    alone.collect()
    rows = torch.randn(9, 3)
    alone.refresh_statistics([rows])
    torch.testing.assert_close(alone[0]["running_mean"], rows.mean(0))


def test_no_running_statistics_no_warning_and_nothing_to_do():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = PosteriorSamples(model)
    samples.collect()
    before = samples[0]
    samples.refresh_statistics([torch.randn(4, 3)])
    assert all(torch.equal(value, before[name]) for name, value in samples[0].items())


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (3, TypeError, "loader must be an iterable.*; got int"),
        ((torch.randn(4, 3) for _ in range(2)), TypeError, "starts anew every time.*; got generator"),
        ([], ValueError, "loader must hold a batch; got none"),
        ([torch.randn(4, 3), torch.randn(4, 2)], RuntimeError, "shapes"),
    ],
)
def test_a_bad_loader_changes_nothing(loader, error, message):
    model = network()
    samples = sampled(model)
    before = list(samples)
    with pytest.raises(error, match=message):
        samples.refresh_statistics(loader)
    for old, new in zip(before, samples, strict=True):
        assert all(torch.equal(value, new[name]) for name, value in old.items())
    assert model[1].momentum == 0.3 and model.training


def test_a_loader_that_ends_early_changes_nothing():
    class Once:
        def __init__(self):
            self.batches = [torch.randn(4, 3)]

        def __iter__(self):
            return iter([self.batches.pop()] if self.batches else [])

    samples = sampled(network())
    before = list(samples)
    with pytest.raises(ValueError, match="must hold a batch; got none"):
        samples.refresh_statistics(Once())
    for old, new in zip(before, samples, strict=True):
        assert all(torch.equal(value, new[name]) for name, value in old.items())


def test_a_bad_loader_is_refused_for_any_model():
    with pytest.raises(TypeError, match="got generator"):
        PosteriorSamples(Constant(0.0)).refresh_statistics(torch.zeros(1) for _ in range(2))
