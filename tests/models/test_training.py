"""What the three models' training loops share: what they refuse, and what a fault leaves as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe


def uniform(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))


def vae() -> nn.Module:
    return fe.models.VAE(6, 2, (8,), "gaussian", seed=0)


def relevance() -> nn.Module:
    return fe.models.RelevanceModel(nn.Linear(6, 4), query_dim=4, context_dim=4, seed=0)


def rbm() -> nn.Module:
    return fe.models.BernoulliRBM(6, 4, seed=0)


def batches(made: Any, count: int = 3) -> list[Any]:
    rows = [(uniform(5, 6, seed) > 0.5).float() for seed in range(count)]
    return [(row, row) for row in rows] if made is relevance else rows


def weights(model: nn.Module) -> list[Tensor]:
    return [copy.deepcopy(weight.detach()) for weight in model.parameters()]


def fit(model: Any, loader: Any, **options: Any) -> Any:
    return model.fit(loader, epochs=2, progress=False, **options)


@pytest.mark.parametrize("made", [vae, relevance])
def test_a_batch_that_is_not_finite_leaves_the_weights_of_the_step_before(made: Any) -> None:
    clean, spoilt = batches(made), batches(made)
    (spoilt[1][0] if made is relevance else spoilt[1])[2, 3] = math.nan
    model = made()
    other = copy.deepcopy(model)
    steps = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters())
    with pytest.raises(FloatingPointError, match=r"\.fit: the loss is nan at epoch 1, step 2"):
        fit(model, spoilt, optimizer=steps[0])
    other.fit(clean[:1], epochs=1, progress=False, optimizer=steps[1])
    for ours, theirs in zip(weights(model), weights(other), strict=True):
        assert torch.equal(ours, theirs)


def test_a_machine_that_has_overflowed_says_so_before_its_step() -> None:
    model = rbm()
    with torch.no_grad():
        model.hidden_bias[1] = math.inf
    model.set_base_rates(batches(rbm)[0])
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"BernoulliRBM\.fit: the loss is nan at epoch 1, step 1"):
        fit(model, batches(rbm))
    assert all(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize("bad", [math.nan, 255.0, -0.5])
def test_a_machines_data_are_in_0_to_1(bad: float) -> None:
    model, loader = rbm(), batches(rbm)
    v = loader[1]
    v[2, 3] = bad
    state = copy.deepcopy(model.state_dict())
    for call in (model.free_energy, model.log_prob, model.contrastive_divergence):
        with pytest.raises(ValueError, match=rf"v must hold .*\[0, 1\].*; got {bad}"):
            call(v)
    assert state.pop("_extra_state") == model.get_extra_state()
    assert not len(model.chains)
    with pytest.raises(TypeError, match="validate must be a bool; got int"):
        model.free_energy(v, validate=2)
    assert model.free_energy(v, validate=False).shape == (5,)
    model.fit(loader[:1], epochs=1, progress=False)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"fit: epoch 1, step 1: v must hold .*; got {bad}"):
        fit(model, loader[1:])
    assert all(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize("made", [vae, relevance, rbm])
def test_a_generator_is_refused_before_anything_changes(made: Any) -> None:
    model = made()
    before, loader = weights(model), iter(batches(made))
    with pytest.raises(TypeError, match="starts anew every time, .*; got list_iterator"):
        fit(model, loader)
    assert len(list(loader)) == 3
    assert all(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("made", [vae, relevance, rbm])
def test_a_fit_gives_the_model_its_mode_back(made: Any, training: bool) -> None:
    model = made().train(training)
    fit(model, batches(made))
    assert model.training is training
    if made is rbm:
        return
    spoilt = batches(made)
    (spoilt[1][0] if made is relevance else spoilt[1])[2, 3] = math.nan
    with pytest.raises(FloatingPointError):
        fit(model, spoilt)
    assert model.training is training


@pytest.mark.parametrize("made", [vae, relevance, rbm])
def test_a_batch_of_nothing_changes_nothing(made: Any) -> None:
    model, loader = made(), batches(made)
    other = copy.deepcopy(model)
    nothing = tuple(part[:0] for part in loader[0]) if made is relevance else loader[0][:0]
    key = {"lr": 0.1} if made is rbm else {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    model.fit([loader[0], nothing], epochs=1, progress=False, **key)
    if made is not rbm:
        key = {"optimizer": torch.optim.SGD(other.parameters(), lr=0.1)}
    other.fit(loader[:1], epochs=1, progress=False, **key)
    assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("made", [vae, relevance])
def test_a_model_whose_weights_are_all_frozen_is_refused(made: Any, own: bool) -> None:
    model = made().requires_grad_(False)
    before = weights(model)
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)} if own else {}
    with pytest.raises(
        ValueError, match=r"(VAE|RelevanceModel)\.fit: a weight .* must require grad; got none"
    ):
        fit(model, batches(made), **options)
    assert all(map(torch.equal, before, weights(model)))
    next(model.parameters()).requires_grad_(True)
    fit(model, batches(made))


def test_log_z_is_one_number() -> None:
    model, v = rbm(), batches(rbm)[0]
    log_z = model.log_partition("exact")
    assert torch.equal(model.log_prob(v, log_z=log_z), model.log_prob(v))
    for wrong in (log_z.expand(5, 1), log_z.expand(5), log_z.expand(1)):
        with pytest.raises(ValueError, match=r"log_prob: log_z must be a scalar; got shape"):
            model.log_prob(v, log_z=wrong)
    with pytest.raises(TypeError, match="log_prob: log_z must be a number, a tensor or .*; got str"):
        model.log_prob(v, log_z="4")
