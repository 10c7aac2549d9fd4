"""sample_posterior with its defaults: the answer is right, or the report says that it is not."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
import fekernels.posterior.run
from fekernels.posterior import PosteriorRun
from fekernels.posterior import plan as plans
from tests.support.posteriors import (
    STORED,
    Problem,
    gapped_network,
    linear_regression,
    logistic_regression,
    two_modes,
)


@pytest.fixture
def short_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that are trained for little more than a pass over the data."""
    monkeypatch.setattr(fekernels.posterior.run, "TRAIN_STEPS", 20)


def run(problem: Problem, **options: Any) -> PosteriorRun:
    args, sizes = problem.arguments()
    return fe.sample_posterior(*args, **sizes, progress=False, seed=1, **options)


def weights(result: PosteriorRun) -> Tensor:
    names = [name for name, _ in result.samples[0].items()]
    return torch.stack(
        [torch.cat([sample[n].flatten() for n in names]) for sample in result.samples]
    ).double()


def test_linear_regression_by_control_variates_in_150_epochs() -> None:
    problem = linear_regression()
    result = run(problem)
    report, drawn = result.report, weights(result)
    assert report.converged and not report.warnings, str(report)
    assert report.settings["gradient"] == "control variates"
    assert report.settings["epochs"] <= 150
    assert report.ess_min >= 400
    assert len(result.samples) == 400
    assert 0.9 < float((drawn.var(0) / problem.std**2).mean()) < 1.15
    assert float(((drawn.mean(0) - problem.mean) / problem.std).abs().max()) < 0.2  # of 20, at 400 draws
    diagnostics = result.samples.diagnostics()
    assert (diagnostics.chains, diagnostics.draws) == (4, 100)
    assert diagnostics.rhat_median < 1.01
    assert "Nothing measured speaks against" in str(report)


def test_logistic_regression_agrees_with_nuts() -> None:
    problem = logistic_regression()
    result = run(problem)
    drawn = weights(result)
    assert result.report.converged, str(result.report)
    assert result.report.rhat_max < 1.02
    ratio = drawn.std(0) / problem.std
    assert 0.85 < float(ratio.min()) and float(ratio.max()) < 1.15
    assert float(((drawn.mean(0) - problem.mean) / problem.std).abs().max()) < 0.2


def test_minibatch_noise_is_named_with_its_factor() -> None:
    problem = linear_regression(n=4000, d=6, batch=100)
    result = run(problem, control_variates=False, lr=0.02, samples=100)
    report, drawn = result.report, weights(result)
    true = float((drawn.var(0) / problem.std**2).mean())
    assert true > 1.5
    assert abs(report.variance_inflation / true - 1) < 0.2, (report.variance_inflation, true)
    assert not report.converged
    assert any("gradient's noise" in warning and "variance" in warning for warning in report.warnings)
    assert str(report).startswith("NOT to be believed")


def test_noise_that_single_weights_hide_shows_in_predictions() -> None:
    """Weights of correlated features vary along flat directions, to which the gradient's noise adds next to nothing."""
    generator = torch.Generator().manual_seed(5)
    turned, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    x = torch.randn(600, 4, generator=generator) * torch.tensor([1.0, 0.3, 0.2, 0.15]) @ turned.T
    y = x @ torch.randn(4, generator=generator) + torch.randn(600, generator=generator)
    torch.manual_seed(0)
    result = fe.sample_posterior(
        nn.Linear(4, 1, bias=False), lambda model, rows: (model(rows[0])[:, 0] - rows[1]).square().mean() / 2,
        list(zip(x.split(40), y.split(40), strict=True)), data_size=600, prior_precision=1.0, chains=64, samples=20,
        burn_in=400, thinning=100, lr=0.02, control_variates=False, seed=1, progress=False,
    )  # fmt: skip
    report, rows = result.report, x.double()
    exact = torch.linalg.inv(rows.T @ rows + torch.eye(4, dtype=torch.float64))
    sampled = torch.cov(report.trace.double().flatten(0, 1).T)
    true = float((rows @ sampled * rows).sum() / (rows @ exact * rows).sum())
    of_weights = float((sampled.diagonal() / exact.diagonal()).median())
    assert of_weights < 1.15 and abs(report.variance_inflation / of_weights - 1) < 0.1
    assert true > 1.2 and abs(report.predictive_inflation / true - 1) < 0.15
    assert not report.converged and any("of predictions" in warning for warning in report.warnings)


