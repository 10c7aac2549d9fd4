"""Refined posteriors, a linear model beside the closed form of probabilistic PCA, and training by ``fit``."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import fekernels as fe
from fekernels.models.latent import BOUND, COMPARISON
from tests.models.test_vae import data, small


def bars(rows, seed=0):
    """4 x 4 pictures of some of four rows and four columns, black and white."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(rows, 8, generator=generator) < 0.25
    return torch.clamp(on[:, :4, None] + on[:, None, 4:].float(), max=1.0).flatten(1)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = fe.models.VAE(16, 4, (24,), seed=1)
    history = model.fit(list(bars(1000).split(50)), epochs=12, lr=5e-3, progress=False)
    return model.eval(), history


def per_datum(model, x, **options):
    return model.free_energy(x, reduction="none", **options).free_energy


def test_refined_is_never_worse_than_amortised(trained):
    model, _ = trained
    x = bars(200, seed=1)
    refined = model.infer(x, 40)
    amortised = model.infer(x)
    assert all(map(torch.equal, amortised, model.encode(x)))
    key = {**model.noise(x, step=0), "stream": COMPARISON}
    with torch.no_grad():
        before, after = (
            model._terms(x, *q, key, 32, True, reduction="none").free_energy for q in (amortised, refined)
        )
        assert (after <= before).all()  # by the samples that it is decided by: exactly
        before, after = (per_datum(model, x, posterior=q, samples=500, seed=9) for q in (amortised, refined))
    gain = before - after
    assert gain.mean() > 0.05 and gain.min() > -0.02  # by others: but for their noise
    changed = (refined.mean != amortised.mean).any(1)
    assert changed.float().mean() > 0.9
    assert not refined.mean.requires_grad


def test_what_does_not_help_is_not_kept(trained):
    model, _ = trained
    x = bars(50, seed=2)
    wild = model.infer(x, 3, lr=50.0)
    assert all(map(torch.equal, wild, model.encode(x)))
    with pytest.raises(ValueError, match="VAE.infer: refine_steps must be at least 0; got -1"):
        model.infer(x, -1)


def test_a_data_point_is_refined_as_if_it_were_alone(trained):
    model, _ = trained
    x = bars(6, seed=3)
    whole = model.infer(x, 5)
    part = model.infer(x[4:], 5, offset=4)
    for one, other in zip(part, whole, strict=True):
        torch.testing.assert_close(one, other[4:], rtol=1e-5, atol=1e-5)
    again = model.infer(x, 5)
    assert all(map(torch.equal, whole, again))


def test_refining_leaves_the_model_as_it_was(trained):
    model, _ = trained
    model.train()
    model.zero_grad()
    dropout = model.encoder.append(nn.Dropout(0.5))[-1].eval()  # a module with a mode of its own
    model.infer(bars(5), 2)
    assert model.training and model.decoder.training and not dropout.training
    assert all(weight.grad is None for weight in model.parameters())
    del model.encoder[-1]
    model.eval()


def evidence_of_principal_components(x, latents):
    """The largest log-likelihood per sample of probabilistic PCA (Tipping & Bishop 1999, equations 4, 7 and 8)."""
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = values[latents:].mean()
    log_det = values[:latents].log().sum() + (len(values) - latents) * noise.log()
    return -(len(values) * math.log(2 * math.pi) + log_det + len(values)) / 2


