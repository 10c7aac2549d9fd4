"""The document's inference over weights: called as it calls it, and beside the closed forms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from fekernels.unified import (
    BayesianOptimizer,
    GradientAsMessagePassing,
    GradientDescentAsVI,
    optimization_as_inference,
)
from tests.support.tensors import bits_equal


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_optimization_as_inference() -> None:
    data = Normal(torch.tensor(2.0), 1.0).sample((50,))
    prior = Normal(torch.tensor(0.0), torch.tensor(3.0))
    fit = optimization_as_inference(data, lambda theta: Normal(theta, 1.0), prior)
    precision = 50 + 1 / 9
    assert abs(fit.q.loc - data.sum() / precision) < 1e-3
    assert abs(fit.q.scale * precision**0.5 - 1) < 0.1
    covariance = torch.eye(50) + 9 * torch.ones(50, 50)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(50), covariance).log_prob(data)
    assert abs(fit.elbo - evidence) < 4 * fit.standard_error + 0.02 < 0.4 and fit.converged
    with pytest.raises(TypeError, match=r"model\(theta\) must be a torch.distributions.Distribution"):
        optimization_as_inference(data, lambda theta: theta, prior)
    with pytest.raises(TypeError, match="prior must be a torch.distributions.Normal; got NoneType"):
        optimization_as_inference(data, lambda theta: Normal(theta, 1.0), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must give one number, a sum over data; got shape \(50,\)"):
        optimization_as_inference(data, lambda theta: theta, prior, log_likelihood=lambda d, theta: theta - d)


@pytest.mark.parametrize(
    ("counts", "dtype"), [((3.0, 4.0, 5.0), torch.float64), ((300.0, 400.0, 500.0), torch.float32)]
)
def test_optimization_as_inference_from_a_prior_far_too_wide(
    counts: tuple[float, ...], dtype: torch.dtype
) -> None:
    """Counts of rate exp(theta), theta ~ N(0, 10^2): draws of the prior have rates from e^-30 to e^30."""
    y = torch.tensor(counts, dtype=dtype)
    prior = Normal(torch.zeros((), dtype=dtype), torch.full((), 10.0, dtype=dtype))

    def model(theta: torch.Tensor) -> torch.distributions.Poisson:
        return torch.distributions.Poisson(theta.exp(), validate_args=False)

    # The best Gaussian, whose bound is in closed form: E[exp(theta)] = exp(m + s^2 / 2).
    wide = y.double()
    mean, logvar = wide.mean().log().requires_grad_(), torch.tensor(-3.0).double().requires_grad_()
    search = torch.optim.LBFGS(
        [mean, logvar], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def minus_bound() -> torch.Tensor:
        search.zero_grad()
        fit_to_data = wide.sum() * mean - 3 * (mean + logvar.exp() / 2).exp() - torch.lgamma(wide + 1).sum()
        kl = torch.distributions.kl_divergence(Normal(mean, (logvar / 2).exp()), prior)
        (kl - fit_to_data).backward()
        return kl - fit_to_data

    search.step(minus_bound)
    fit = optimization_as_inference(y, model, prior, samples=4)
    std = float((logvar / 2).exp())
    assert fit.converged and abs(fit.q.loc - mean) < 0.1 * std and abs(fit.q.scale / std - 1) < 0.1
    assert abs(fit.elbo + float(minus_bound())) < 4 * fit.standard_error + 0.02
    with pytest.warns(
        UserWarning, match=r"q has not settled after 8 steps: a mean would move by \d.* where 0.2 is"
    ):
        assert not optimization_as_inference(y, model, prior, samples=4, steps=8).converged


@pytest.mark.parametrize("seed", range(3))
def test_optimization_as_inference_leaves_a_saddle(seed: int) -> None:
    """y = a b: at the prior's mean, 0, the gradient is 0 by symmetry, 39 nats below the modes."""
    data, prior = torch.full((20,), 2.0), Normal(torch.zeros(2), 2.0)
    fit = optimization_as_inference(data, lambda theta: Normal(theta[0] * theta[1], 1.0), prior, seed=seed)
    side = torch.linspace(-10, 10, 1001).double()
    a, b = torch.meshgrid(side, side, indexing="ij")
    joint = (
        20 * Normal(0.0, 1.0).log_prob(a * b - 2)
        + Normal(0.0, 2.0).log_prob(a)
        + Normal(0.0, 2.0).log_prob(b)
    )
    evidence = float(torch.logsumexp(joint, (0, 1))) + 2 * math.log(0.02)
    assert fit.converged and abs(fit.q.loc.prod() - 2) < 0.1
    # Two modes on a ridge that is no Gaussian's cost a bound what they cost.
    assert evidence - 3 < fit.elbo < evidence + 4 * fit.standard_error


def test_a_saddle_that_is_reached_on_the_way_is_left() -> None:
    """No draw of the prior has a value, and of c, a b only c has a gradient at its mean."""

    def log_likelihood(data: None, theta: torch.Tensor) -> torch.Tensor:
        if theta[:2].detach().abs().max() > 4:
            raise ValueError("out of the model's domain")
        return -10 * (theta[0] * theta[1] - 2) ** 2 - (theta[2] - 3) ** 2

    prior = Normal(torch.zeros(3), torch.tensor([100.0, 100.0, 2.0]))
    fit = optimization_as_inference(  # one step: q is where it began
        None, lambda theta: theta, prior, log_likelihood=log_likelihood, steps=1, seed=1
    )
    assert abs(fit.q.loc[0] * fit.q.loc[1] - 2) < 0.5


