"""Whether the optimizers sample what they say they do: against exact variances, quadrature, and Adam's optimum.

Elements are independent chains, so one moment in time gives standard errors of sqrt(2 / n) for a variance. All bounds
are 5 of them; a factor of 2 in any term of a rule is off by hundreds.
"""

import math

import numpy as np
import pytest
import torch

import fekernels as fe
from tests.support.formulas import noise_start
from tests.support.implementations import CPU_PLACES
from tests.support.optimizers import NOISES

N = 250_000
FROZEN = 1e8  # as eps it dwarfs every sqrt(v), so that D = eps, and lr / eps is the step h of the formulas


@pytest.fixture(autouse=True)
def compiled():
    """A million elements are for compiled kernels."""
    obstacle = CPU_PLACES[1].obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)


def frozen(p, h, temperature, beta1, noise="momentum", **keywords):
    return fe.LangevinAdam(
        [p], h * FROZEN, (beta1, 0.999), FROZEN, temperature=temperature, noise=noise, seed=42, **keywords
    )


def run(p, optimizer, steps, gradient):
    p.grad = torch.empty_like(p)
    for _ in range(steps):
        with torch.no_grad():
            gradient(p, p.grad)
        optimizer.step()


def quadratic(k):
    return lambda p, out: torch.mul(p, k, out=out)


def assert_variance(values, expected, errors=5.0):
    values = values.detach().double()
    ratio = values.square().mean().item() / expected
    assert abs(ratio - 1) < errors * math.sqrt(2 / values.numel()), ratio


# MATH: the exact stationary variances of U = k theta^2 / 2, with x = h k and b = beta1.


def stationary(noise, b, x):
    lag = 1 - x * (1 - b) / (2 * (1 + b))
    return 1 / lag if noise == "momentum" else (1 + 2 * b * x / (1 - b * b)) / lag


@pytest.mark.parametrize(("b", "x", "steps"), [(0.9, 0.1, 200), (0.5, 0.5, 60), (0.0, 0.4, 40)])
@pytest.mark.parametrize("noise", NOISES)
def test_stationary_variance(noise, b, x, steps):
    k, temperature = 2.0, 0.7
    expected = temperature / k * stationary(noise, b, x) * (FROZEN if noise == "isotropic" else 1)
    p = torch.randn(N).mul_(math.sqrt(expected)).requires_grad_()
    run(p, frozen(p, x / k, temperature, b, noise), steps, quadratic(k))
    assert_variance(p, expected)


def test_stationary_variance_of_sgld():
    k, x, temperature = 2.0, 0.6, 0.7
    expected = temperature / k / (1 - x / 2)
    p = torch.zeros(N, requires_grad=True)
    run(p, fe.SGLD([p], x / k, temperature=temperature, seed=1), 30, quadratic(k))
    assert_variance(p, expected)