def test_a_linear_model_reaches_the_evidence_of_probabilistic_pca():
    generator = torch.Generator().manual_seed(0)
    latents, rows, width = 2, 400, 6
    z = torch.randn(rows, latents, generator=generator)
    x = z @ torch.randn(latents, width, generator=generator) + 0.5 * torch.randn(
        rows, width, generator=generator
    )
    torch.manual_seed(1)
    model = fe.models.VAE(width, latents, (), "gaussian", dispersion="shared", seed=0)
    steps = 300
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.free_energy(x, samples=2, antithetic=True).free_energy.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        # The expected energy, exactly: noise z adds what the decoder makes of its variance.
        mean, logvar = model.encode(x)
        location, log_variance = model.decode(mean)
        spread = (model.decoder[0].weight ** 2 @ logvar.exp().T).sum(0) / log_variance.exp() / 2
        energy = fe.energy((location, log_variance), x, "gaussian") + spread
        found = -(energy + fe.gaussian_kl(mean, logvar)).double().mean()
        estimate = -model.free_energy(x, samples=300, antithetic=True).free_energy
    best = evidence_of_principal_components(x.double(), latents)
    assert best - 1e-3 < found < best + 1e-5
    assert abs(estimate - found) < 0.02
    # In this model the exact posterior is a Gaussian of this kind: nothing is left to refine.
    refined = model.eval().infer(x, 20)
    assert (refined.mean - mean).abs().max() < 0.1


def test_fit_learns_and_tells(trained):
    model, history = trained
    assert len(history.free_energy) == len(history.active_units) == 12 and history.validation == []
    assert history.free_energy[-1] < history.free_energy[0] - 1
    for total, energy, kl in zip(history.free_energy, history.energy, history.kl, strict=True):
        assert total == pytest.approx(energy + kl, rel=1e-6)
    x = bars(1000)
    means = model.encode(x)[0].detach()
    for threshold in (*means.var(0, correction=0).tolist(), 0.01):
        wanted = int((means.double().var(0, correction=0) > threshold * (1 + 1e-5)).sum())
        assert model.active_units(x, threshold * (1 + 1e-5)) == wanted
        assert model.active_units([(part, 1) for part in x.split(300)], threshold * (1 + 1e-5)) == wanted
    assert history.active_units[-1] == model.active_units(x) > 0
    assert str(history).startswith("epoch 12: free energy ") and "of 4 latents active" in str(history)


def test_fit_with_everything(capsys):
    model = small()
    x = data("bernoulli", 40)
    betas = []

    def warm_up(epoch):
        betas.append(epoch)
        return epoch / 2

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.no_grad():
        model.fc_mean.weight.mul_(10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(40)), 8)
    history = model.eval().fit(
        loader, 3, optimizer=optimizer, beta=warm_up, free_bits=0.1, validation=[x[:10]], refine_steps=2
    )
    assert betas == [0, 1, 2] and len(history.validation) == 3 and not model.training
    with torch.no_grad():
        again = model.free_energy(x[:10]).free_energy
    assert history.validation[-1] == pytest.approx(float(again), rel=1e-5)
    assert "epoch 3/3" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert len(history.plot().axes) == 2


def test_fit_says_what_is_wrong():
    model, x = small("gaussian"), data("gaussian", 10)
    with pytest.raises(TypeError, match="VAE.fit: loader must be an iterable of batches"):
        model.fit(iter([x]))
    with pytest.raises(
        TypeError, match="VAE.fit: validation must be an iterable of batches .*; got generator"
    ):
        model.fit([x], validation=(part for part in [x]))
    for name, given in (("loader", {"loader": x}), ("validation", {"loader": [x], "validation": x})):
        with pytest.raises(
            TypeError, match=rf"VAE.fit: {name} must be .* x.split\(100\); got .* \(10, 3, 2\)"
        ):
            model.fit(**given, progress=False)
    assert len(model.fit(torch.stack([x, x]), progress=False).energy) == 1  # a tensor of batches
    with pytest.raises(ValueError, match="VAE.fit: loader must hold a batch; got none"):
        model.fit([], progress=False)
    with pytest.raises(TypeError, match="VAE.fit: a batch of loader must hold a tensor; got str"):
        model.fit(["x"], progress=False)
    bad = x.clone()
    bad[3, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="VAE.fit: the loss is nan at epoch 1, step 2"):
        model.fit([x, bad], progress=False)


