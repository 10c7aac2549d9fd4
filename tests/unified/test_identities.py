"""The identities of docs/what-the-identity-means.md, each exact to rounding and under the name that it has there."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import fekernels as fe
from tests.support import ROOT

PAGE = ROOT / "docs" / "what-the-identity-means.md"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def normal(mean: float, variance: float) -> Normal:
    mean, std = (torch.tensor(value, dtype=torch.float64) for value in (mean, variance**0.5))
    return Normal(mean, std)


def close(a: object, b: object, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


class LinearGaussian:
    """z ~ N(0, I), x | z ~ N(W z, s I): evidence and posterior in closed form. Encodes to any q, decodes to W z."""

    likelihood = "gaussian"

    def __init__(self, s: float = 1.0) -> None:
        self.w, self.s = draw(3, 2, seed=1), s
        self.mean, self.logvar = draw(1, 2, seed=2), 0.3 * draw(1, 2, seed=3)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean.expand(len(x), 2), self.logvar.expand(len(x), 2)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.w.T

    def evidence(self, x: torch.Tensor) -> torch.Tensor:
        cov = self.w @ self.w.T + self.s * torch.eye(3, dtype=torch.float64)
        return MultivariateNormal(torch.zeros(3, dtype=torch.float64), cov).log_prob(x)

    def posterior(self, x: torch.Tensor) -> MultivariateNormal:
        precision = torch.eye(2, dtype=torch.float64) + self.w.T @ self.w / self.s
        return MultivariateNormal(
            torch.linalg.solve(precision, self.w.T @ x[0] / self.s), precision_matrix=precision
        )

    def free_energy(self, x: torch.Tensor) -> torch.Tensor:
        """E_q[-log p(x | z)] + KL, the expectation of the quadratic in closed form."""
        mean, var = self.mean[0], self.logvar[0].exp()
        expected = ((x[0] - self.w @ mean) ** 2).sum() + (self.w**2 @ var).sum()
        energy = (expected / self.s + 3 * math.log(2 * math.pi * self.s)) / 2
        return energy + fe.gaussian_kl(self.mean, self.logvar)[0]


def test_equilibrium_free_energy_is_energy_minus_temperature_times_entropy() -> None:
    energies, temperature = 2 * draw(50, seed=0), 0.7
    log_z = torch.logsumexp(-energies / temperature, 0)
    p = (-energies / temperature - log_z).exp()
    close(-temperature * log_z, (p * energies).sum() - temperature * -(p * p.log()).sum())


def test_variational_free_energy_exceeds_equilibrium_by_temperature_times_kl() -> None:
    energies, temperature = 2 * draw(50, seed=0), 0.7
    log_z = torch.logsumexp(-energies / temperature, 0)
    p = (-energies / temperature - log_z).exp()
    for seed in range(3):
        q = draw(50, seed=10 + seed).softmax(0)
        variational = (q * energies).sum() + temperature * (q * q.log()).sum()
        close(variational + temperature * log_z, temperature * (q * (q / p).log()).sum())
        assert variational > -temperature * log_z


def test_evidence_is_the_bound_plus_the_kl_to_the_posterior() -> None:
    model, x = LinearGaussian(0.5), draw(1, 3, seed=5)
    q = MultivariateNormal(model.mean[0], torch.diag(model.logvar[0].exp()))
    gap = kl_divergence(q, model.posterior(x))
    close(model.evidence(x)[0], -model.free_energy(x) + gap)
    assert gap > 0.01


def test_four_views_of_the_free_energy_are_one_number() -> None:
    found = fe.views.verify_equivalence(LinearGaussian(), draw(5, 3, seed=6), seed=3)
    values = list(found.values())
    assert len(values) == 4 and found.equal and found.tolerance == 1e-12
    close(values, [values[0]] * 4, 1e-12)


def test_clamped_less_equilibrium_free_energy_is_the_log_likelihood() -> None:
    rbm = fe.models.BernoulliRBM(4, 3, seed=0).double()
    with torch.no_grad():
        for seed, parameter in enumerate(rbm.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=20 + seed))
    visible = torch.tensor([[float(i >> k & 1) for k in range(4)] for i in range(16)], dtype=torch.float64)
    equilibrium = -torch.logsumexp(-rbm.free_energy(visible), 0)
    log_p = -rbm.free_energy(visible) + equilibrium
    close(log_p.exp().sum(), 1.0)
    close(rbm.log_prob(visible), log_p)


def regression() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, theta = draw(30, 4, seed=7), draw(4, seed=8)
    return x, x @ theta + draw(30, seed=9), draw(4, seed=10).requires_grad_()


def test_sum_loss_and_regulariser_are_minus_the_log_posterior() -> None:
    x, y, theta = regression()
    loss = ((x @ theta - y) ** 2).sum() / 2 + 0.3 * (theta**2).sum() / 2
    log_joint = Normal(x @ theta, 1.0).log_prob(y).sum() + normal(0.0, 1 / 0.3).log_prob(theta).sum()
    for a, b in zip(torch.autograd.grad(loss, theta), torch.autograd.grad(-log_joint, theta), strict=True):
        close(a, b)


def test_mean_loss_is_the_posterior_at_temperature_n() -> None:
    x, y, theta = regression()
    mean_loss = ((x @ theta - y) ** 2).mean() / 2 + 0.3 / 30 * (theta**2).sum() / 2
    log_joint = Normal(x @ theta, 1.0).log_prob(y).sum() + normal(0.0, 1 / 0.3).log_prob(theta).sum()
    # exp(-mean_loss / T) is the posterior at T = 1 / 30; at T = 1 it is the posterior to the power 1 / 30.
    (of_loss,), (of_joint,) = torch.autograd.grad(mean_loss, theta), torch.autograd.grad(-log_joint, theta)
    close(of_loss / (1 / 30), of_joint)


def test_free_energy_of_a_narrow_belief_is_minus_the_log_joint() -> None:
    x, y, theta = regression()
    hessian = x.T @ x + 0.3 * torch.eye(4, dtype=torch.float64)

    def log_joint(at: torch.Tensor) -> torch.Tensor:
        return -((x @ at - y) ** 2).sum() / 2 - 0.3 * (at**2).sum() / 2

    at, other = theta.detach(), draw(4, seed=11)
    for std in (1e-1, 1e-3):
        # F of N(theta, std^2 I) by its closed form: the width adds the same everywhere, entropy included.
        energy = [-log_joint(place) + std**2 * hessian.trace() / 2 for place in (at, other)]
        close(energy[0] - energy[1], log_joint(other) - log_joint(at))
    # Of a likelihood that is no quadratic what the width adds depends on the place: only as std -> 0.
    quartic = [place**4 + 6 * place**2 * std**2 + 3 * std**4 for place in (at, other) for std in (1e-1,)]
    assert not torch.allclose(quartic[0] - quartic[1], at**4 - other**4, rtol=1e-3)


def test_gradient_step_is_the_best_belief_within_a_kl() -> None:
    x, y, theta = regression()
    (g,) = torch.autograd.grad(((x @ theta - y) ** 2).sum() / 2, theta)
    at, lr = theta.detach(), 1e-2
    # argmin over mu of g.mu + KL(N(mu, lr I) || N(theta, lr I)) is the gradient step of size lr.
    mu = at.clone().requires_grad_()
    objective = g @ mu + kl_divergence(Normal(mu, lr**0.5), Normal(at, lr**0.5)).sum()
    (slope,) = torch.autograd.grad(objective, mu)
    close(at - lr * slope, at - lr * g)
    best = (at - lr * g).requires_grad_()
    objective = g @ best + kl_divergence(Normal(best, lr**0.5), Normal(at, lr**0.5)).sum()
    close(torch.autograd.grad(objective, best)[0], torch.zeros(4, dtype=torch.float64), 1e-9)


def test_kl_of_consecutive_beliefs_is_the_squared_step() -> None:
    model = torch.nn.Linear(4, 1).double()
    descent = fe.unified.GradientDescentAsVI(model, std=0.3)
    x, y, _ = regression()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    descent.step(lambda data: (model(x)[:, 0] - data).square().mean(), y, lr=0.1)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    close(descent.visualize_as_inference()[0], kl_divergence(Normal(after, 0.3), Normal(before, 0.3)).sum())


def test_natural_step_of_size_one_is_bayes_rule_on_a_conjugate_model() -> None:
    x, y, _ = regression()
    precision = (x**2).sum(0) + 0.3  # of one weight alone, the others held at 0
    mean, logvar = draw(4, seed=12), draw(4, seed=19)
    # Of F = E_q[precision theta^2 / 2 - (x'y) theta] - entropy.
    of_mean, of_logvar = precision * mean - x.T @ y, (precision * logvar.exp() - 1) / 2
    moved = fe.losses.natural_step(mean, logvar, of_mean, of_logvar, 1.0)
    close(moved.mean, x.T @ y / precision)
    close(moved.logvar, -precision.log())


def test_stein_direction_descends_the_kl_at_the_rate_of_the_squared_discrepancy() -> None:
    """d KL(q_[eps] || p) / d eps = -mean(score . phi + div phi), which for phi of SVGD is minus the squared KSD."""
    particles, h = draw(12, 2, seed=13), 1.7
    scores = -particles - 0.3 * particles**3
    phi = fe.svgd_direction(particles, scores, bandwidth=h)
    place = particles.clone().requires_grad_()
    kernel = (-(place.unsqueeze(1) - particles).square().sum(-1) / h).exp()
    field = (kernel @ scores + 2 / h * (kernel.unsqueeze(-1) * (place.unsqueeze(1) - particles)).sum(1)) / 12
    close(field, phi)
    divergence = sum(
        torch.autograd.grad(field[:, k].sum(), place, retain_graph=True)[0][:, k].sum() for k in range(2)
    )
    rate = ((scores * phi).sum() + divergence) / 12
    close(rate, fe.kernel_stein_discrepancy(particles, scores, bandwidth=h, statistic="v"))


def test_gradient_flow_of_the_kl_has_a_plus_sign() -> None:
    """dq/dt = +div(q grad(log q - log p)) takes a Gaussian to the standard one: dm/dt = -m, dv/dt = 2 (1 - v)."""
    m, v, z = 0.7, 2.5, draw(9, seed=14).requires_grad_()

    def q(at: torch.Tensor, mean: float = m, var: float = v) -> torch.Tensor:
        return normal(mean, var).log_prob(at).exp()

    flux = q(z) * torch.autograd.grad((q(z).log() + z * z / 2).sum(), z, create_graph=True)[0]
    (divergence,) = torch.autograd.grad(flux.sum(), z)
    eps = 1e-6
    forward, back = (q(z.detach(), m - sign * eps * m, v + sign * eps * 2 * (1 - v)) for sign in (1, -1))
    close((forward - back) / (2 * eps), divergence, 1e-8)


def test_backward_pass_sends_the_gradients_of_the_layers_outputs() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    x, y = draw(6, 4, seed=15), draw(6, 2, seed=16)
    hidden = network[0](x)
    output = network[2](network[1](hidden))
    loss = (output - y).square().mean()
    at_output, at_hidden = torch.autograd.grad(loss, [output, hidden])
    # A layer's message is the next one's, through the weights and the slope between them; a weight's gradient is the
    # message times what the layer was given.
    close(at_hidden, at_output @ network[2].weight * (1 - hidden.tanh() ** 2))
    gradient = torch.autograd.grad((network(x) - y).square().mean(), network[0].weight)[0]
    close(gradient, at_hidden.T @ x)


def test_belief_propagation_is_exact_on_a_tree_and_stationary_for_bethe() -> None:
    edges = torch.tensor([[0, 1], [1, 2], [1, 3]])
    unary, pairwise = draw(4, 3, seed=17), draw(3, 3, 3, seed=18)
    found = fe.graph.belief_propagation(unary, edges, pairwise)
    joint = unary[0][:, None, None, None] + unary[1][:, None, None] + unary[2][:, None] + unary[3]
    joint = joint + pairwise[0][:, :, None, None] + pairwise[1][:, :, None] + pairwise[2][:, None, :]
    close(found.bethe_free_energy, -torch.logsumexp(joint.flatten(), 0))
    close(found.beliefs[2], joint.flatten().softmax(0).reshape(joint.shape).sum((0, 1, 3)))


def test_average_of_exponential_work_is_the_ratio_of_partition_functions() -> None:
    """Jarzynski's equality for a sudden switch, in closed form on Gaussians: E_0[exp(-W)] = Z_1 / Z_0."""
    nodes, weights = (
        torch.tensor([-(3**0.5), 0.0, 3**0.5]).double(),
        torch.tensor([1 / 6, 2 / 3, 1 / 6]).double(),
    )
    # Work (x - a)^2 (k - 1) / 2 of a switch from precision 1 to k, on a grid fine enough for the integral.
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    p0, k = normal(0.0, 1.0).log_prob(x).exp(), 3.0
    work = (k - 1) * x**2 / 2
    close(torch.trapezoid(p0 * (-work).exp(), x), k**-0.5)
    # And Jensen's inequality: the mean work exceeds the difference of free energies.
    assert (weights * (k - 1) * nodes**2 / 2).sum() > 0.5 * math.log(k)