def test_bayesian_optimizer() -> None:
    """On a conjugate regression: q's means and deviations are the posterior's, of independent columns."""
    x = torch.linalg.qr(torch.randn(200, 3))[0] * 200**0.5
    y = x @ torch.tensor([[0.5], [-0.2], [0.1]]) + torch.randn(200, 1)
    model = nn.Linear(3, 1, bias=False)
    optimizer = BayesianOptimizer(model, prior_std=1.0, seed=0)

    def loss_fn(data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return -Normal(model(data[0]), 1.0).log_prob(data[1]).sum()

    first = optimizer.step(loss_fn, (x, y))
    means, deviations, values = [], [], []
    for step in range(500):
        values.append(optimizer.step(loss_fn, (x, y)))
        if step >= 250:
            means.append(optimizer.q_mean["weight"])
            deviations.append(optimizer.q_std["weight"])
    assert isinstance(first, float)
    precision = 200 + 1
    close = torch.stack(means).mean(0) - (x.T @ y / precision).T
    assert close.abs().max() < 0.3 * precision**-0.5
    assert (torch.stack(deviations).mean(0) * precision**0.5 - 1).abs().max() < 0.1
    # The free energy is above minus the evidence, and near it: its q has the posterior's form.
    covariance = torch.eye(200) + x @ x.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(200), covariance).log_prob(y[:, 0])
    settled = sum(values[250:]) / 250
    assert -evidence - 0.2 < settled < -evidence + 0.5 < first
    before = (optimizer.q_mean["weight"], optimizer.q_std["weight"])
    with pytest.raises(
        FloatingPointError, match="BayesianOptimizer.step: loss_fn must give a finite loss; got nan"
    ):
        optimizer.step(lambda data: loss_fn(data) * math.nan, (x, y))
    assert bits_equal(before[0], optimizer.q_mean["weight"]) and bits_equal(
        before[1], optimizer.q_std["weight"]
    )
    with pytest.raises(ValueError, match="init_std must be below prior_std"):
        BayesianOptimizer(model, prior_std=1.0, init_std=1.0)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got int"):
        BayesianOptimizer(3)  # type: ignore[arg-type]


def test_gradient_descent_as_variational_inference() -> None:
    model = nn.Linear(10, 1)
    optimizer_as_vi = GradientDescentAsVI(model)
    x, y = torch.randn(100, 10), torch.randn(100, 1)
    for _ in range(10):
        loss = ((model(x) - y) ** 2).mean()
        optimizer_as_vi.step(lambda d, loss=loss: loss, None)
    history = optimizer_as_vi.visualize_as_inference()
    weights = [*optimizer_as_vi.param_history, dict(model.named_parameters())]
    moved = [
        sum(float(((b[name] - a[name]) ** 2).sum()) for name in a) / 2
        for a, b in zip(weights, weights[1:], strict=False)
    ]
    assert len(history) == 10 and history == pytest.approx(moved, rel=1e-4)
    assert history == sorted(history, reverse=True)  # of a convex loss: it learns less at every step
    again = copy.deepcopy(optimizer_as_vi)
    again.step(lambda d: ((again.model(x) - y) ** 2).mean(), None)
    assert len(again.visualize_as_inference()) == len(again.param_history) == 11


def messages_sent(given: object) -> None:
    GradientAsMessagePassing(4, 4, 1).update_with_messages(given)  # type: ignore[arg-type]


def backward_of(loss: object) -> None:
    GradientAsMessagePassing(4, 4, 1).backward_as_messages(loss)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(()), TypeError, "loss_fn must be callable, data -> a scalar tensor; got Tensor"),
        (lambda d: 0.5, TypeError, "loss_fn must return a scalar tensor; got float"),
        (lambda d: None, TypeError, "loss_fn must return a scalar tensor; got NoneType"),
        (lambda d: d, ValueError, r"loss_fn must return a scalar tensor; got shape \(5, 1\)"),
        (lambda d: d.detach().sum(), ValueError, "loss_fn must return a loss with a gradient"),
    ],
)
@pytest.mark.parametrize("kind", [BayesianOptimizer, GradientDescentAsVI])
def test_losses_that_are_none(kind: Any, given: Any, error: type[Exception], message: str) -> None:
    model = nn.Linear(4, 1)
    before = model.weight.detach().clone()
    optimizer = kind(model)
    loss_fn = (lambda x: given(model(x))) if callable(given) else given
    with pytest.raises(error, match=f"{kind.__name__}.step: {message}"):
        optimizer.step(loss_fn, torch.randn(5, 4))
    assert bits_equal(before, model.weight.detach())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: messages_sent(0.1),
            TypeError,
            "messages must be what backward_as_messages returns, .* got float",
        ),
        (lambda: messages_sent([0.1] * 3), TypeError, r"messages\[0\] must be a dict; got float"),
        (lambda: messages_sent([]), ValueError, "messages must be of 3 layers; got 0"),
        (lambda: backward_of(0.1), TypeError, "loss must be a scalar tensor; got float"),
        (lambda: backward_of(torch.zeros(5)), ValueError, r"loss must be a scalar tensor; got shape \(5,\)"),
    ],
)
def test_messages_that_are_none(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"GradientAsMessagePassing.*: {message}"):
        call()
