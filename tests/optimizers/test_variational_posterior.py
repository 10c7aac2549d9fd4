"""What fe.VariationalAdam learns: exact posteriors, the KL, the free energy, samples to predict with."""

import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from tests.optimizers.test_variational_adam import ESTIMATORS, all_of, make, parameters, train
from tests.support.optimizers import BF16, F32, F64

N, DECAY, VARIANCE = 200, 0.01, 0.09


def regression() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets, and the posterior's mean and standard deviations; inputs are orthogonal, as q has it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(N, 3, generator=generator, dtype=F64))[0] * math.sqrt(N)
    x *= torch.tensor([0.5, 1.0, 2.0])
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    y += math.sqrt(VARIANCE) * torch.randn(N, generator=generator, dtype=F64)
    precision = x.T @ x / VARIANCE + N * DECAY * torch.eye(3)
    return x, y, torch.linalg.solve(precision, x.T @ y / VARIANCE), precision.diagonal().rsqrt()


COPIES = 100  # of the same posterior, whose averages have a tenth of one's noise
# Where they begin: from 0, and, as Adam's second moments forget the way there only slowly, from nearby.
SETTINGS = {
    "natural": (dict(lr=0.1, betas=(0.9, 0.995)), 0.0),
    "softplus": (dict(lr=0.02, betas=(0.9, 0.995), estimator="reparam"), 0.9),
    "log": (dict(lr=0.02, betas=(0.9, 0.995), estimator="reparam", scale="log"), 0.9),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_conjugate_regression_is_reached(case):
    x, y, mean, sd = regression()
    x, y = x.float(), y.float()
    (options, start), steps = SETTINGS[case], 1000
    param = nn.Parameter((start * mean.float()).repeat(COPIES, 1))
    optimizer = fe.VariationalAdam([param], ess=N, hess_init=10.0, weight_decay=DECAY, seed=3, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def nll() -> Tensor:
        return (param @ x.T - y).square().mean(1).sum() / (2 * VARIANCE)

    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            nll().backward()
        optimizer.step()
        schedule.step()
    ((found_mean, found_sd),) = optimizer.posterior()
    torch.testing.assert_close(found_mean.double().mean(0), mean, rtol=0.01, atol=0)
    torch.testing.assert_close(found_sd.double().mean(0), sd, rtol=0.05, atol=0)

    # E_q of the quadratic in closed form: the free energy is minus the log evidence per point there.
    with torch.no_grad():
        expected = (nll() + (x.square().mean(0) * found_sd.square()).sum() / (2 * VARIANCE)) / COPIES
    joint = torch.distributions.MultivariateNormal(
        torch.zeros(N, dtype=F64), VARIANCE * torch.eye(N) + x.double() @ x.double().T / (N * DECAY)
    )
    evidence = joint.log_prob(y.double()) + N / 2 * math.log(2 * math.pi * VARIANCE)
    found = expected + optimizer.kl() / N / COPIES
    assert found.item() == pytest.approx(-evidence.item() / N, abs=2e-4)


def gaussian_kl_of(optimizer: fe.VariationalAdam) -> Tensor:
    total = torch.zeros((), dtype=F64)
    for gaussian in optimizer.posterior():
        group = optimizer.param_groups[0]
        prior_sd = (group["ess"] * group["weight_decay"]) ** -0.5
        q = torch.distributions.Normal(gaussian.mean.double(), gaussian.std.double())
        total += torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, prior_sd)).sum()
    return total


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("T", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_is_that_to_the_prior_inside_and_outside_of_contexts(estimator, T, dtype):
    optimizer = make(parameters(dtype), estimator=estimator, temperature=T)
    for steps in (0, 3):
        train(optimizer, steps)
        kl = optimizer.kl()
        torch.testing.assert_close(kl, gaussian_kl_of(optimizer), rtol=2e-6, atol=0)
        with optimizer.sampled_params():
            assert optimizer.kl() == kl
            inside = optimizer.posterior()
        for a, b in zip(inside, optimizer.posterior(), strict=True):
            assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)