def test_a_step_that_widens_the_posterior_is_not_believed() -> None:
    """Full gradients, no noise but ours: an lr of the user's own, over Adam's denominators, makes it too wide."""
    problem = linear_regression(n=1000, d=4, batch=1000)
    report = run(problem, lr=0.3).report
    true = float((report.trace.double().flatten(0, 1).var(0) / problem.std**2).mean())
    assert report.noise_ratio == 0 and true > 1.2 and report.predictive_inflation > 1.2
    assert not report.converged and any("the step" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    "options", [{}, {"control_variates": False, "lr": 0.03}], ids=["full", "minibatches"]
)
def test_the_measured_temperature_is_the_variance_over_the_exact_one(options: dict[str, Any]) -> None:
    """Whatever made it too large: here the step, or the batches' noise, which leaves out its own part."""
    problem = linear_regression(n=600, d=3, batch=40)
    options = {"lr": 1.0, **options}
    report = run(problem, samples=400, **options).report
    x = torch.cat([rows for rows, _ in problem.loader]).double()
    apart = report.trace.double().flatten(0, 1) - problem.mean
    true = float((apart @ (x.T @ x + torch.eye(3, dtype=torch.float64)) * apart).sum(1).mean() / 3)
    assert true > 1.15
    assert abs(report.temperature / true - 1) < 0.1 and 0 < report.temperature_error < 0.1 * true
    assert not report.converged and any("times as hot as the posterior" in told for told in report.warnings)


def test_the_noise_of_a_random_loss_is_measured_and_halves_the_step() -> None:
    """Of full gradients no variance over batches shows it: r is 0."""
    problem = linear_regression(n=600, d=4, batch=600)
    kicks = torch.Generator().manual_seed(3)

    def noisy(model: Any, rows: Any) -> Tensor:  # plus a constant, on average
        weight = model.weight + 0.1 * torch.randn(model.weight.shape, generator=kicks)
        return (rows[0] @ weight[0] - rows[1]).square().mean() / 2

    (model, _, *given), sizes = problem.arguments()
    found = fe.sample_posterior(model, noisy, *given, **sizes, progress=False, seed=1)
    report, true = found.report, float((weights(found).var(0) / problem.std**2).mean())
    assert report.noise_ratio == 0
    assert any("step was halved" in told for told in report.warnings)
    assert abs(report.temperature / true - 1) < 0.25 and true < 1.4
    lr = report.settings["lr"] * 8
    fixed = fe.sample_posterior(
        model, noisy, *given, **sizes, lr=lr, burn_in=200, progress=False, seed=1
    ).report
    assert fixed.temperature > 1.5 and not fixed.converged


