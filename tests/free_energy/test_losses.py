"""Likelihoods' samples and means, validation of what is given, and the Module."""

import math

import pytest
import torch
from torch import nn

import fekernels as fe
from fekernels._catalogue.free_energy import CODES, longest
from fekernels.ops.free_energy.domains import validate_target
from fekernels.reference.free_energy.free_energy import energy_elements

N = 200_000

# Several parameter values of each, [values], broadcast: moments are taken over N draws of each value.
PARAMS = {
    "mse": ([0.3, -2.0],),
    "gaussian": ([0.3, -2.0], [-1.0, 2.0]),
    "bernoulli": ([-3.0, 0.4, 1.0],),
    "continuous_bernoulli": ([-40.0, -1.0, 0.0, 1e-4, 2.0, 30.0],),
    "laplace": ([0.3, -2.0], [-1.0, 1.0]),
    "student_t": ([0.3, -2.0], [-1.0, 2.0], [5.0, 30.0]),
    "poisson": ([-2.0, 0.0, 3.0],),
    "negative_binomial": ([0.2, 5.0, 40.0], [0.5, 3.0, 100.0]),
    "zero_inflated_negative_binomial": ([0.2, 5.0, 40.0], [0.5, 3.0, 100.0], [-1.0, 0.0, 2.0]),
    "gamma": ([0.2, 5.0, 40.0], [0.5, 3.0, 100.0]),
}


def tensors(name):
    return tuple(torch.tensor(values, dtype=torch.float64) for values in PARAMS[name])


def variance(name, params):
    """Textbook variances, by another way than the sampler's."""
    first = params[0]
    if name == "bernoulli":
        p = torch.sigmoid(first)
        return p * (1 - p)
    if name == "continuous_bernoulli":
        leaf = first.clone().requires_grad_()  # the second derivative of the log-normaliser
        return torch.autograd.grad(fe.likelihoods.mean(name, leaf).sum(), leaf)[0]
    if name.endswith("negative_binomial"):
        mu, th = params[:2]
        of_counts = mu + mu * mu / th
        if len(params) == 2:
            return of_counts
        keep = torch.sigmoid(-params[2])
        return keep * of_counts + keep * (1 - keep) * mu * mu
    return {
        "mse": lambda: torch.full_like(first, 0.5),
        "gaussian": lambda: params[1].exp(),
        "laplace": lambda: 2 * (2 * params[1]).exp(),
        "student_t": lambda: params[1].exp() * params[2] / (params[2] - 2),
        "poisson": lambda: first.exp(),
        "gamma": lambda: first**2 / params[1],
    }[name]()


@pytest.mark.parametrize("name", PARAMS)
def test_moments_of_samples(name):
    params = tensors(name)
    x = fe.likelihoods.sample(name, params, seed=3, sample_shape=(N,))
    assert x.shape == (N, len(params[0])) and x.dtype == torch.float64
    wanted = variance(name, params)
    off = (x.mean(0) - fe.likelihoods.mean(name, params)) / (wanted / N).sqrt()
    assert off.abs().max() < 5, off
    centred = (x - fe.likelihoods.mean(name, params)) ** 2
    off = (centred.mean(0) - wanted) / (centred.var(0) / N).sqrt()
    assert off.abs().max() < 5, off


def test_gaussian_of_variance_one():
    x = fe.likelihoods.sample("gaussian", torch.zeros(N), seed=1)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / N)


def test_categorical_samples():
    logits = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0]])
    x = fe.likelihoods.sample("categorical", logits, seed=2, sample_shape=(N,))
    assert x.shape == (N, 2) and x.dtype == torch.int64
    p = fe.likelihoods.mean("categorical", logits)
    shares = nn.functional.one_hot(x, 3).double().mean(0)
    assert ((shares - p) / (p * (1 - p) / N).sqrt()).abs().max() < 5


@pytest.mark.parametrize(
    "name", ["mse", "gaussian", "bernoulli", "continuous_bernoulli", "poisson", "negative_binomial", "gamma"]
)
def test_the_mean_is_where_the_energy_is_flat(name):
    """E[gradient] = 0 for any density; an exponential family's is linear in x, so it is 0 at the mean."""
    params = tuple(p.requires_grad_() for p in tensors(name))
    target = fe.likelihoods.mean(name, params).detach()[None]
    energy = energy_elements([p[None] for p in params], target, CODES[name][len(params)])
    (gradient,) = torch.autograd.grad(energy.sum(), params[0])
    assert gradient.abs().max() < 1e-12


def test_seeds_and_generators():
    logits = torch.zeros(100)
    first = fe.likelihoods.sample("bernoulli", logits, seed=7)
    assert torch.equal(first, fe.likelihoods.sample("bernoulli", logits, seed=7))
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(first, fe.likelihoods.sample("bernoulli", logits, generator=generator))
    assert not torch.equal(first, fe.likelihoods.sample("bernoulli", logits, generator=generator))
    with pytest.raises(ValueError, match="seed or generator"):
        fe.likelihoods.sample("bernoulli", logits, seed=7, generator=generator)