@pytest.mark.parametrize("make", ["LangevinAdam", "SGLD"])
def test_a_prior_adds_its_precision_around_its_anchor(make):
    k, precision, temperature, center = 1.0, 3.0, 0.5, 2.0
    p = torch.zeros(N // 2, requires_grad=True)
    keywords = dict(prior_precision=precision, anchor=[torch.full_like(p, center)])
    if make == "SGLD":
        optimizer = fe.SGLD([p], 0.05, temperature=temperature, seed=1, **keywords)
        steps, inflation = 100, 1 / (1 - 0.05 * (k + precision) / 2)
    else:
        # h * precision bounds D from below: eps must be the larger for D to be eps
        optimizer = frozen(p, 0.02, temperature, 0.9, **keywords)
        steps, inflation = 250, stationary("momentum", 0.9, 0.02 * (k + precision))
    run(p, optimizer, steps, quadratic(k))
    variance = temperature / (k + precision) * inflation
    mean = p.detach().double().mean().item()
    assert abs(mean - center * precision / (k + precision)) < 5 * math.sqrt(variance / p.numel())
    assert_variance(p.detach() - mean, variance)


# From a standing start: bias correction must not count the first noises several times.


def variances_from_rest(b, x, steps):
    """Exact variances of theta at T = k = 1 from (theta, m) = 0, by the recursion of the 2 x 2 covariance."""
    covariance, result = np.zeros((2, 2)), []
    for t in range(1, steps + 1):
        bc1 = 1 - b**t
        drive = (1 - b) * noise_start(b, t) * math.sqrt(2 / x)  # at D = 1, h = x
        gain = np.array([[1 - x * (1 - b) / bc1, -x * b / bc1], [1 - b, b]])
        kick = np.array([[-x * drive / bc1], [drive]])
        covariance = gain @ covariance @ gain.T + kick @ kick.T
        result.append(covariance[0, 0])
    return result


def test_variance_from_a_standing_start():
    x, steps = 0.1, 60
    expected = variances_from_rest(0.9, x, steps)
    assert max(expected) < 1.01  # without c_t it is 1.57 after ten steps
    p = torch.zeros(N, requires_grad=True)
    optimizer = frozen(p, x, 1.0, 0.9)
    for t in range(1, steps + 1):
        run(p, optimizer, 1, quadratic(1.0))
        if t in (1, 2, 3, 5, 8, 13, 21, 34, 60):
            assert_variance(p, expected[t - 1])


def test_variance_through_restarts_of_the_lr():
    p = torch.randn(N // 4, requires_grad=True)
    optimizer = frozen(p, 0.1, 1.0, 0.9)
    group = optimizer.param_groups[0]
    run(p, optimizer, 100, quadratic(1.0))
    seen = []
    for i in range(3 * 80 + 1):
        fraction = i % 80 / 79
        group["lr"] = (1e-4 + (0.1 - 1e-4) * (1 + math.cos(math.pi * fraction)) / 2) * FROZEN
        run(p, optimizer, 1, quadratic(1.0))
        seen.append(p.detach().double().square().mean().item())
    slack = 5 * math.sqrt(2 / p.numel())
    assert 0.96 - slack < min(seen) and max(seen) < 1.01 + slack


@pytest.mark.parametrize("noise", NOISES)
def test_variance_follows_a_changed_temperature(noise):
    scale = FROZEN if noise == "isotropic" else 1
    p = torch.zeros(N // 2, requires_grad=True)
    optimizer = frozen(p, 0.1, 1.0, 0.9, noise)
    for temperature in (1.0, 0.2, 0.0):
        optimizer.param_groups[0]["temperature"] = temperature
        run(p, optimizer, 200, quadratic(1.0))
        if temperature:
            assert_variance(p, temperature * stationary(noise, 0.9, 0.1) * scale)
    # Without noise a chain falls as sqrt(beta1)^t, by 3e-5 in 200 steps; the farthest was five deviations out.
    assert p.abs().max() < 1e-3 * math.sqrt(scale)


# Other targets. Not Gaussian: with the preconditioner adapting as it does in use.


def quadrature(energy, temperature, *functions):
    x = np.linspace(-6, 6, 200_001)
    weight = np.exp(-energy(x) / temperature)
    weight /= weight.sum()
    moments = []
    for f in functions:
        mean = (weight * f(x)).sum()
        moments.append((mean, (weight * (f(x) - mean) ** 2).sum()))
    return moments


TARGETS = {
    "quartic": (lambda x: x**4 / 4, lambda p: p**3),
    "double_well": (lambda x: (x**2 - 1) ** 2, lambda p: 4 * p * (p * p - 1)),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_is_not_gaussian(target):
    # One second moment a chain, so it must average over many correlation times for the chain to forget that it made it.
    energy, slope = TARGETS[target]
    temperature = 0.8
    p = torch.randn(60_000).requires_grad_()
    optimizer = fe.LangevinAdam([p], 0.05, (0.9, 0.9995), 2.0, seed=3)
    run(p, optimizer, 100, lambda p, out: out.copy_(slope(p)))  # T = 0 first
    optimizer.param_groups[0]["temperature"] = temperature
    run(p, optimizer, 1000, lambda p, out: out.copy_(slope(p)))
    functions = (lambda x: x, lambda x: x**2, lambda x: x**4, lambda x: (x * x < 0.25) * 1.0)
    values = p.detach().double().numpy()
    for f, (mean, variance) in zip(functions, quadrature(energy, temperature, *functions), strict=True):
        assert abs(f(values).mean() - mean) < 5 * math.sqrt(variance / values.size)


def test_covariance_of_a_correlated_gaussian():
    precision = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    temperature, h = 0.5, 0.1
    p = torch.randn(N // 4, 2).requires_grad_()
    run(p, frozen(p, h, temperature, 0.9), 400, lambda p, out: torch.matmul(p, precision, out=out))
    got = p.detach().double().T @ p.detach().double() / p.shape[0]
    eigenvalues, vectors = np.linalg.eigh(precision.double().numpy())
    variances = [temperature / k * stationary("momentum", 0.9, h * k) for k in eigenvalues]
    want = torch.from_numpy(vectors @ np.diag(variances) @ vectors.T)
    errors = ((want.diag()[:, None] * want.diag() + want**2) / p.shape[0]).sqrt()
    assert ((got - want).abs() < 5 * errors).all(), (got - want) / errors


def test_cooled_training_ends_where_adam_ends():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]) + torch.randn(400, generator=generator) > 0).float()

    def train(make, temperature):
        w = torch.zeros(5, requires_grad=True)
        optimizer = make([w], lr=0.05)
        farthest = 0.0
        for i in range(600):
            if temperature:
                optimizer.param_groups[0]["temperature"] = temperature * max(0.0, 1 - i / 300)
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y) + 0.01 * w.square().sum()
            loss.backward()
            optimizer.step()
            farthest = (
                max(farthest, (w.detach() - ends[-1]).abs().max().item()) if ends and i > 150 else farthest
            )
        return w.detach(), loss.item(), farthest

    ends = []
    end, adam_loss, _ = train(torch.optim.Adam, 0.0)
    ends.append(end)
    end, loss, farthest = train(lambda p, lr: fe.LangevinAdam(p, lr, eps=0.1, seed=0), 0.01)
    assert farthest > 0.05  # it did wander
    # How near 300 steps of Adam come to a minimum; the loss there is quadratic in the distance.
    assert (end - ends[0]).abs().max() < 1e-3 and abs(loss - adam_loss) < 1e-6
