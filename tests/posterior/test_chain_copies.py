"""Several copies of a network side by side: the same as one after the other, each with noise of its own."""

import collections
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fekernels as fe


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(rows: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, generator=g), torch.randn(rows, 2, generator=g)


def loss_fn(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(rows[0]), rows[1])


def apart(chains: fe.Chains) -> list[nn.Module]:
    """The chains as networks of their own."""
    models = []
    for state in chains.states():
        model = network()
        model.load_state_dict(state)
        models.append(model)
    return models


@pytest.mark.parametrize("vectorize", [True, False])
def test_calls_losses_and_gradients_are_those_of_each_network(vectorize: bool) -> None:
    chains = fe.Chains(network(), 3, jitter=0.3, vectorize=vectorize)
    models = apart(chains)
    x, _ = batch()
    torch.testing.assert_close(chains(x), torch.stack([model(x) for model in models]))
    losses = chains.losses(loss_fn, batch())
    torch.testing.assert_close(losses, torch.stack([loss_fn(model, batch()) for model in models]))
    losses.sum().backward()
    for model in models:
        loss_fn(model, batch()).backward()
    for stacked, *own in zip(chains.parameters(), *(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(stacked.grad, torch.stack([p.grad for p in own]))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("rows", [(4, 4, 4), (4, 3, 5)])
def test_a_batch_for_each_chain(vectorize: bool, rows: tuple[int, ...]) -> None:
    chains = fe.Chains(network(), 3, jitter=0.3, vectorize=vectorize)
    batches = [batch(count) for count in rows]
    expected = [loss_fn(model, one) for model, one in zip(apart(chains), batches, strict=True)]
    torch.testing.assert_close(chains.losses(loss_fn, batches, each=True), torch.stack(expected))


Rows = collections.namedtuple("Rows", "x y")
FORMS = {
    "alike": [{"rows": Rows(*batch()), "scales": [torch.tensor(k + 1.0)]} for k in range(3)],
    "other keys": [{"rows": batch(), name: [torch.ones(())]} for name in ("scales", "scales", "weights")],
    "other lengths": [{"rows": batch(), "scales": [torch.ones(())] * k} for k in (1, 2, 1)],
    "other shapes": [{"rows": batch(), "scales": [torch.full((k,), 2.0)]} for k in (1, 2, 1)],
    "numbers": [{"rows": batch(), "scales": [k + 1.0]} for k in range(3)],
    "no tensors in one": [
        {"rows": batch(), "scales": s} for s in ([torch.ones(())], [2.0], [torch.ones(())])
    ],
    "nothing in one": [{"rows": batch(), "scales": s} for s in ([torch.ones(())], None, [torch.ones(())])],
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form_count_each_for_its_chain(form: str) -> None:
    def scaled(model: nn.Module, one: Any) -> Tensor:
        factor = sum(torch.as_tensor(s).sum() for s in (one.get("scales") or [3.0]))
        return loss_fn(model, one["rows"]) * factor

    chains = fe.Chains(network(), 3, jitter=0.3)
    calls = 0

    def counted(model: nn.Module, one: Any) -> Tensor:
        nonlocal calls
        calls += 1
        assert form != "alike" or isinstance(one["rows"], Rows)
        return scaled(model, one)

    expected = [scaled(model, one) for model, one in zip(apart(chains), FORMS[form], strict=True)]
    torch.testing.assert_close(chains.losses(counted, FORMS[form], each=True), torch.stack(expected))
    assert calls == (1 if form == "alike" else 3)


@pytest.mark.parametrize("vectorize", [True, False])
def test_weights_that_a_model_holds_twice_are_one(vectorize: bool) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        return model

    chains = fe.Chains(tied(), 2, jitter=0.3, vectorize=vectorize)
    assert [name for name, _ in chains.named_parameters()] == ["0.weight", "0.bias", "2.bias"]
    x, model = batch()[0], tied()
    for answer, state in zip(chains(x), chains.states(), strict=True):
        model.load_state_dict(state)
        torch.testing.assert_close(answer, model(x))


def test_every_chain_has_noise_of_its_own_and_the_first_go_the_same_way_among_more() -> None:
    def walked(n: int) -> Tensor:
        chains = fe.Chains(network(), n)
        optimizer = fe.LangevinAdam(chains.parameters(), lr=0.1, temperature=0.1, prior_precision=0.1, seed=5)
        for _ in range(4):
            optimizer.zero_grad()
            chains.losses(loss_fn, batch()).sum().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten(1) for p in chains.parameters()], 1)

    few, many = walked(2), walked(4)
    torch.testing.assert_close(few, many[:2])
    noise = many - many.mean(0)
    correlations = torch.corrcoef(noise).fill_diagonal_(-1.0)
    assert float(correlations.max()) < 0.5


def test_the_model_is_copied_and_states_fit_it() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    chains = fe.Chains(model, 2, jitter=1.0)
    assert [name for name, _ in chains.named_parameters()] == ["0.bias", "2.weight", "2.bias"]
    states = chains.states()
    assert all(torch.equal(state["0.weight"], before["0.weight"]) for state in states)
    assert not torch.equal(states[0]["2.weight"], states[1]["2.weight"])
    model.load_state_dict(states[1])
    chains.states()[0]["2.bias"].fill_(9.0)
    assert not (chains.states()[0]["2.bias"] == 9.0).any()


def test_chains_own_what_is_named_and_know_what_they_started_from() -> None:
    model = network()
    chains = fe.Chains(model, 2, jitter={"2.weight": 1.0}, names=["2.weight"])
    assert [name for name, _ in chains.named_parameters()] == ["2.weight"]
    chains.losses(loss_fn, batch()).sum().backward()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    batches = [batch(3), batch(5), batch(7)]
    with torch.no_grad():
        at_start = chains.origin(3).losses(loss_fn, batches, each=True)
        expected = torch.stack([loss_fn(model, one) for one in batches])
        assert (chains.losses(loss_fn, batches[2]) - expected[2]).abs().min() > 1e-3
    torch.testing.assert_close(at_start, expected)


def test_batch_norms_count_for_each_chain() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    chains = fe.Chains(model, 2, jitter=1.0)
    x, _ = batch()
    chains(x)
    means = torch.stack([state["1.running_mean"] for state in chains.states()])
    expected = torch.stack(
        [F.linear(x, state["0.weight"], state["0.bias"]).mean(0) * 0.1 for state in chains.states()]
    )
    torch.testing.assert_close(means, expected)
    assert not model[1].running_mean.any()
    chains.eval()(x)
    torch.testing.assert_close(torch.stack([s["1.running_mean"] for s in chains.states()]), means)


def test_jitter_is_of_the_scale_that_was_asked_for() -> None:
    chains = fe.Chains(nn.Linear(100, 100), 4, jitter={"weight": 0.5}, seed=3)
    weight, bias = (p.detach() for p in chains.parameters())
    spread = weight - weight.mean(0)
    assert abs(float(spread.square().sum() / (3 * 10_000)) ** 0.5 - 0.5) < 0.01
    assert torch.equal(bias[0], bias[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model", 2), TypeError, "Chains: model must be a torch.nn.Module; got str"),
        ((nn.Tanh(), 2), ValueError, "model must have a parameter that requires a gradient"),
        ((nn.Linear(1, 1), 0), ValueError, "n must be in"),
        ((nn.Linear(1, 1), 2, {"names": "bias"}), TypeError, "names must be a collection of strings; got str"),
        ((nn.Linear(1, 1), 2, {"names": ["w"]}), ValueError, "names must be of parameters .* a gradient; got 'w'"),
        ((nn.Linear(1, 1), 2, {"names": []}), ValueError, "names must be of parameters .* a gradient; got none"),
        ((nn.Linear(1, 1), 2, {"jitter": -1.0}), ValueError, "jitter must be finite and >= 0; got -1.0"),
        ((nn.Linear(1, 1), 2, {"jitter": {"w": 1.0}}), ValueError, "jitter must name parameters of the model; got 'w'"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    *args, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        fe.Chains(*args, **options)


def test_bad_losses() -> None:
    chains = fe.Chains(network(), 2)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor; got \(7, 2\)"):
        chains.losses(lambda model, rows: model(rows[0]), batch())
    with pytest.raises(ValueError, match="batch must be 2 batches with each=True; got 3"):
        chains.losses(loss_fn, [batch()] * 3, each=True)
