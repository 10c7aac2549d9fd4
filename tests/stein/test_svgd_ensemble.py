"""fe.SVGD.from_model: members, their densities and buffers, predictions, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fekernels as fe
from fekernels.stein.ensemble import SVGDEnsemble
from fekernels.stein.svgd import SVGD


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def with_buffers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def data(n: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    x = fe.random.normal((n, 4), seed=21)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def member_of(ensemble: SVGDEnsemble, k: int, make=network) -> nn.Module:
    module = make()
    module.load_state_dict(ensemble.parameters_of(k))
    return module


def test_scores_are_those_of_each_network_alone() -> None:
    x, y = data()
    ensemble = SVGD.from_model(network, F.cross_entropy, size=3, prior_precision=0.3, seed=1)
    assert isinstance(ensemble, SVGDEnsemble) and ensemble.particles.shape == (3, 43) and ensemble.size == 3
    scores, log_prob = ensemble._target.evaluate(ensemble.particles, (x, y))
    for k in range(3):
        module = member_of(ensemble, k)
        squares = sum(param.square().sum() for param in module.parameters())
        loss = F.cross_entropy(module(x), y) + 0.15 * squares
        grads = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(scores[k], -torch.cat([grad.flatten() for grad in grads]))
        torch.testing.assert_close(log_prob[k], -loss.detach())


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_without_interaction_members_train_alone(chunk_size: int | None) -> None:
    """bandwidth=0: the direction is score / n, so descent at lr n is each member's own. Batch normalisation too."""
    x, y = data()
    ensemble = SVGD.from_model(
        with_buffers,
        F.cross_entropy,
        size=3,
        bandwidth=0,
        optimizer="sgd",
        lr=0.3,
        seed=1,
        chunk_size=chunk_size,
    )
    modules = [member_of(ensemble, k, with_buffers) for k in range(3)]
    for start in (0, 10, 20):
        batch = x[start : start + 10], y[start : start + 10]
        ensemble.step(*batch)
        for module in modules:
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            F.cross_entropy(module(batch[0]), batch[1]).backward()
            optimizer.step()
            module.zero_grad()
    for k, module in enumerate(modules):
        own = ensemble.parameters_of(k)
        assert int(own["1.num_batches_tracked"]) == 3
        for name, value in module.state_dict().items():
            torch.testing.assert_close(own[name], value, msg=f"{k} {name}", atol=1e-6, rtol=1e-5)


def test_the_direction_is_that_of_the_flattened_weights() -> None:
    x, y = data()
    ensemble = SVGD.from_model(
        network,
        F.cross_entropy,
        size=4,
        optimizer="sgd",
        lr=1.0,
        temperature=1 / 30,
        prior_precision=0.1,
        seed=1,
    )
    before = ensemble.particles.clone()
    scores, _ = ensemble._target.evaluate(before, (x, y))
    ensemble.step(x, y)
    torch.testing.assert_close(
        ensemble.particles, before + fe.svgd_direction(before, scores, temperature=1 / 30)
    )


def test_repulsion_keeps_members_apart() -> None:
    """What a quadratic loss of the output would pull together."""
    x = fe.random.normal((20, 4), seed=3)

    def spread(**settings) -> float:
        ensemble = SVGD.from_model(
            nn.Linear(4, 2), lambda output: output.square().mean(), size=5, seed=1, lr=0.05, **settings
        )
        result = ensemble.run(200, batches=[x], progress=False)
        assert len(result.discrepancy) and ensemble.log_prob.shape == (5,)
        return float(fe.pairwise_sq_dist_median(ensemble.particles, include_diagonal=False))

    assert spread(temperature=0.0) < 1e-3 < 0.1 < spread(temperature=1.0)


def test_predictions_average_over_the_members() -> None:
    x, y = data()
    ensemble = SVGD.from_model(with_buffers, F.cross_entropy, size=4, seed=1)
    ensemble.run(5, batches=[(x, y)], progress=False)
    state = ensemble.state_dict()
    outputs = []
    for k in range(4):
        module = member_of(ensemble, k, with_buffers).eval()
        outputs.append(module(x).detach())
    for output, expected in zip(ensemble.outputs(x), outputs, strict=True):
        torch.testing.assert_close(output, expected)
    prediction = ensemble.predict(x)
    probabilities = torch.stack(outputs).double().softmax(-1)
    torch.testing.assert_close(prediction.mean, probabilities.mean(0), atol=1e-6, rtol=1e-6)
    assert prediction.count == 4 and bool((prediction.mutual_information >= 0).all())
    regression = ensemble.predict((x,), activation=None)
    torch.testing.assert_close(
        regression.std, torch.stack(outputs).double().std(0, correction=0), atol=1e-6, rtol=1e-6
    )
    assert torch.equal(ensemble.state_dict()["target"]["1.running_mean"], state["target"]["1.running_mean"])
    assert ensemble._target.skeleton.training
    with pytest.raises(ValueError, match="activation must be .*; got 'relu'"):
        ensemble.predict(x, activation="relu")


def test_initial_weights() -> None:
    seeded = torch.random.get_rng_state()
    ones = [SVGD.from_model(network, F.cross_entropy, size=k, seed=7).particles for k in (3, 5)]
    assert torch.equal(ones[0], ones[1][:3])  # a member does not depend on how many there are
    assert len(ones[1].unique(dim=0)) == 5
    module = network()
    seeded = torch.random.get_rng_state()
    kept = copy.deepcopy(module.state_dict())
    reset = SVGD.from_model(module, F.cross_entropy, size=3, seed=7).particles
    assert torch.equal(torch.random.get_rng_state(), seeded)
    assert all(torch.equal(kept[name], value) for name, value in module.state_dict().items())
    assert len(reset.unique(dim=0)) == 3 and float(reset.abs().max()) < 1
    assert not torch.equal(reset, SVGD.from_model(module, F.cross_entropy, size=3, seed=8).particles)
    modules = [network() for _ in range(3)]
    given = SVGD.from_model(modules, F.cross_entropy)
    for row, member in zip(given.particles, modules, strict=True):
        assert torch.equal(row, nn.utils.parameters_to_vector(member.parameters()))