def test_low_precision_and_odd_means():
    assert (
        fe.likelihoods.sample("poisson", torch.full((3,), 7.0, dtype=torch.bfloat16)).dtype == torch.float32
    )
    mean = fe.likelihoods.mean("student_t", (torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 1.5])))
    assert mean[0].isnan() and mean[1] == 0
    with pytest.raises(
        ValueError, match="params of 'laplace' must be .'location', 'log_scale'.; got 1 tensors"
    ):
        fe.likelihoods.mean("laplace", torch.zeros(2))
    with pytest.raises(ValueError, match="likelihoods.sample: name must be one of 'mse', .*; got 'gauss'"):
        fe.likelihoods.sample("gauss", torch.zeros(2))
    with pytest.raises(TypeError, match="logit must be floating; got torch.int64"):
        fe.likelihoods.mean("bernoulli", torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", PARAMS)
def test_names_reach_their_formulas(name):
    params = [p[None] for p in tensors(name)]
    x = fe.likelihoods.sample(name, params, seed=0)
    for given in (params, [p.float() for p in params]):
        expected = energy_elements(given, x.to(given[0].dtype), CODES[name][len(params)]).sum(1)
        got = fe.energy(tuple(given), x.to(given[0].dtype), name)
        # Sums of a few elements, each right to 1e-6 in float32 (free_energy/test_numerics.py).
        error = 2e-6 if got.dtype == torch.float32 else 1e-13
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=error, atol=error)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("poisson", [0.0, -1.0], r"whole counts >= 0 for likelihood 'poisson'; got -1.0"),
        ("negative_binomial", [0.0, 1.5], r"got 1.5"),
        ("zero_inflated_negative_binomial", [math.inf, 1.0], r"got inf"),
        ("poisson", [0.0, math.nan], r"got nan"),
        ("bernoulli", [0.0, 1.01], r"values in \[0, 1\] for likelihood 'bernoulli'; got 1.0099"),
        ("continuous_bernoulli", [-0.1, 1.0], r"got -0.1"),
        ("bernoulli", [math.nan, 1.0], r"got nan"),
        ("gamma", [1.0, 0.0], r"positive numbers for likelihood 'gamma'; got 0.0"),
        ("gamma", [-1e-40, 1.0], r"got -9.9999\d*e-41"),
        ("gamma", [1.0, math.inf], r"got inf"),
        ("gamma", [1.0, math.nan], r"got nan"),
        ("categorical", [0, 3], r"classes in \[0, 3\) for likelihood 'categorical'; got 3"),
        ("categorical", [-1, 2], r"got -1"),
    ],
)
def test_validation_of_targets(name, bad, message):
    params = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="^energy: target must hold .*" + message):
        validate_target("energy", name, torch.tensor(bad), params)
    validate_target("energy", name, torch.tensor([1, 1] if name == "gamma" else [0, 1]), params)
    validate_target("energy", "gaussian", torch.tensor(bad), params)
    validate_target("energy", name, torch.tensor([]), params)


@pytest.mark.parametrize(
    ("likelihood", "at", "name"),
    [
        ("student_t", 2, "degrees_of_freedom"),
        ("negative_binomial", 0, "mean"),
        ("negative_binomial", 1, "inverse_dispersion"),
        ("zero_inflated_negative_binomial", 0, "mean"),
        ("zero_inflated_negative_binomial", 1, "inverse_dispersion"),
        ("gamma", 0, "mean"),
        ("gamma", 1, "shape"),
    ],
)
def test_validation_of_parameters(likelihood, at, name):
    assert fe.likelihoods.PARAMETERS[likelihood][at] == name
    x, mask = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    for bad in (-0.5, math.nan, -1e-40):
        for shape in ((3, 4), (4,), (1, 1)) if at else ((3, 4),):
            params = [torch.ones(3, 4) for _ in fe.likelihoods.PARAMETERS[likelihood]]
            params[at] = torch.ones(shape)
            params[at][..., min(2, shape[-1] - 1)] = bad
            with pytest.raises(
                ValueError, match=rf"energy: params\[{at}\] \({name}\) must be >= 0 .*; got -?[\dn]"
            ):
                fe.energy(tuple(params), x, likelihood, validate=True)
            with pytest.raises(ValueError, match=rf"free_energy: params\[{at}\] \({name}\)"):
                fe.free_energy(tuple(params), x, x, x, likelihood=likelihood, validate=True)
    params[at] = torch.ones(3, 4)
    params[at][1, 2] = -1.0
    for edge in (0.0, math.inf):
        params[at][0, 0] = edge
        assert not fe.energy(tuple(params), x, likelihood, mask, validate=True).isnan().any()


def test_unbounded_parameters_are_not_validated():
    known = {"mean", "inverse_dispersion", "degrees_of_freedom", "shape"}
    for likelihood in fe.likelihoods.NAMES:
        for parameter in longest(likelihood).parameters:
            assert parameter.not_negative == (parameter.name in known)


# The Module.


def test_module_is_the_function():
    r, x = torch.randn(5, 4), torch.rand(5, 4)
    m, v, p, w = torch.randn(4, 5, 3)
    mask, weight = torch.rand(5, 4) < 0.7, torch.rand(5)
    operands = dict(prior_mean=p, prior_logvar=w, mask=mask, weight=weight)
    options = dict(beta=0.5, free_bits=0.1, reduction="sum")
    loss = fe.FreeEnergyLoss("bernoulli", **options)
    expected = fe.free_energy(r, x, m, v, likelihood="bernoulli", **operands, **options)
    assert [*loss(r, x, m, v, **operands)] == [*expected]
    loss.beta = 2.0
    assert loss(r, x, m, v, **operands).free_energy == expected.energy + 2 * expected.kl
    assert "'bernoulli', beta=2.0, free_bits=0.1, reduction='sum'" in repr(loss)
    with pytest.raises(ValueError, match="target must hold values in"):
        fe.FreeEnergyLoss("bernoulli", validate=True)(r, x + 1, m, v)
    with pytest.raises(ValueError, match="FreeEnergyLoss: likelihood must be one of .*; got 'normal'"):
        fe.FreeEnergyLoss("normal")