def test_a_collapsed_posterior_is_warned_of():
    model = small()
    with torch.no_grad():
        for weight in (*model.fc_mean.parameters(), *model.fc_logvar.parameters()):
            weight.zero_()
    with pytest.warns(UserWarning, match="posterior collapse: none of the 2 latents is active"):
        history = model.fit([data("bernoulli", 20)], lr=1e-6, progress=False)
    assert history.active_units == [0]


def test_semi_amortised_gradients():
    """The decoder's is that of the refined posterior, the encoder's its own."""
    model, x = small(), data("bernoulli", 20)
    noise = model.noise(x)
    terms = model.semi_amortised_free_energy(x, 6)
    of_encoder = [*model.encoder.parameters(), *model.fc_mean.parameters(), *model.fc_logvar.parameters()]
    of_decoder = list(model.decoder.parameters())
    found = torch.autograd.grad(terms.free_energy, [*of_encoder, *of_decoder])
    own = model.free_energy(x, seed=noise["seed"], step=noise["step"]).free_energy
    refined = model.infer(x, 6, samples=1, compare=4)
    better = model.free_energy(x, seed=noise["seed"], step=noise["step"], posterior=refined)
    assert terms.free_energy == better.free_energy != own
    wanted = (*torch.autograd.grad(own, of_encoder), *torch.autograd.grad(better.free_energy, of_decoder))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def few(model, x, samples=500, **options):
    """The warnings of a bound, by their text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.importance_weighted_bound(x, samples, **options)
    assert all(found.filename == __file__ for found in caught)
    return [str(found.message) for found in caught]


def far(model, x):
    """Posteriors three units away from the encoder's, and narrow."""
    mean, logvar = (part.detach() for part in model.encode(x))
    return mean + 3, logvar - 3


def test_a_bound_that_is_noise_is_warned_of(trained):
    model, _ = trained
    x = bars(100, seed=3)
    away = far(model, x)
    (text,) = few(model, x, posterior=away)
    mean, logvar = away
    key = {**model.noise(x), "stream": model.noise(x)["stream"] + BOUND}
    z = fe.reparameterize(mean, logvar, samples=500, **key)
    each = x.expand(500, *x.shape)
    log_w = -fe.energy(model.decode(z), each, "bernoulli", batch_dims=2) - fe.monte_carlo_kl(mean, logvar, z)
    weights = torch.softmax(log_w.detach().double(), 0)
    effective = 1 / (weights**2).sum(0)
    share = (effective < 10).double().mean()
    assert f"for {share:.0%} of 100 data points the weights of 500 samples are worth fewer than 10 " in text
    assert share > 0.5 and f"(median {effective.median():.1f}, smallest {effective.min():.1f})" in text
    assert "refine longer, or take more samples" in text
    bent = copy.deepcopy(model)
    with torch.no_grad():
        bent.fc_mean.bias += 3
        bent.fc_logvar.bias -= 3
        for other in (few(bent, x), few(bent.train(), x)):
            assert len(other) == 1 and "refine first, posterior=vae.infer(x, 100), or take more" in other[0]
    assert not few(bent, x)  # a loss, in training and with gradients
    assert len(few(bent.eval(), x)) == 1 and len(few(bent, x[:1])) == 1
    assert not few(bent, x, 39) and not few(bent, x[:0])
    with torch.no_grad():
        assert not few(bent, x, posterior=bent.infer(x, 300, lr=0.1))


@pytest.mark.parametrize("seed", range(4))
def test_a_bound_of_a_trained_model_is_not_warned_of(seed):
    torch.manual_seed(seed)
    model = fe.models.VAE(16, 4, (24,), seed=seed)
    model.fit(list(bars(1000).split(50)), epochs=12, lr=5e-3, progress=False)
    for rows in (200, 40, 8):
        x = bars(rows, seed=10 + seed)
        for samples in (1, 5, 40, 100, 500):
            assert not few(model.eval(), x, samples)
