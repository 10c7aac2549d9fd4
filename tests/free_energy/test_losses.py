"""Likelihoods' samples and means, Monte-Carlo KL, mixture priors, importance weighting, and their errors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fekernels as fe
from fekernels._catalogue.free_energy import CODES, longest
from fekernels.ops.free_energy.domains import validate_target
from fekernels.reference.free_energy.free_energy import energy_elements
from tests.support.tensors import UNIT

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


# Monte-Carlo KL.


def hermite(n=30):
    node, weight = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(n))
    return node, weight / weight.sum()


def posterior():
    return (torch.tensor([[value]], dtype=torch.float64, requires_grad=True) for value in (0.7, -0.8))


def test_monte_carlo_kl_expects_the_kl_and_its_gradient():
    node, weight = hermite()
    mean, logvar = posterior()
    exact = fe.gaussian_kl(mean, logvar)[0]
    wanted = torch.autograd.grad(exact, (mean, logvar))
    for sticking in (False, True):
        z = mean + torch.exp(logvar / 2) * node[:, None, None]
        expected = (fe.monte_carlo_kl(mean, logvar, z, None, sticking)[:, 0] * weight).sum()
        torch.testing.assert_close(expected, exact)
        torch.testing.assert_close(torch.autograd.grad(expected, (mean, logvar)), wanted)


def test_monte_carlo_gradients_by_the_formulas():
    mean, logvar = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    eps = torch.randn(4, 3, dtype=torch.float64)
    sd = torch.exp(logvar / 2)
    z = mean + sd * eps
    full = torch.autograd.grad(fe.monte_carlo_kl(mean, logvar, z).sum(), (mean, logvar), retain_graph=True)
    torch.testing.assert_close(full, (z, z * sd * eps / 2 - 0.5))
    stl = torch.autograd.grad(fe.monte_carlo_kl(mean, logvar, z, None, True).sum(), (mean, logvar))
    torch.testing.assert_close(stl, (z - eps / sd, z * sd * eps / 2 - eps**2 / 2))


def test_sticking_the_landing_is_silent_at_the_prior():
    mean, logvar = (torch.zeros(4, 3, requires_grad=True) for _ in range(2))
    z = mean + torch.exp(logvar / 2) * torch.randn(4, 3)
    stl = torch.autograd.grad(
        fe.monte_carlo_kl(mean, logvar, z, sticking_the_landing=True).sum(), (mean, logvar), retain_graph=True
    )
    assert all((g == 0).all() for g in stl)
    full = torch.autograd.grad(fe.monte_carlo_kl(mean, logvar, z).sum(), (mean, logvar))
    assert all((g != 0).all() for g in full)


def test_priors_given_as_distributions():
    mean, logvar = torch.randn(2, 4, 3)
    z = torch.randn(2, 4, 3)
    normal = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(
        fe.monte_carlo_kl(mean, logvar, z, torch.distributions.Independent(normal, 1)),
        fe.monte_carlo_kl(mean, logvar, z),
    )
    with pytest.raises(
        ValueError, match=r"log_prob must sum over the latents to shape \(2, 4\) .*\(2, 4, 3\)"
    ):
        fe.monte_carlo_kl(mean, logvar, z, normal)
    with pytest.raises(ValueError, match="monte_carlo_kl: z must have shape"):
        fe.monte_carlo_kl(mean, logvar, z[:, :2])
    with pytest.raises(ValueError, match="logvar must have the shape of mean"):
        fe.monte_carlo_kl(mean, logvar[:2], z)


def test_mixture_prior_is_a_density():
    prior = fe.GaussianMixturePrior(*torch.randn(2, 3, 1).double(), torch.randn(3).double())
    z = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    # Equal steps over an analytic density leave nothing but rounding.
    assert abs(prior.log_prob(z[:, None]).exp().sum().item() * 0.004 - 1) < 1e-13
    weights = torch.softmax(prior.logits, 0)
    drawn = prior.sample(N, generator=torch.Generator().manual_seed(0))
    mean = (weights * prior.mean[:, 0]).sum()
    spread = (weights * (prior.logvar[:, 0].exp() + prior.mean[:, 0] ** 2)).sum() - mean**2
    assert abs(drawn.mean() - mean) < 5 * (spread / N).sqrt()
    centred = (drawn - mean) ** 2
    assert abs(centred.mean() - spread) < 5 * (centred.var() / N).sqrt()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3)), r"mean must have shape \(components, latents\); got \(3,\)"),
        ((torch.zeros(2, 3), torch.zeros(3)), r"logvar must have the shape of mean \(2, 3\); got \(3,\)"),
        ((torch.zeros(2, 3),) * 2 + (torch.zeros(3),), r"logits must have shape \(2,\); got \(3,\)"),
    ],
)
def test_errors_of_mixtures(arguments, message):
    with pytest.raises(ValueError, match="^GaussianMixturePrior: " + message):
        fe.GaussianMixturePrior(*arguments)


def test_a_mixture_of_one_standard_normal_is_the_closed_form():
    mean, logvar = torch.randn(2, 4, 3)
    z = torch.randn(4, 3)
    prior = fe.GaussianMixturePrior(torch.zeros(1, 3), torch.zeros(1, 3))
    torch.testing.assert_close(fe.monte_carlo_kl(mean, logvar, z, prior), fe.monte_carlo_kl(mean, logvar, z))


def test_vamp_prior_is_the_mixture_of_its_posteriors():
    encoder = nn.Linear(5, 6)
    prior = fe.VampPrior(torch.randn(4, 5), lambda u: encoder(u).chunk(2, -1))
    assert [name for name, _ in prior.named_parameters()] == ["pseudo_inputs"]
    z = torch.randn(7, 2, 3)
    mean, logvar = encoder(prior.pseudo_inputs).chunk(2, -1)
    torch.testing.assert_close(prior.log_prob(z), fe.GaussianMixturePrior(mean, logvar).log_prob(z))
    prior.log_prob(z).sum().backward()
    assert prior.pseudo_inputs.grad.abs().min() > 0 and encoder.weight.grad.abs().sum() > 0
    assert prior.sample(9).shape == (9, 3)
    assert [*fe.VampPrior(torch.randn(4, 5), encoder).children()] == []
    with pytest.raises(ValueError, match="pseudo_inputs must have shape"):
        fe.VampPrior(torch.randn(5), encoder)


# Importance weighting: what tests of expectations (free_energy/test_elbo_exact.py) leave.


def test_renyi_near_one_keeps_its_digits():
    log_w = torch.randn(8, 100) * 5
    exact = log_w.double()
    for alpha in (1 - 1e-3, 1 - 1e-6, 1 + 1e-6, 1 + 1e-3, 0.5, 20.0, -20.0):
        t = 1 - alpha
        wanted = (torch.logsumexp(t * exact, 0) - math.log(8)) / t  # nine digits are left of sixteen
        got = fe.importance_weighted_bound(log_w, estimator="renyi", alpha=alpha)
        assert (got - wanted).abs().max() < 4 * UNIT * log_w.abs().max()
    leaf = exact.clone().requires_grad_()
    for alpha in (0.9, 1.1, -3.0, 1 - 1e-5):
        assert torch.autograd.gradcheck(
            lambda w, alpha=alpha: fe.importance_weighted_bound(w, estimator="renyi", alpha=alpha),
            leaf[:, :5],
        )


@pytest.mark.parametrize("keywords", [{}, {"estimator": "renyi", "alpha": 0.5}])
def test_impossible_samples(keywords):
    """A weight of 0 (log w = -inf) counts as a sample and is no NaN, neither in the value nor in the gradient."""
    log_w = torch.tensor([[0.0, 0.3], [-math.inf, 0.3]], requires_grad=True)
    bound = fe.importance_weighted_bound(log_w, **keywords)
    assert torch.isfinite(bound).all() and bound[0] < 0
    bound.sum().backward()
    assert log_w.grad[:, 0].tolist() == [1.0, 0.0]
    assert fe.importance_weighted_bound(torch.full((3,), -math.inf), **keywords) == -math.inf


def test_dimensions_and_dtypes():
    log_w = torch.randn(3, 4, 5)
    wanted = fe.importance_weighted_bound(log_w.movedim(1, 0))
    torch.testing.assert_close(fe.importance_weighted_bound(log_w, dim=1), wanted)
    torch.testing.assert_close(fe.importance_weighted_bound(log_w, -2), wanted)
    assert fe.importance_weighted_bound(log_w.bfloat16()).dtype == torch.float32
    z = torch.randn(3, 4, 5, 2, requires_grad=True)
    noted = z * 1.0
    bound = fe.importance_weighted_bound((noted**2).sum(-1), 1, "dreg", noted)
    bound.sum().backward()
    weights = torch.softmax((z.detach() ** 2).sum(-1), 1)
    torch.testing.assert_close(z.grad, weights[..., None] ** 2 * 2 * z.detach())


def test_dreg_hooks_once():
    z = torch.randn(3, 2, requires_grad=True) * 1
    fe.importance_weighted_bound(z.sum(-1), estimator="dreg", z=z)
    with pytest.raises(ValueError, match="z already carries the hook"):
        fe.importance_weighted_bound(z.sum(-1), estimator="dreg", z=z)
    with torch.no_grad():
        for _ in range(2):
            fe.importance_weighted_bound(z.sum(-1), estimator="dreg", z=z)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"estimator": "vimco"}, ValueError, "estimator must be one of 'iwae', 'dreg', 'renyi'; got 'vimco'"),
        ({"estimator": "dreg"}, TypeError, "estimator='dreg' needs z, the samples; got NoneType"),
        (
            {"estimator": "dreg", "z": torch.zeros(4, 3)},
            ValueError,
            r"z must have shape \(3, 4, '...'\); got \(4, 3\)",
        ),
        ({"estimator": "renyi"}, ValueError, "alpha belongs to estimator='renyi'; got alpha=None"),
        ({"alpha": 0.5}, ValueError, "alpha belongs to estimator='renyi'; got alpha=0.5"),
        ({"estimator": "renyi", "alpha": "a"}, TypeError, "alpha must be a number; got str"),
        ({"estimator": "renyi", "alpha": math.nan}, ValueError, "alpha must be a number; got nan"),
        ({"dim": 2}, ValueError, r"dim must be a dimension of log_w \(3, 4\); got 2"),
        ({"log_w": torch.zeros(0, 4)}, ValueError, "at least one sample along dim 0"),
        ({"log_w": torch.zeros(3, dtype=torch.int64)}, TypeError, "log_w must be floating; got torch.int64"),
        ({"log_w": 3.0}, TypeError, "log_w must be a Tensor; got float"),
    ],
)
def test_errors_of_importance_weighting(arguments, error, message):
    with pytest.raises(error, match="^importance_weighted_bound: .*" + message):
        fe.importance_weighted_bound(**{"log_w": torch.zeros(3, 4), **arguments})