def test_langevin_temperature_scales_the_stationary_variance() -> None:
    """With D frozen the variance is T / k times 1 / (1 - x (1 - b) / (2 (1 + b))), x = lr k / D."""
    k, lr, eps, temperature = 2.0, 20.0, 1e3, 0.5
    theta = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = fe.LangevinAdam(
        [theta], lr, betas=(0.9, 0.999), eps=eps, temperature=temperature, prior_precision=k, seed=3
    )
    theta.grad = torch.zeros_like(theta)
    found = []
    for step in range(700):
        optimizer.step()
        if step >= 300 and step % 20 == 0:
            found.append(theta.detach().square().mean())
    expected = temperature / k / (1 - lr * k / eps * 0.1 / (2 * 1.9))
    assert abs(torch.stack(found).mean() / expected - 1) < 0.02


def test_the_page_names_every_identity_and_no_other() -> None:
    named = re.findall(r"`(test_\w+)`", PAGE.read_text())
    here = [name for name in globals() if name.startswith("test_") and not name.startswith("test_the_page")]
    assert sorted(named) == sorted(set(named)) and sorted(named) == sorted(here)


@pytest.mark.parametrize(
    "name", ["temperature is the learning rate", "batch normalisation is reparameterisation"]
)
def test_the_page_calls_metaphors_metaphors(name: str) -> None:
    metaphors = PAGE.read_text().partition("## Metaphors")[2]
    assert name in metaphors.lower()
