"""``fe.models.VAE``: any shape and likelihood, its free energy and bounds, masks, networks of the user's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fekernels as fe
from fekernels._catalogue.free_energy import LIKELIHOODS, longest
from fekernels.models.networks import DISPERSIONS


def small(likelihood="bernoulli", **options):
    if likelihood == "categorical":
        options["classes"] = 4
    return fe.models.VAE((3, 2), 2, (8, 5), likelihood, **{"seed": 5, **options})


def data(likelihood, rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if likelihood == "categorical":
        return torch.randint(4, (rows, 3, 2), generator=generator)
    x = torch.rand(rows, 3, 2, generator=generator)
    return (1 + 5 * x).floor() if longest(likelihood).target.value.whole else x + 0.0


CHOICES = [
    (name, dispersion)
    for name in fe.likelihoods.NAMES
    for dispersion in (None, *(DISPERSIONS if len(fe.likelihoods.PARAMETERS[name]) > 1 else ()))
    if dispersion != "fixed" or name in fe.likelihoods.OPTIONAL
]


@pytest.mark.parametrize(("likelihood", "dispersion"), CHOICES)
def test_every_likelihood_trains_samples_and_reconstructs(likelihood, dispersion):
    model, x = small(likelihood, dispersion=dispersion), data(likelihood)
    terms = model.free_energy(x)
    terms.free_energy.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    params = model.decode(torch.randn(7, 2))
    first = params if isinstance(params, torch.Tensor) else params[0]
    assert first.shape == (7, 3, 2, 4)[: 4 if likelihood == "categorical" else 3]
    given = (params,) if isinstance(params, torch.Tensor) else params
    for parameter, value in zip(longest(likelihood).parameters, given, strict=False):
        assert not parameter.not_negative or (value > 0).all()
    assert model.sample(5, seed=1).shape == (5, 3, 2)
    assert torch.equal(model.sample(5, seed=1), model.sample(5, seed=1))
    assert not torch.equal(model.sample(50, seed=1), model.sample(50, seed=2))
    expected = fe.likelihoods.mean(likelihood, model.decode(model.encode(x)[0]))
    assert expected.isfinite().all() and torch.equal(model.reconstruct(x), expected)
    model.eval()
    bound = model.importance_weighted_bound(x, 200)
    assert bound.shape == (6,) and bound.isfinite().all()


def plain_free_energy(model, x, eps):
    mean, logvar = model.encode(x)
    logits = model.decode(mean + (logvar / 2).exp() * eps)
    energy = F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    kl = (mean**2 + logvar.exp() - 1 - logvar).sum(1) / 2
    return energy, kl


def test_the_free_energy_is_that_of_plain_torch():
    model, x = small().double(), data("bernoulli").double()
    eps = fe.random.normal((6, 2), seed=3, step=4, purpose=3).double()
    energy, kl = plain_free_energy(model, x, eps)
    terms = model.free_energy(x, seed=3, step=4, beta=0.5, reduction="none")
    torch.testing.assert_close(terms.energy, energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(terms.free_energy, energy + 0.5 * kl, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad((energy + 0.5 * kl).mean(), list(model.parameters()))
    found = torch.autograd.grad(model.free_energy(x, seed=3, step=4, beta=0.5)[0], list(model.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_several_samples_are_averaged():
    model, x = small().double(), data("bernoulli").double()
    each = torch.stack([fe.random.normal((6, 2), seed=3, stream=k, purpose=3).double() for k in range(3)])
    both = torch.cat([each, -each])
    energy = torch.stack([plain_free_energy(model, x, eps)[0] for eps in both])
    kl = plain_free_energy(model, x, each[0])[1]
    found = model.free_energy(x, seed=3, samples=3, reduction="none")
    torch.testing.assert_close(found.energy, energy[:3].mean(0), rtol=1e-12, atol=0)
    found = model.free_energy(x, seed=3, samples=3, antithetic=True, reduction="none")
    torch.testing.assert_close(found.free_energy, energy.mean(0) + kl, rtol=1e-12, atol=0)
    total = model.free_energy(x, seed=3, samples=3, antithetic=True, reduction="sum")
    torch.testing.assert_close(total.free_energy, (energy.mean(0) + kl).sum(), rtol=1e-12, atol=0)
    weight = torch.tensor([0.0, 1, 2, 0, 1, 3])
    weighted = model.free_energy(x, seed=3, samples=3, antithetic=True, weight=weight)
    torch.testing.assert_close(
        weighted.free_energy, ((energy.mean(0) + kl) * weight).mean(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dispersion", [None, "decoder", "feature", "shared"])
def test_a_new_students_t_has_a_mean_and_a_variance(dispersion):
    for seed in range(5):
        torch.manual_seed(seed)
        model, x = small("student_t", dispersion=dispersion), 3 * data("student_t", 50)
        assert ((model.decode(model.encode(x)[0])[2] - 5).abs() < 1.5).all()
        assert model.reconstruct(x).isfinite().all()


def test_a_single_z_is_decoded_as_a_row_of_a_batch():
    z = torch.randn(2, 3, 2)
    for name in ("bernoulli", "categorical", "student_t"):
        model = small(name)
        many, one = (p if isinstance(p, tuple) else (p,) for p in (model.decode(z), model.decode(z[1, 2])))
        for whole, alone in zip(many, one, strict=True):
            torch.testing.assert_close(alone, whole[1, 2] if whole.shape[:2] == (2, 3) else whole)
    for wrong, came in (
        (z[..., :1], r"\(2, 3, 1\)"),
        (torch.randn(5), r"\(5,\)"),
        (torch.tensor(1.0), r"\(\)"),
    ):
        with pytest.raises(ValueError, match=rf"VAE.decode: z must have shape \(\.\.\., 2\); got {came}"):
            model.decode(wrong)
    with pytest.raises(TypeError, match="VAE.decode: z must be a Tensor; got list"):
        model.decode([1.0, 2.0])


def test_the_bound_does_not_depend_on_chunks_and_grows():
    model, x = small().eval(), data("bernoulli")
    with torch.no_grad():
        whole = model.importance_weighted_bound(x, 60, chunk=60)
        torch.testing.assert_close(
            model.importance_weighted_bound(x, 60, chunk=7), whole, rtol=1e-6, atol=1e-6
        )
        few = model.importance_weighted_bound(x.expand(6, 3, 2).repeat(200, 1, 1), 1).mean()
        many = model.importance_weighted_bound(x.repeat(200, 1, 1), 50).mean()
    assert few < many


def test_the_bound_tends_to_the_evidence():
    """Two latents, integrated on a grid; the bound is off by no more than its weights' spread lets expect."""
    model, x = small().eval(), data("bernoulli")
    samples = 4000
    with torch.no_grad():
        model.fc_logvar.bias += 0.7  # wider than the posterior: the weights are bounded
        axis = torch.linspace(-7, 7, 141)
        z = torch.cartesian_prod(axis, axis)
        log_prior = -(z**2).sum(1) / 2 - math.log(2 * math.pi) + 2 * math.log(0.1)
        each = x.expand(len(z), 6, 3, 2)
        log_p = -fe.energy(model.decode(z)[:, None].expand_as(each), each, "bernoulli", batch_dims=2)
        evidence = torch.logsumexp(log_p + log_prior[:, None], 0)
        bound = model.importance_weighted_bound(x, samples)
        elbo = -model.free_energy(x, samples=samples, reduction="none").free_energy
        mean, logvar = model.encode(x)
        z = mean + (logvar / 2).exp() * torch.randn(samples, 6, 2)
        log_w = -fe.energy(model.decode(z), x.expand(samples, 6, 3, 2), "bernoulli", batch_dims=2)
        weights = (log_w - fe.monte_carlo_kl(mean, logvar, z) - evidence).exp()
    error = weights.std(0) / math.sqrt(samples)
    assert ((bound - evidence).abs() < 5 * error).all()
    assert (evidence - elbo > 10 * error).all()


