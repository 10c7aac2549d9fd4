"""Monte-Carlo KL, mixture priors, importance weighting, and their errors.

Expectations of the bounds are in test_elbo_exact.py.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fekernels as fe
from tests.support.tensors import UNIT

N = 200_000


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


# Importance weighting.


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