def test_frozen_parameters_stay() -> None:
    x, y = data()

    def make() -> nn.Module:
        module = network()
        module[0].requires_grad_(False)
        return module

    ensemble = SVGD.from_model(make, F.cross_entropy, size=2, seed=1)
    assert ensemble.particles.shape == (2, 18)
    ensemble.step(x, y)
    assert ensemble.parameters_of(0).keys() == {"2.weight", "2.bias"}


def test_a_loss_that_is_not_finite_leaves_buffers_alone() -> None:
    x, y = data()
    ensemble = SVGD.from_model(with_buffers, F.cross_entropy, size=3, seed=1)
    ensemble.run(3, batches=[(x, y)], progress=False)
    before = ensemble.state_dict()
    with pytest.raises(ValueError, match="got nan for particle 0 at step 4"):
        ensemble.step(x.log(), y)
    for name, buffer in ensemble.state_dict()["target"].items():
        assert torch.equal(buffer, before["target"][name])
    assert torch.equal(ensemble.particles, before["particles"]) and ensemble.iteration == 3


def test_checkpoints_hold_the_buffers() -> None:
    x, y = data()

    def make(seed: int) -> SVGDEnsemble:
        return SVGD.from_model(with_buffers, F.cross_entropy, size=3, seed=seed, kernel_batch=2)

    one = make(1)
    one.run(4, batches=[(x, y)], progress=False)
    other = make(2)
    other.load_state_dict(one.state_dict())
    twin = copy.deepcopy(one)
    for ensemble in (one, other, twin):
        ensemble.run(3, batches=[(x, y)], progress=False)
    assert torch.equal(one.particles, other.particles) and torch.equal(one.particles, twin.particles)
    prediction = one.predict(x).mean
    assert torch.equal(prediction, other.predict(x).mean)
    state = one.state_dict()
    state["target"]["1.running_mean"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"target\['1.running_mean'\] must be .*\(3, 5\); got .*\(2,\)"):
        other.load_state_dict(state)
    assert torch.equal(prediction, other.predict(x).mean)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((network, 3), {"size": 2}, TypeError, "loss must be callable; got int"),
        ((3, F.mse_loss), {"size": 2}, TypeError, "model must be a module.*; got int"),
        ((network, F.mse_loss), {}, TypeError, "size must be given"),
        ((network, F.mse_loss), {"size": 0}, ValueError, "size must be in .*; got 0"),
        ((network, F.mse_loss), {"size": 2.0}, TypeError, "size must be an int; got float"),
        (([], F.mse_loss), {}, ValueError, "model must be .*; got 0"),
        (
            ([network()], F.mse_loss),
            {"size": 2},
            ValueError,
            "model must be as many modules as size=2.*; got 1",
        ),
        (([network(), 3], F.mse_loss), {}, TypeError, r"model\[1\] must be a module; got int"),
        (([network(), nn.Linear(2, 2)], F.mse_loss), {}, ValueError, "members of the same parameters"),
        ((lambda: 3, F.mse_loss), {"size": 2}, TypeError, "model must return a module; got int"),
        ((Bare(), F.mse_loss), {"size": 2}, ValueError, "Bare.*no reset_parameters"),
        ((nn.Tanh(), F.mse_loss), {"size": 2}, ValueError, "must have trainable parameters of one dtype"),
        (
            (network, F.mse_loss),
            {"size": 2, "prior_precision": -1.0},
            ValueError,
            "prior_precision must be .*got -1",
        ),
        ((network, F.mse_loss), {"size": 2, "chunk_size": 0}, ValueError, "chunk_size must be in .*; got 0"),
        ((network, F.mse_loss), {"size": 2, "scores": F.mse_loss}, TypeError, "scores must not be given"),
        ((network, F.mse_loss), {"size": 2, "lr": -1.0}, ValueError, "lr must be .*got -1"),
        ((network, F.mse_loss), {"size": 2, "seed": "a"}, TypeError, "seed must be an int; got str"),
    ],
)
def test_bad_settings(arguments, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        SVGD.from_model(*arguments, **settings)


@pytest.mark.parametrize(
    ("loss", "batch", "error", "message"),
    [
        (F.cross_entropy, (), TypeError, r"step must be called with a batch \(x, \*targets\); got nothing"),
        (
            lambda output, y: output.square().sum(1),
            data(),
            ValueError,
            r"loss must return a scalar; got shape \(30,\)",
        ),
        (lambda output, y: 1.0, data(), TypeError, "loss must return a tensor; got float"),
    ],
)
def test_bad_steps(loss, batch, error, message) -> None:
    ensemble = SVGD.from_model(network, loss, size=2, seed=1)
    before = ensemble.particles.clone()
    with pytest.raises(error, match=message):
        ensemble.step(*batch)
    assert torch.equal(ensemble.particles, before) and ensemble.iteration == 0


def test_members_by_number() -> None:
    ensemble = SVGD.from_model(network, F.cross_entropy, size=2, seed=1)
    with pytest.raises(ValueError, match="member must be in .*; got 2"):
        ensemble.parameters_of(2)