@pytest.mark.parametrize("T", [1.0, 0.5])
def test_free_energy_is_what_is_minimised(T):
    """Its gradient in the mean and the deviations is that of the tempered objective."""
    optimizer = make(temperature=T, estimator="reparam")
    train(optimizer, 2)
    kl = gaussian_kl_of(optimizer)
    entropy = sum(
        torch.distributions.Normal(0.0, g.std.double()).entropy().sum() for g in optimizer.posterior()
    )
    expected = 1.25 + (kl + (1 - T) * entropy) / 40.0
    for nll in (1.25, torch.tensor(1.25), torch.tensor(1.25, dtype=F64, requires_grad=True)):
        found = optimizer.free_energy(nll)
        assert type(found) is type(nll) and float(found) == pytest.approx(float(expected), rel=1e-6)


def test_free_energy_sums_over_groups_with_their_own_ess():
    params = parameters()
    optimizer = make([{"params": params[:1], "ess": 4.0}, {"params": params[1:]}])
    parts = [make(params[:1], ess=4.0, seed=1), make(params[1:], seed=2)]
    expected = sum(part.kl() / part.param_groups[0]["ess"] for part in parts)
    assert optimizer.free_energy(0.0) == pytest.approx(float(expected))


def test_without_a_prior_there_is_no_kl():
    optimizer = make(weight_decay=0.0)
    with pytest.raises(ValueError, match="VariationalAdam.kl: weight_decay must be finite and > 0; got 0"):
        optimizer.kl()
    with pytest.raises(ValueError, match="VariationalAdam.free_energy: temperature must be finite and > 0"):
        make(temperature=0.0).free_energy(1.0)
    with pytest.raises(TypeError, match="VariationalAdam.free_energy: nll must be a number; got str"):
        make().free_energy("1.0")


def test_the_kl_of_a_narrow_and_of_a_wide_gaussian_keeps_its_digits():
    """At q = prior it is 0, near it of second order: h / weight_decay squared, over 4."""
    params = [nn.Parameter(torch.zeros(1000))]
    for ratio in (1e-6, 1e-3, 0.5, 1.0, 1e3, 1e8):
        optimizer = make(params, hess_init=ratio * 0.05)
        exact = 1000 * 0.5 * (math.log1p(ratio) - ratio / (1 + ratio))
        assert optimizer.kl().item() == pytest.approx(exact, rel=2e-6 if ratio > 1e-4 else 1e-4)


def test_posterior_samples_predict_with_draws():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = fe.VariationalAdam(model.parameters(), 0.1, 50.0, seed=1)
    before = [param.detach().clone() for param in model.parameters()]
    samples = fe.PosteriorSamples(model)
    for _ in range(200):
        with optimizer.sampled_params():
            samples.collect()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    drawn = torch.stack([sample["weight"] for sample in samples])
    (weight, _) = optimizer.posterior()
    # 200 draws of 12 elements: the variance's standard error is 2.9% of it.
    assert abs((drawn - weight.mean).square().mean() / weight.std.square().mean() - 1) < 5 * 0.029
    prediction = samples.predict(torch.randn(5, 4))
    assert prediction.mean.shape == (5, 3) and (prediction.mutual_information > 0).all()
    assert all_of(optimizer)[0] is model.weight


def stepped(steps: int, **options: object) -> fe.VariationalAdam:
    param = nn.Parameter(torch.zeros(3))
    optimizer = fe.VariationalAdam([param], 0.1, 50.0, seed=1, **options)
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (3 * param.square()).sum().backward()
        optimizer.step()
    return optimizer


def evaluate(optimizer: fe.VariationalAdam) -> None:
    with optimizer.sampled_params():
        pass


SHORT = (0.9, 0.99)


@pytest.mark.parametrize(
    ("steps", "options", "look", "told"),
    [
        (300, {}, fe.VariationalAdam.posterior, "after 300 steps h is still 100% its start, hess_init=1"),
        (300, {}, evaluate, "betas.1.=0.99999 averages over about 100,000 steps"),
        (60, {"betas": SHORT}, fe.VariationalAdam.posterior, "after 60 steps h is still 55%"),
        (60, {"betas": SHORT}, evaluate, None),
        (300, {"betas": SHORT}, fe.VariationalAdam.posterior, None),
        (300, {"betas": SHORT}, evaluate, None),
        (0, {}, fe.VariationalAdam.posterior, None),
        (20, {}, evaluate, None),
        (300, {"estimator": "reparam"}, fe.VariationalAdam.posterior, None),
    ],
)
def test_deviations_that_are_still_the_starts_are_told_of_once(steps, options, look, told):
    optimizer = stepped(steps, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            look(optimizer)
    assert len(said) == (told is not None)
    if told is not None:
        assert re.search(told, str(said[0].message))
