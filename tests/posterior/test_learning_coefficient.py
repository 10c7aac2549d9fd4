"""The local learning coefficient where it is known, and step by step beside a plain loop and devinterp."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fekernels as fe
from fekernels._catalogue.random import LANGEVIN_NOISE
from fekernels.posterior import LearningCoefficient
from tests.support.singular_losses import (
    ONE,
    Weights,
    crossing,
    estimate,
    expected,
    masked,
    network,
    regression,
    squared,
)


def spread(found: LearningCoefficient) -> float:
    """Of the mean of chains that know nothing of each other."""
    return found.std / math.sqrt(len(found.per_chain))


@pytest.mark.parametrize(("power", "h"), [(2, 0.01), (4, 0.2), (6, 0.9)])
def test_normal_crossings(power: int, h: float) -> None:
    n_beta = 1e4
    found = estimate(
        Weights(1), crossing(power), ONE, n_beta=n_beta, lr=2 * h / n_beta, chains=4096, draws=100, burn_in=300
    )  # fmt: skip
    error = spread(found)
    finite = expected((power,), n_beta, 1.0)
    assert error < 0.008 and abs(finite - 1 / power) < error
    assert found.diagnostics.step_bias < 1.1 * error
    assert abs(found.mean - 1 / power) < 3.5 * error
    assert abs(found.mean - finite) < 3.5 * error


def test_a_product_of_two_weights_at_finite_n_beta_by_quadrature_with_the_step_that_is_chosen() -> None:
    found = estimate(
        Weights(2), crossing(2, 2), ONE, n_beta=1e4, localization=100.0, chains=2048, draws=100, burn_in=200
    )
    error = spread(found)
    exact = expected((2, 2), 1e4, 100.0)
    assert error < 0.006 and found.diagnostics.step_bias < error
    assert abs(found.mean - exact) < 3.5 * error
    assert found.diagnostics.settings["lr from"] == "curvature and gradient noise"


def test_chains_far_outside_of_the_well_choose_no_step() -> None:
    # There D = |g| + eps of w^6 makes any step seem small, and NaN is far.
    found = estimate(
        Weights(1), crossing(6), ONE, n_beta=1e4, sampler="rmsprop", chains=256, draws=50, burn_in=150
    )
    assert 0.05 < found.mean < 0.25


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_a_quadratic_of_rank_k_gives_half_of_k(sampler: str) -> None:
    rank, d = 3, 7
    directions = torch.randn(rank, d, generator=torch.Generator().manual_seed(0))

    def loss_fn(model: Any, rows: Any) -> Tensor:
        return (directions @ model()).square().sum()

    found = estimate(
        Weights(d), loss_fn, ONE, n_beta=1e5, chains=1024, draws=80, burn_in=150, sampler=sampler
    )
    biased = found.diagnostics.step_bias
    assert 0.01 < biased < 0.15
    # To first order in the step: the second order is about the square of the first.
    assert abs(found.mean - biased - rank / 2) < 3.5 * spread(found) + biased**2
    assert found.diagnostics.settings["weights"] == d


def test_a_localization_like_the_curvature_is_said_to_hold_the_estimate_down() -> None:
    def loss_fn(model: Any, rows: Any) -> Tensor:
        return model()[:4].square().sum() / 2  # of 10 weights: six are held by the localization alone

    n_beta = 1000 / math.log(1000)
    told = []
    for localization in (100.0, 1.0):
        found = estimate(
            Weights(10), loss_fn, ONE, lr=2 * 0.1 / (n_beta + localization), localization=localization, chains=1024,
            draws=200, burn_in=100,
        )  # fmt: skip
        of = found.diagnostics
        total = n_beta + localization
        assert abs(found.mean - of.step_bias - 2 * n_beta / total) < 0.1
        assert abs(of.localization_bias - 2 * n_beta * localization / total**2) < 0.06
        told.append([warning for warning in of.warnings if "the localization (100) holds" in warning])
    assert len(told[0]) == 1 and "too small by 0." in told[0][0]
    assert not told[1]


def noisy_means(batch: int) -> tuple[Any, list[Tensor]]:
    """(w - x)^2 / 2 on 2,000 points of four dimensions, at their mean."""
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(2))
    model = Weights(4)
    with torch.no_grad():
        model.w.copy_(x.mean(0))
    return model, list(x.split(batch))


def of_means(model: Any, rows: Tensor) -> Tensor:
    return (model() - rows).square().sum(1).mean() / 2


def test_what_gradient_noise_and_step_add_is_said() -> None:
    model, loader = noisy_means(40)
    n_beta, h = 2000 / math.log(2000), 0.1
    found = estimate(
        model, of_means, loader, data_size=2000, lr=2 * h / n_beta, localization=0.1, chains=16, draws=400, burn_in=60
    )  # fmt: skip
    of = found.diagnostics
    r = h * n_beta * float(torch.stack([rows.mean(0) for rows in loader]).var(0).mean()) / 2
    # From eight batches and four weights: known to a quarter.
    assert abs(of.noise_ratio / r - 1) < 0.75 and abs(of.noise_bias / (4 * r / 2) - 1) < 0.75
    relative = (1 + r) / (1 - h / 2)
    # Together from 6,400 gradients.
    assert abs((of.noise_bias + of.step_bias) / (4 * r / 2 + 4 * h / 4 * relative) - 1) < 0.05
    assert abs(found.mean - 4 / 2 * relative) < 4 * of.error < 0.5
    assert abs(found.mean - of.noise_bias - of.step_bias - 2) < 4 * of.error
    assert any("minibatch noise (r = 0." in warning for warning in of.warnings)


def test_chosen_steps_keep_noise_and_step_small_from_minibatches_too() -> None:
    model, loader = noisy_means(100)
    found = estimate(model, of_means, loader, data_size=2000, chains=16, draws=300, burn_in=150)
    of = found.diagnostics
    assert of.noise_bias + of.step_bias < 0.2 * found.mean
    assert abs(found.mean - of.noise_bias - of.step_bias - 2) < 4 * of.error
    assert of.warnings == ()


def test_the_estimate_of_some_weights_is_that_of_a_smaller_model() -> None:
    mask = torch.tensor([True, False, True, False, False, True])

    def loss_fn(model: Any, rows: Any) -> Tensor:
        return model().square().sum()

    model = Weights(6)
    with torch.no_grad():
        model.w[~mask] = 3.0  # far from the minimum, with gradients of their own
    settings: dict[str, Any] = {"n_beta": 1e4, "lr": 4e-6, "chains": 1024, "draws": 80, "burn_in": 150}
    found = estimate(model, loss_fn, ONE, masks={"w": mask}, **settings)
    assert abs(found.mean - found.diagnostics.step_bias - 1.5) < 3.5 * spread(found)
    assert found.diagnostics.settings["weights"] == 3
    assert 0.025 < found.diagnostics.step_bias < 0.035  # of three weights with h k = .04, not of six


def noise_of(parameter: int, step: int, like: Tensor, chains: int, seed: int) -> Tensor:
    """[chains, *shape]: what the optimizers add to the stacked parameters."""
    return fe.random.normal(
        (chains, *like.shape), seed=seed, stream=parameter, step=step, purpose=LANGEVIN_NOISE
    )


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
@pytest.mark.parametrize("masks", [None, masked()])
def test_the_same_as_a_plain_loop_over_single_chains(sampler: str, masks: Any) -> None:
    model, batch = network(), regression()
    lr, n_beta, gamma, chains, draws = 2e-3, 40.0, 7.0, 3, 6
    found = estimate(
        model, squared, [batch], n_beta=n_beta, localization=gamma, lr=lr, chains=chains, draws=draws, masks=masks,
        sampler=sampler, seed=9,
    )  # fmt: skip
    traces = []
    for k in range(chains):
        copied = copy.deepcopy(model).double()
        names = [name for name, _ in copied.named_parameters() if masks is None or name in masks]
        own = [dict(copied.named_parameters())[name] for name in names]
        shown = [None if masks is None else masks[name] for name in names]
        start, squares = [p.detach().clone() for p in own], [torch.zeros_like(p) for p in own]
        losses = []
        for t in range(1, draws + 1):
            loss = squared(copied, tuple(part.double() for part in batch))
            losses.append(loss.detach())
            gradients = torch.autograd.grad(loss, own)
            with torch.no_grad():
                for i, (p, g, p0, v, mask) in enumerate(
                    zip(own, gradients, start, squares, shown, strict=True)
                ):
                    v.mul_(0.99).addcmul_(g, g, value=0.01)
                    d = 1.0 if sampler == "sgld" else (v / (1 - 0.99**t)).sqrt() + 0.1
                    xi = noise_of(i, t, p, chains, 9)[k].double()
                    step = -lr / 2 * (n_beta * g + gamma * (p - p0)) / d
                    step += math.sqrt(lr) * xi / torch.as_tensor(d).sqrt()
                    p.add_(step if mask is None else step * mask)
        traces.append(torch.stack(losses))
    torch.testing.assert_close(found.trace, torch.stack(traces), rtol=1e-5, atol=1e-7)
    assert float((found.trace[:, -1] - found.init_loss).abs().min()) > 1e-3
    expected_means = n_beta * (torch.stack(traces).mean(1) - float(traces[0][0]))
    torch.testing.assert_close(found.per_chain, expected_means, rtol=1e-4, atol=1e-4)
    assert found.mean == pytest.approx(float(found.per_chain.mean()))


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_step_by_step_beside_devinterp(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("devinterp.optim", reason="devinterp is not installed").SGMCMC
    model, batch = network(), regression()
    lr, n_beta, gamma, draws = 2e-3, 40.0, 7.0, 6
    found = estimate(
        model, squared, [batch], n_beta=n_beta, localization=gamma, lr=lr, chains=1, draws=draws, sampler=sampler,
        seed=9,
    )  # fmt: skip
    shared = {"lr": lr, "nbeta": n_beta, "localization": gamma}
    parameters = list(model.parameters())
    noise = iter([
        noise_of(i, t, p, 1, 9)[0] for t in range(1, draws + 1) for i, p in enumerate(parameters)
    ])  # fmt: skip
    monkeypatch.setattr(torch, "normal", lambda *args, **kwargs: next(noise))
    if sampler == "sgld":
        optimizer = peer.sgld(parameters, **shared)
    else:
        optimizer = peer.rmsprop_sgld(parameters, alpha=0.99, eps=0.1, **shared)
    squares = [torch.zeros_like(p) for p in parameters]
    losses = []
    for t in range(1, draws + 1):
        optimizer.zero_grad()
        loss = squared(model, batch)
        losses.append(loss.detach().double())
        loss.backward()
        for p, v in zip(parameters, squares, strict=True):
            # It has no bias correction: an average that becomes the corrected one when the step has added its part.
            v.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
            if sampler == "rmsprop":
                optimizer.state[p]["square_avg"] = (v / (1 - 0.99**t) - 0.01 * p.grad**2) / 0.99
        optimizer.step()
    torch.testing.assert_close(found.trace[0], torch.stack(losses), rtol=1e-5, atol=1e-7)


def test_digits_over_training() -> None:
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    batch = torch.tensor(data.data[:400] / 16, dtype=torch.float32), torch.tensor(data.target[:400])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss_fn(network: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(rows[0]), rows[1])

    estimates = []
    for steps in (0, 40, 280):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        estimates.append(
            estimate(model, loss_fn, [batch], data_size=400, localization=100.0, lr=1e-3, draws=80, burn_in=80)
        )  # fmt: skip
    untrained, trained, late = (found.mean for found in estimates)
    errors = [found.diagnostics.error for found in estimates]
    assert untrained < -3 * errors[0]
    assert trained > 4 * errors[1]
    # Where the classes can be told apart, cross entropy has no minimum: it goes to 0, and all directions become flat.
    assert 4 * errors[2] < late < trained / 2
    negative = ["negative" in " ".join(found.diagnostics.warnings) for found in estimates]
    assert negative[0] and not any(negative[1:])