@pytest.mark.parametrize(("factor", "believed"), [(30.0, True), (1000.0, False)], ids=["hot", "infinite"])
def test_chains_begin_again_with_half_a_step_that_was_too_large(
    factor: float, believed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where chains go where the curvature is another. Three halvings are not always enough."""

    def too_bold(*args: Any) -> Any:
        plan, fisher = plans.make_plan(*args)
        return dataclasses.replace(plan, lr=factor * plan.lr), fisher

    problem = linear_regression(n=600, d=3, batch=600)
    monkeypatch.setattr(fekernels.posterior.run, "make_plan", too_bold)
    found = run(problem)
    assert any("step was halved" in told for told in found.report.warnings)
    assert found.report.converged == believed, str(found.report)
    if believed:
        assert 0.85 < float((weights(found).var(0) / problem.std**2).mean()) < 1.15
    monkeypatch.setattr(fekernels.posterior.run, "HALVINGS", 0)
    alone = run(problem).report
    assert not alone.converged
    said = (
        "chain 0, 1, 2, 3 became infinite at lr = 500"
        if factor == 1000
        else "times as hot as the posterior is"
    )
    assert any(said in told for told in alone.warnings), alone.warnings


@pytest.mark.parametrize("prior_precision", [0.0, 1.0])
def test_data_that_are_one_row_have_curvature_too(prior_precision: float) -> None:
    """No difference between rows tells it: the Fisher information that is estimated is 0."""
    problem = linear_regression(n=200, d=3, batch=200)
    x, y = problem.loader[0]

    def loss(model: Any, rows: Any) -> Tensor:
        return (model(rows[0])[..., 0] - rows[1]).square().sum(1).mean() / 2

    found = fe.sample_posterior(
        problem.model, loss, [(x[None], y[None])], data_size=1, prior_precision=prior_precision, seed=0,
        progress=False,
    )  # fmt: skip
    assert found.report.converged, str(found.report)
    exact = torch.linalg.inv(x.double().T @ x.double() + prior_precision * torch.eye(3, dtype=torch.float64))
    assert 0.85 < float((weights(found).var(0) / exact.diagonal()).mean()) < 1.15
    assert abs(found.report.temperature - 1) < 0.15


def test_rows_drawn_with_replacement_are_said(short_starts: None) -> None:
    problem = linear_regression(n=220, d=2, batch=220)
    x, y = problem.loader[0]
    data = torch.utils.data.TensorDataset(x, y)
    for replacement in (False, True):
        sampler = torch.utils.data.RandomSampler(
            data, replacement, generator=torch.Generator().manual_seed(0)
        )
        loader: Any = torch.utils.data.DataLoader(data, 55, sampler=sampler)
        short: Any = {"samples": 20, "burn_in": 20, "thinning": 2} if replacement else {}
        report = fe.sample_posterior(
            problem.model, problem.loss_fn, loader, data_size=220, prior_precision=1.0, chains=2, progress=False,
            seed=0, **short,
        ).report  # fmt: skip
        told = any("other rows in every pass" in warning for warning in report.warnings)
        assert told == replacement and report.converged != replacement


def test_a_run_without_burn_in_and_with_few_samples_is_not_believed(short_starts: None) -> None:
    report = run(linear_regression(n=220, d=2, batch=220), burn_in=0, samples=4, thinning=1).report
    assert not report.converged and math.isnan(report.temperature)


def test_what_the_kept_samples_are_worth_is_said_too() -> None:
    found = run(linear_regression(n=600, d=3, batch=100))
    assert abs(found.report.ess_samples / found.samples.diagnostics().ess_min - 1) < 1e-6
    assert f"(of the samples kept {found.report.ess_samples:.0f})" in str(found.report)


def test_chains_in_two_modes_are_not_called_converged() -> None:
    report = run(two_modes()).report
    assert not report.converged
    assert report.rhat_max > 1.1
    assert any("disagree" in warning for warning in report.warnings)


def test_a_network_is_as_uncertain_as_nuts_says_or_its_report_says_no() -> None:
    problem = gapped_network()
    known = json.loads(STORED.read_text())["gapped_network"]
    assert known["rhat_max"] < 1.01 and known["ess_min"] > 1000
    result = run(problem, samples=50, burn_in=500, thinning=20)
    predicted = result.samples.predict(torch.tensor(known["x"])[:, None], None).std.flatten()
    ratio = predicted / torch.tensor(known["std"])
    assert not result.report.converged or bool(((ratio > 0.75) & (ratio < 1.25)).all())
    # Whatever the weights' R-hat says: the gap is wider than the noise, and of the right size within a half.
    assert 0.5 < float(ratio.min()) and float(ratio.max()) < 2.0


def test_the_same_seed_gives_the_same_samples_and_the_model_stays_as_it_is(short_starts: None) -> None:
    problem = linear_regression(n=600, d=3, batch=100)
    before = [p.clone() for p in problem.model.parameters()]
    settings = {"samples": 8, "thinning": 2, "burn_in": 20}
    first, second = (weights(run(problem, **settings)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(p, own) for p, own in zip(problem.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in problem.model.parameters())


def test_an_untouched_preconditioner_a_loader_of_another_size_and_a_short_run_are_said(
    short_starts: None,
) -> None:
    problem = linear_regression(n=600, d=3, batch=100)
    args, sizes = problem.arguments()
    result = fe.sample_posterior(
        *args, **{**sizes, "data_size": 500}, freeze=False, samples=4, thinning=1, burn_in=20, progress=False, seed=0
    )  # fmt: skip
    said = " ".join(result.report.warnings)
    assert "600 points, data_size says 500" in said
    assert "preconditioner adapts" in said
    assert "sample longer" in said
    assert not result.report.converged


@pytest.mark.parametrize(
    ("data_size", "drop_last", "believed"), [(20, False, False), (400, False, False), (220, True, True)]
)
def test_another_number_of_points_is_not_believed(data_size: int, drop_last: bool, believed: bool) -> None:
    problem = linear_regression(n=220, d=2, batch=220)
    x, y = problem.loader[0]
    loader: Any = torch.utils.data.DataLoader(
        range(220), 100, drop_last=drop_last, collate_fn=lambda rows: (x[rows], y[rows])
    )
    report = fe.sample_posterior(
        problem.model, problem.loss_fn, loader, data_size=data_size, prior_precision=1.0, chains=2, progress=False,
        seed=0,
    ).report  # fmt: skip
    (said,) = report.warnings  # nothing else that is measured sees it
    assert f"points, data_size says {data_size:,}" in said
    assert report.converged == believed


def test_the_picture_has_a_row_for_each_of_the_worst_weights_and_the_loss(short_starts: None) -> None:
    result = run(linear_regression(n=600, d=3, batch=100), samples=8, thinning=2, burn_in=20)
    figure = result.report.plot()
    assert len(figure.axes) == 2 * (3 + 1)
    assert {axis.get_ylabel() for axis in figure.axes[::2]} == {"weight[0]", "weight[1]", "weight[2]", "loss"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module; got int"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable; got int"),
        ({"loader": iter([])}, TypeError, "loader must be an iterable of batches that starts anew"),
        ({"loader": []}, ValueError, "loader must hold a batch; got none"),
        ({"data_size": 0}, ValueError, "data_size must be at least 1; got 0"),
        ({"prior_precision": -1.0}, ValueError, "prior_precision must be finite and >= 0; got -1"),
        ({"chains": 1}, ValueError, "chains must be at least 2; got 1"),
        ({"samples": 3}, ValueError, "samples must be at least 4; got 3"),
        ({"lr": 0.0}, ValueError, "lr must be finite and > 0; got 0"),
        ({"thinning": 0}, ValueError, "thinning must be at least 1; got 0"),
        (
            {"control_variates": "yes"},
            ValueError,
            "control_variates must be 'auto', True or False; got 'yes'",
        ),
        ({"freeze": 1}, TypeError, "freeze must be"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = linear_regression(n=60, d=2, batch=20)
    arguments: dict[str, Any] = {
        "model": problem.model, "loss_fn": problem.loss_fn, "loader": problem.loader, "data_size": 60,
        "prior_precision": 1.0, "progress": False,
    }  # fmt: skip
    with pytest.raises(error, match=f"sample_posterior: {message}"):
        fe.sample_posterior(**{**arguments, **changes})


def test_a_loss_that_is_not_finite_is_refused() -> None:
    def loss_fn(model: nn.Module, rows: Tensor) -> Tensor:
        return model(rows).sum() * float("nan")

    with pytest.raises(
        ValueError, match="sample_posterior: loss_fn must be finite at the model's weights; got nan"
    ):
        fe.sample_posterior(
            nn.Linear(1, 1), loss_fn, [torch.ones(4, 1)], data_size=4, prior_precision=1.0, progress=False
        )