def test_a_masked_element_does_not_count():
    model, x = small(), data("bernoulli")
    mask = torch.rand(6, 3, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    dirty = torch.where(mask, x, math.nan)
    zeros = torch.where(mask, x, 0.0)
    for options in ({}, {"samples": 3}):
        wanted = model.free_energy(zeros, seed=0, mask=mask, **options)
        assert model.free_energy(dirty, seed=0, mask=mask, **options) == wanted
    assert torch.equal(
        model.importance_weighted_bound(dirty, 5, seed=0, mask=mask),
        model.importance_weighted_bound(zeros, 5, seed=0, mask=mask),
    )


@pytest.mark.parametrize(
    ("likelihood", "bad"),
    [("bernoulli", 1.5), ("bernoulli", math.nan), ("poisson", 0.5), ("poisson", -1.0), ("gamma", 0.0),
     ("gamma", math.inf), ("categorical", 4)],
)  # fmt: skip
def test_data_outside_of_the_domain_raise(likelihood, bad):
    model, x = small(likelihood), data(likelihood)
    x[2, 1, 1] = bad
    for call in (model.free_energy, model.importance_weighted_bound):
        with pytest.raises(ValueError, match=f"x must|target must hold .*; got {bad}"):
            call(x)
    assert model.noise_counter.read() == (5, 0)  # nothing was drawn
    model.free_energy(data(likelihood))


def test_bad_arguments():
    for arguments, message in (
        (((0, 2), 3), "VAE: input_dim must be at least 1; got 0"),
        ((4, 0), "VAE: latent_dim must be at least 1; got 0"),
        ((4, 2, (8, 0)), r"VAE: hidden\[1\] must be at least 1; got 0"),
        ((4, 2, (8,), "cauchy"), "VAE: likelihood must be one of mse, .*; got 'cauchy'"),
        ((4, 2, (8,), "categorical"), "VAE: classes must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            fe.models.VAE(*arguments)
    for options, message in (
        ({"dispersion": "shared"}, "dispersion must be None for likelihood 'bernoulli'"),
        (
            {"likelihood": "laplace", "dispersion": "fixed"},
            "dispersion must not be 'fixed' .* needs log_scale",
        ),
        ({"likelihood": "laplace", "dispersion": "none"}, "dispersion must be one of decoder, "),
        ({"classes": 3}, "classes must be None for likelihood 'bernoulli'; got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**options)
    with pytest.raises(TypeError, match=r"VAE: encoder must be a torch.nn.Module; got str"):
        small(encoder="encoder")
    for wrong in (32, "32", None):
        with pytest.raises(TypeError, match=rf"VAE: hidden must be a sequence of widths, .*; got {wrong!r}"):
            fe.models.VAE(4, 2, hidden=wrong)
    model = small()
    with pytest.raises(ValueError, match=r"VAE.encode: x must have shape \(batch, 3, 2\); got \(6, 6\)"):
        model.free_energy(torch.rand(6, 6))
    with pytest.raises(ValueError, match=r"antithetic needs samples"):
        model.free_energy(data("bernoulli"), antithetic=True)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(6, 3, 2), TypeError, "mask must be a bool tensor, True = observed; got float32"),
        ([True], TypeError, "mask must be a bool tensor, True = observed; got list"),
        (torch.ones(6, 3, 3).bool(), ValueError, r"mask must have shape \(6, 3, 2\) like x; got \(6, 3, 3\)"),
    ],
)
def test_masks_are_named(mask, error, message):
    model, x = small(), data("bernoulli")
    for name in ("free_energy", "importance_weighted_bound", "infer"):
        with pytest.raises(error, match=f"VAE.{name}: {message}"):
            getattr(model, name)(x, mask=mask)
    assert model.noise_counter.read() == (5, 0)


def test_own_networks():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 12)

        def forward(self, z):
            return self.layer(z).chunk(2, 1)

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    model = small("negative_binomial", encoder=encoder, decoder=Decoder())
    x = data("negative_binomial")
    mean, logvar = encoder(x).chunk(2, 1)
    assert all(map(torch.equal, model.encode(x), (mean, logvar)))
    raw = model.decoder(mean)
    mu, theta = model.decode(mean)
    assert torch.equal(mu, F.softplus(raw[0]).view(6, 3, 2)) and torch.equal(
        theta, F.softplus(raw[1]).view(6, 3, 2)
    )
    assert model.free_energy(x).free_energy.isfinite()
    with pytest.raises(
        ValueError, match=r"decoder must give 1 tensors \(mean\) .* dispersion='feature'; got 2"
    ):
        small("negative_binomial", encoder=encoder, decoder=Decoder(), dispersion="feature").free_energy(x)
    with pytest.raises(ValueError, match=r"encoder must give mean and logvar of shape \(6, 2\) each"):
        small(encoder=nn.Sequential(nn.Flatten(), nn.Linear(6, 6))).free_energy(data("bernoulli"))


def test_every_likelihood_is_one_of_the_catalogue():
    assert {name for name, _ in CHOICES} == {row.name for row in LIKELIHOODS}


def test_float64_data_do_not_make_a_float32_model_slow():
    model, x = small(), data("bernoulli")
    assert model.free_energy(x.double(), seed=0).free_energy.dtype == torch.float32
    assert model.free_energy(x.double(), seed=0) == model.free_energy(x, seed=0)


def test_a_compiled_step_has_the_noise_that_it_is_given():
    """With a step in one graph, without recompiling; without one, fresh noise outside of the graph."""
    model, x = small(), data("bernoulli")
    model.load_state_dict(small(seed=8).state_dict())
    compiled = torch.compile(
        lambda x, step: model.free_energy(x, step=step).free_energy, fullgraph=True, backend="aot_eager"
    )
    for step in range(1, 4):
        torch.testing.assert_close(compiled(x, step), model.free_energy(x, step=step).free_energy)
    fresh = torch.compile(lambda x: model.free_energy(x).free_energy, backend="aot_eager")
    values = [fresh(x.clone()).item() for _ in range(3)]
    wanted = [model.free_energy(x, step=step).free_energy.item() for step in range(1, 4)]
    assert values == pytest.approx(wanted, rel=1e-6) and len(set(wanted)) == 3
    assert model.noise_counter.read() == (8, 3)
