"""The bounds on models whose evidence is known: probabilistic PCA, and latents of four states, enumerated.

Expectations are sums over all states, or Gauss-Hermite quadrature, which is exact for polynomials: nothing is sampled.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import fekernels as fe

D, Z = 6, 2
NOISE_VARIANCE = 0.3

# Probabilistic PCA (Tipping & Bishop 1999): z ~ N(0, I), x ~ N(W z, NOISE_VARIANCE).


class PCA:
    def __init__(self, orthogonal, rows=3):
        generator = torch.Generator().manual_seed(1)
        loadings = torch.randn(D, Z, dtype=torch.float64, generator=generator)
        loadings[:, 1] += loadings[:, 0]
        if orthogonal:
            loadings = torch.linalg.qr(loadings)[0] * torch.tensor([1.7, 0.6], dtype=torch.float64)
        self.loadings = loadings
        self.x = torch.randn(rows, D, dtype=torch.float64, generator=generator)
        self.precision = torch.eye(Z, dtype=torch.float64) + loadings.T @ loadings / NOISE_VARIANCE
        self.posterior_mean = self.x @ loadings / NOISE_VARIANCE @ torch.linalg.inv(self.precision)

    def evidence(self):
        covariance = self.loadings @ self.loadings.T + NOISE_VARIANCE * torch.eye(D, dtype=torch.float64)
        return MultivariateNormal(torch.zeros(D, dtype=torch.float64), covariance).log_prob(self.x).sum()

    def free_energy(self, mean, logvar):
        """Sum over the data; the expected energy is exact, being quadratic: the mean over the nodes z = m +- sd."""
        nodes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=Z)), dtype=mean.dtype)
        z = mean + torch.exp(logvar / 2) * nodes[:, None]  # [nodes, rows, Z]
        r = z @ self.loadings.to(mean.dtype).T
        s = torch.full((1, D), math.log(NOISE_VARIANCE), dtype=mean.dtype)
        count = len(nodes)
        return fe.free_energy(
            (r.flatten(0, 1), s.expand(count * len(mean), D)),
            self.x.to(mean.dtype).repeat(count, 1),
            mean.repeat(count, 1),
            logvar.repeat(count, 1),
            likelihood="gaussian",
            weight=torch.full((count * len(mean),), 1 / count),
            reduction="sum",
        ).free_energy

    def best(self):
        """The best factorised q: the exact means, and the diagonal of the precision."""
        return self.posterior_mean, -torch.log(torch.diagonal(self.precision)).expand(len(self.x), Z)

    def gap(self):
        return len(self.x) * (torch.diagonal(self.precision).log().sum() - torch.logdet(self.precision)) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_best_elbo_of_probabilistic_pca(orthogonal, dtype):
    model = PCA(orthogonal)
    assert (model.gap() < 1e-12) if orthogonal else (model.gap() > 0.1)
    best = model.free_energy(*(part.to(dtype) for part in model.best()))
    expected = -model.evidence() + model.gap()
    torch.testing.assert_close(
        best, expected.to(dtype), rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0
    )


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_best_q_is_stationary_and_others_are_worse(orthogonal):
    model = PCA(orthogonal)
    mean, logvar = (part.clone().requires_grad_() for part in model.best())
    best = model.free_energy(mean, logvar)
    for gradient in torch.autograd.grad(best, (mean, logvar)):
        assert gradient.abs().max() < 1e-12
    with torch.no_grad():
        for _ in range(10):
            other = model.free_energy(mean + 0.1 * torch.randn(3, Z), logvar + 0.1 * torch.randn(3, Z))
            assert other > best


def test_one_natural_gradient_step_lands_on_the_posterior():
    """In natural parameters with rate 1 (docs/free_energy.md): the gradients' scales must be exact in both m and v."""
    model = PCA(orthogonal=True)
    mean, logvar = (torch.randn(3, Z, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g_mean, g_logvar = torch.autograd.grad(model.free_energy(mean, logvar), (mean, logvar))
    with torch.no_grad():
        precision = (2 * g_logvar + 1) * torch.exp(-logvar)
        landed = mean - g_mean / precision
    torch.testing.assert_close(precision, torch.diagonal(model.precision).expand(3, Z))
    torch.testing.assert_close(landed, model.posterior_mean)


def test_beta_is_a_variance():
    """The beta-VAE at variance s2 is beta times the ELBO at variance beta s2, plus a constant."""
    r, x = torch.randn(2, 5, D, dtype=torch.float64)
    m, v = torch.randn(2, 5, Z, dtype=torch.float64)
    beta, s2 = 4.0, 0.3

    def of(beta, variance):
        s = torch.full((1, D), math.log(variance), dtype=torch.float64)
        return fe.free_energy((r, s), x, m, v, likelihood="gaussian", beta=beta, reduction="none").free_energy

    constant = D / 2 * (math.log(2 * math.pi * s2) - beta * math.log(2 * math.pi * beta * s2))
    torch.testing.assert_close(of(beta, s2), beta * of(1.0, beta * s2) + constant)


def test_kl_is_cross_entropy_less_entropy():
    m, v = torch.randn(2, 5, Z, dtype=torch.float64)
    entropy = (1 + math.log(2 * math.pi) + v).sum(1) / 2
    cross_entropy = (math.log(2 * math.pi) + m * m + v.exp()).sum(1) / 2
    torch.testing.assert_close(fe.gaussian_kl(m, v), cross_entropy - entropy)


# A latent of four states: log p(x, z) and q(z | x) are tables.


class FourStates:
    def __init__(self):
        self.log_joint = torch.tensor([-1.2, -3.0, -0.7, -5.0], dtype=torch.float64)
        self.log_q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
        self.log_w = self.log_joint - self.log_q

    def tuples(self, count):
        """All tuples of ``count`` states [count, 4^count] and the probability of each under q."""
        states = torch.tensor(list(itertools.product(range(4), repeat=count))).T
        return states, self.log_q[states].sum(0).exp()

    def bound(self, count, **keywords):
        states, probability = self.tuples(count)
        return (fe.importance_weighted_bound(self.log_w[states], **keywords) * probability).sum()


def test_iwae_bounds_grow_to_the_evidence():
    model = FourStates()
    evidence = torch.logsumexp(model.log_joint, 0)
    bounds = [model.bound(count) for count in range(1, 7)]
    torch.testing.assert_close(bounds[0], (model.log_q.exp() * model.log_w).sum())  # the ELBO
    assert all(low < high for low, high in itertools.pairwise([*bounds, evidence]))
    assert evidence - bounds[5] < (evidence - bounds[0]) / 3  # the gap falls as 1 / K

    states, probability = model.tuples(3)
    literal = (model.log_w[states].exp().mean(0).log() * probability).sum()
    torch.testing.assert_close(bounds[2], literal)


def test_iwae_gradient_weights_are_the_normalised_weights():
    model = FourStates()
    states, probability = model.tuples(3)
    log_w = model.log_w[states].requires_grad_()
    (gradient,) = torch.autograd.grad(fe.importance_weighted_bound(log_w).sum(), log_w)
    weights = log_w.detach().exp()
    torch.testing.assert_close(gradient, weights / weights.sum(0))


def test_renyi_bounds_fall_with_alpha():
    model = FourStates()
    bounds = [
        model.bound(3, estimator="renyi", alpha=alpha)
        for alpha in (-math.inf, -5.0, -0.5, 0.0, 0.5, 1 - 1e-7, 1.0, 1 + 1e-7, 3.0, math.inf)
    ]
    assert all(high > low for high, low in itertools.pairwise(bounds))
    torch.testing.assert_close(bounds[3], model.bound(3))
    torch.testing.assert_close(bounds[6], model.bound(1))


# A Gaussian latent and decoder with two samples: expectations over both eps by quadrature.


class GaussianLatent:
    K, NODES, X = 2, 80, 1.3

    def __init__(self):
        node, weight = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(self.NODES))
        weight = weight / weight.sum()
        self.eps = torch.cartesian_prod(*[node] * self.K).T  # [K, NODES^K]
        self.probability = torch.cartesian_prod(*[weight] * self.K).prod(1)
        self.mean, self.logvar, self.slope = (
            torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.4, -0.5, 0.8)
        )

    @staticmethod
    def log_normal(x, mean, logvar):
        return -((x - mean) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)) / 2

    def gradients(self, estimator, detached):
        """Expected gradients of the encoder (mean, logvar) and of the decoder (slope)."""
        z = self.mean + torch.exp(self.logvar / 2) * self.eps
        q = (self.mean.detach(), self.logvar.detach()) if detached else (self.mean, self.logvar)
        noise = torch.tensor(-1.0, dtype=torch.float64)
        log_w = self.log_normal(z, torch.tensor(0.0), torch.tensor(0.0)) - self.log_normal(z, *q)
        log_w = log_w + self.log_normal(torch.tensor(self.X), self.slope * z, noise)
        bound = fe.importance_weighted_bound(log_w, estimator=estimator, z=z if estimator == "dreg" else None)
        objective = (bound * self.probability).sum()
        return torch.stack(torch.autograd.grad(objective, (self.mean, self.logvar, self.slope)))


def test_dreg_expects_the_gradient_of_the_iwae_bound():
    model = GaussianLatent()
    exact = model.gradients("iwae", detached=False)
    # 80 nodes leave 4e-8 of these integrals.
    torch.testing.assert_close(model.gradients("dreg", detached=True), exact, rtol=1e-7, atol=0)
    # Without the squares the encoder's part is another; with the score of q left in, too.
    assert (model.gradients("iwae", detached=True) - exact)[:2].abs().min() > 1e-3
    assert (model.gradients("dreg", detached=False) - exact)[:2].abs().min() > 1e-3
