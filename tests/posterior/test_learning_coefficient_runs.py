"""Runs for a local learning coefficient: what moves, which losses count, what is said against the estimate."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.posterior import LearningCoefficient
from fekernels.posterior.localized import Localized
from fekernels.posterior.pilot import Data
from tests.support.singular_losses import (
    ONE,
    Weights,
    crossing,
    estimate,
    masked,
    network,
    regression,
    squared,
)


def walk(model: nn.Module, loader: Any, masks: Any, loss_fn: Any = squared, **changes: Any) -> Localized:
    options = {"n": 3, "n_beta": 100.0, "localization": 1.0, "sampler": "sgld", "seed": 0, "vectorize": True}
    return Localized(
        model, loss_fn, Data("test", loader, 50, 0, joins=False), masks=masks, tick=lambda what: None,
        **{**options, **changes},
    )  # fmt: skip


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_weights_that_are_masked_out_keep_their_bits(sampler: str) -> None:
    model, masks = network(), masked()
    before = copy.deepcopy(model.state_dict())
    going = walk(model, [regression()], masks, sampler=sampler)
    assert [name for name, _ in going.chains.named_parameters()] == ["0.weight", "2.weight"]
    going.choose()
    for _ in range(5):
        going.step("test")
    some = masks["0.weight"]
    for state in going.chains.states():
        assert torch.equal(state["0.weight"][~some], before["0.weight"][~some])
        assert (state["0.weight"] != before["0.weight"])[some].all()
        assert (state["2.weight"] != before["2.weight"]).all()
        assert torch.equal(state["0.bias"], before["0.bias"])
        assert torch.equal(state["2.bias"], before["2.bias"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("burn_in", [0, 2])
def test_the_preconditioner_stands_still_after_a_burn_in(
    burn_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    step = Localized.step

    def watched(self: Localized, what: str) -> Any:
        found = step(self, what)
        seen.append(self.denominators()[0].clone())
        return found

    monkeypatch.setattr(Localized, "step", watched)
    estimate(
        network(), squared, [regression()], data_size=50, lr=1e-3, draws=4, burn_in=burn_in, sampler="rmsprop"
    )
    after = seen[burn_in:]
    assert len(after) == 4 and float((after[0] - 0.1).min()) > 0
    assert all(torch.equal(d, after[0]) == bool(burn_in) for d in after[1:])


class Adapted(nn.Module):
    """A frozen layer with an adapter of rank 1 (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 1).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(1, 3) * 0.1)
        self.lora_b = nn.Parameter(torch.zeros(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ (self.lora_b @ self.lora_a).T


def test_of_an_adapter_only_what_requires_gradients_moves() -> None:
    torch.manual_seed(0)
    model = Adapted()
    going = walk(model, [regression()], {"lora_a": None, "lora_b": None})
    going.follow(1e-3)
    for _ in range(3):
        going.step("test")
    assert all(torch.equal(state["base.weight"], model.base.weight) for state in going.chains.states())
    found = estimate(model, squared, [regression()], data_size=50, draws=4, chains=2)
    assert found.diagnostics.settings["weights"] == 4
    named = estimate(model, squared, [regression()], data_size=50, draws=4, chains=2, masks=["lora_b"])
    assert named.diagnostics.settings["weights"] == 1
    with pytest.raises(ValueError, match=r"masks must name parameters .* a gradient; got 'base.weight'"):
        estimate(model, squared, [regression()], masks=["base.weight"])


@pytest.mark.parametrize("as_list", [True, False])
def test_losses_are_those_of_their_batches_over_the_same_batches_at_the_start(as_list: bool) -> None:
    x, y = regression(50)
    batches = list(zip(x.split(20), y.split(20), strict=True))  # 20, 20 and 10 points
    model = network()
    loader: Any = batches if as_list else torch.utils.data.DataLoader(batches, batch_size=None)
    whole = float(squared(model, (x, y)).detach())
    # Steps of next to nothing: what is left of the losses is how they are put together.
    found = estimate(model, squared, loader, data_size=50, lr=1e-14, draws=30, chains=2)
    assert found.init_loss == pytest.approx(whole, rel=1e-6)
    assert float((found.trace - whole).abs().max()) < 1e-5
    assert abs(float(squared(model, batches[0]).detach()) - whole) > 0.01


def test_random_layers_and_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    x, y = regression(60)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20, shuffle=True)
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        found = estimate(model.train(mode), squared, loader, data_size=60, draws=8, chains=2)
        assert bool(found.trace.isfinite().all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_estimate_and_vectorize_only_how() -> None:
    x, y = regression(60)
    loader = list(zip(x.split(20), y.split(20), strict=True))
    options: dict[str, Any] = {"data_size": 60, "lr": 1e-4, "draws": 8}
    first, again, apart, other = (
        estimate(network(), squared, loader, **options, **changes)
        for changes in ({}, {}, {"vectorize": False}, {"seed": 2})
    )
    assert torch.equal(first.trace, again.trace)
    torch.testing.assert_close(first.trace, apart.trace)
    assert not torch.equal(first.trace, other.trace)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_other_dtypes_go_the_same_way(dtype: torch.dtype, within: float) -> None:
    x, y = regression(60)
    options: dict[str, Any] = {"n_beta": 40.0, "data_size": 60, "lr": 2e-3, "draws": 8}
    single = estimate(network(), squared, [(x, y)], **options)
    other = estimate(network().to(dtype), squared, [(x.to(dtype), y.to(dtype))], **options)
    assert float((other.trace - single.trace).abs().max()) < within
    assert float((single.trace[:, -1] - single.init_loss).abs().min()) > within / 10
    assert other.diagnostics.step_bias == pytest.approx(single.diagnostics.step_bias, rel=within)


def said(call: Callable[[], LearningCoefficient]) -> tuple[LearningCoefficient, str]:
    with pytest.warns(UserWarning, match="local_learning_coefficient: ") as caught:
        found = call()
    # Other tests' optimizers may live still, and share its seed.
    own = [str(each.message) for each in caught if "another optimizer" not in str(each.message)]
    assert len(own) == 1
    assert all(warning in own[0] for warning in found.diagnostics.warnings)
    return found, str(found)


def test_a_negative_estimate_is_said_to_be_no_minimum() -> None:
    model = Weights(2)
    with torch.no_grad():
        model.w.fill_(1.0)

    def loss_fn(model: Any, rows: Any) -> Tensor:
        return model().square().sum()

    found, text = said(
        lambda: fe.local_learning_coefficient(
            model, loss_fn, ONE, data_size=1000, localization=1.0, seed=0, progress=False, burn_in=20
        )
    )
    assert found.mean < 0 and "negative estimates, down to -2" in text


def test_chains_that_diverge_give_no_number() -> None:
    found, text = said(
        lambda: fe.local_learning_coefficient(
            Weights(1), crossing(4), ONE, data_size=1000, lr=1.0, seed=0, progress=False
        )
    )
    assert math.isnan(found.mean) and "diverged" in text and "smaller lr" in text


def test_a_coarse_step_and_chains_far_outside_are_said() -> None:
    def loss_fn(model: Any, rows: Any) -> Tensor:
        return model().square().sum() / 2

    lr = 2 * 1.5 / 1e4  # h k = 1.5
    found, text = said(
        lambda: fe.local_learning_coefficient(
            Weights(50), loss_fn, ONE, data_size=1000, n_beta=1e4, lr=lr, seed=0, progress=False
        )
    )
    assert found.mean > 60 and "the step is coarse" in text and "the most that a minimum can have" in text


def test_draws_on_the_way_are_said_to_drift() -> None:
    def loss_fn(model: Any, rows: Any) -> Tensor:
        return model().square().sum() / 2

    settings: dict[str, Any] = {
        "data_size": 1000, "n_beta": 1e4, "lr": 2 * 0.005 / 1e4, "seed": 0, "progress": False, "chains": 8,
    }  # fmt: skip
    _, text = said(lambda: fe.local_learning_coefficient(Weights(100), loss_fn, ONE, **settings))
    assert "the loss still drifts: the second half of the draws gives +" in text
    settled = fe.local_learning_coefficient(
        Weights(100), loss_fn, ONE, **{**settings, "lr": 2 * 0.1 / 1e4}, burn_in=100
    )
    (told,) = settled.diagnostics.warnings  # 2.6 of 52.0 +- 0.7
    assert told.startswith("the finite step makes up to")
    assert abs(settled.mean - settled.diagnostics.step_bias - 50) < 4 * settled.diagnostics.error


def test_a_loader_of_another_size_is_said() -> None:
    _, text = said(
        lambda: fe.local_learning_coefficient(Weights(1), crossing(2), ONE, data_size=500, progress=False)
    )
    assert "the loader holds 1,000 points, data_size says 500" in text


def test_the_picture_shows_losses_and_estimates() -> None:
    figure = estimate(Weights(1), crossing(2), ONE, draws=20, chains=3).plot()
    losses, estimates = figure.axes
    assert len(losses.lines) == len(estimates.lines) == 3 + 1
    assert losses.lines[-1].get_ydata()[0] == 0.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module; got int"),
        ({"model": nn.Tanh()}, ValueError, "model must have a parameter that requires a gradient; got none"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable; got int"),
        ({"loader": iter([])}, TypeError, "loader must be an iterable of batches that starts anew"),
        ({"loader": []}, ValueError, "loader must hold a batch; got none"),
        ({"data_size": 1}, ValueError, "data_size must be at least 2; got 1"),
        ({"n_beta": 0.0}, ValueError, "n_beta must be finite and > 0; got 0"),
        ({"localization": -1}, ValueError, "localization must be finite and >= 0; got -1"),
        ({"lr": 0.0}, ValueError, "lr must be finite and > 0; got 0"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got str"),
        ({"chains": 0}, ValueError, "chains must be at least 1; got 0"),
        ({"draws": 3}, ValueError, "draws must be at least 4; got 3"),
        ({"burn_in": -1}, ValueError, "burn_in must be at least 0; got -1"),
        ({"masks": "w"}, TypeError, "masks must be a mapping from names .* or names; got str"),
        ({"masks": ["v"]}, ValueError, "masks must name parameters of the model .*; got 'v'"),
        ({"masks": {"w": torch.ones(2)}}, TypeError, r"masks\['w'\] must be a boolean .*; got torch.float32"),
        (
            {"masks": {"w": torch.ones(3, dtype=torch.bool)}},
            ValueError,
            r"masks\['w'\] must have shape \(2,\) like the parameter; got \(3,\)",
        ),
        (
            {"masks": {"w": torch.zeros(2, dtype=torch.bool)}},
            ValueError,
            "masks must let a weight move; got none",
        ),
        ({"sampler": "hmc"}, ValueError, "sampler must be one of sgld, rmsprop; got 'hmc'"),
        ({"seed": 0.5}, TypeError, "seed must be an int; got float"),
        ({"progress": 1}, TypeError, "progress must be a bool; got int"),
        (
            {"loss_fn": lambda model, rows: model().sum() * math.nan},
            ValueError,
            "loss_fn must be finite at the model's weights; got nan",
        ),
        (
            {"loss_fn": lambda model, rows: (0 * model()).sum(), "localization": 0.0},
            ValueError,
            "lr must be given for a loss whose curvature cannot be measured; got None",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "model": Weights(2), "loss_fn": crossing(2, 2), "loader": ONE, "data_size": 1000, "progress": False,
    }  # fmt: skip
    with pytest.raises(error, match=f"local_learning_coefficient: {message}"):
        fe.local_learning_coefficient(**{**arguments, **changes})


def test_a_step_that_more_chains_bring_to_light_is_said() -> None:
    settings: dict[str, Any] = {"n_beta": 1e4, "burn_in": 200}
    few = estimate(Weights(1), crossing(2), ONE, chains=4, **settings)
    many = estimate(Weights(1), crossing(2), ONE, chains=256, **settings)
    assert not any("the finite step" in each for each in few.diagnostics.warnings)
    (told,) = many.diagnostics.warnings
    bias, error = many.diagnostics.step_bias, many.diagnostics.error
    assert f"up to {bias:.3g} of the estimate, {bias / error:.1f} of its standard errors" in told
    assert "take a smaller lr than" in told and abs(many.mean - bias - 0.5) < 4 * error < many.mean - 0.5
    assert f"{many.mean:.4g} +- {error:.2g}" in str(many) and f"{many.mean - bias:.4g} without it" in str(
        many
    )
