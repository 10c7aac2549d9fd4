"""What fe.diagnostics.gradient_noise_ratio says of a run is what the run's variance shows."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import fekernels as fe
from fekernels.diagnostics import gradient_noise


def test_the_variance_is_one_plus_the_ratio() -> None:
    """Independent chains on a normal target, with gradients that are as noisy as a small batch's."""
    chains, curvature_step, noise = 40_000, 0.01, 40.0
    theta = (torch.randn(chains) * math.sqrt(1.2)).requires_grad_()
    # eps rules the denominator, so that the preconditioner stands still: D = eps, h = lr / eps.
    optimizer = fe.LangevinAdam([theta], lr=curvature_step * 1e3, eps=1e3, temperature=1.0, seed=1)
    for _ in range(600):
        theta.grad = theta.detach() + math.sqrt(noise) * torch.randn(chains)
        optimizer.step()
    ratio = fe.diagnostics.gradient_noise_ratio(optimizer)
    # v is the noise and the mean square of theta; of 40,000 chains a variance is known to 0.7%.
    assert ratio.median == pytest.approx(curvature_step * (noise + 1.2) / 2, rel=0.02)
    assert theta.var().item() == pytest.approx(1 + curvature_step * noise / 2, rel=0.035)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_each_weight_has_the_ratio_of_its_group(amsgrad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cold, hot, other = (torch.randn(n, 3, requires_grad=True) for n in (2, 50, 40))
    groups = [
        {"params": [cold], "temperature": 0.0},
        {"params": [hot], "temperature": 0.5},
        {
            "params": [other],
            "lr": torch.tensor(0.02),
            "temperature": torch.tensor(2.0),
            "bias_correction": False,
        },
    ]
    optimizer = fe.LangevinAdam(groups, lr=0.01, prior_precision=150.0, eps=0.1, amsgrad=amsgrad, seed=2)
    for _ in range(3):
        for p in (cold, hot, other):
            p.grad = torch.randn_like(p)
        optimizer.step()
    expected = []
    for p, lr, temperature, correction in ((hot, 0.01, 0.5, 1 - 0.999**3), (other, 0.02, 2.0, 1.0)):
        state = optimizer.state[p]
        v = state["exp_avg_sq"].double() / correction
        largest = state["max_exp_avg_sq"].double() / correction if amsgrad else v
        expected.append((lr * v / (2 * temperature * (largest.sqrt() + 0.1).clamp_min(lr * 150.0))).flatten())
    found = fe.diagnostics.gradient_noise_ratio(optimizer)
    torch.testing.assert_close(found.ratios.double(), torch.cat(expected), rtol=1e-5, atol=0)
    quantiles = torch.cat(expected).quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    assert found.quantiles() == pytest.approx(quantiles.tolist(), rel=1e-5)
    assert found.median == found.quantiles()[1]
    monkeypatch.setattr(gradient_noise, "MOST", 90)  # of 270 weights every third
    every_third = [part[::3] for part in expected]
    torch.testing.assert_close(
        fe.diagnostics.gradient_noise_ratio(optimizer).ratios.double(),
        torch.cat(every_third),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize(
    ("q", "error", "message"),
    [
        (0.5, TypeError, r"q must be a sequence of numbers in \[0, 1\].*; got float"),
        ("0.5", TypeError, "q must be a sequence of numbers .*; got str"),
        (torch.tensor(0.5), TypeError, "q must be a sequence of numbers .*; got Tensor"),
        ((0.5, "high"), TypeError, r"q\[1\] must be a number; got str"),
        ([1.5], ValueError, r"q\[0\] must be in \[0, 1\]; got 1.5"),
        ((0.5, -0.1), ValueError, r"q\[1\] must be in \[0, 1\]; got -0.1"),
        ([math.nan], ValueError, r"q\[0\] must be .*; got nan"),
    ],
)
def test_quantiles_refuse_what_is_no_level(q: Any, error: type[Exception], message: str) -> None:
    found = fe.diagnostics.GradientNoiseRatio(torch.arange(1, 6.0))
    with pytest.raises(error, match="^GradientNoiseRatio.quantiles: " + message):
        found.quantiles(q)
    for good in ((0, 0.5, 1), np.array([0, 0.5, 1]), torch.tensor([0, 0.5, 1])):
        assert found.quantiles(good) == [1, 3, 5]


def test_what_has_no_ratio() -> None:
    theta = torch.randn(3, requires_grad=True)
    with pytest.raises(TypeError, match="optimizer must be a LangevinAdam; got SGLD"):
        fe.diagnostics.gradient_noise_ratio(fe.SGLD([theta], lr=0.1, temperature=1.0))
    with pytest.raises(ValueError, match="a group with temperature > 0; got none"):
        fe.diagnostics.gradient_noise_ratio(fe.LangevinAdam([theta], lr=0.1))
    with pytest.raises(ValueError, match="must have made a step with noise; got none"):
        fe.diagnostics.gradient_noise_ratio(fe.LangevinAdam([theta], lr=0.1, temperature=1.0, eps=1e-3))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_frozen_preconditioner_keeps_its_ratio(amsgrad: bool) -> None:
    theta = torch.randn(50, requires_grad=True)
    optimizer = fe.LangevinAdam([theta], lr=0.01, temperature=1.0, eps=1e-3, amsgrad=amsgrad, seed=3)

    def steps(count: int) -> torch.Tensor:
        for _ in range(count):
            theta.grad = torch.randn(50)
            optimizer.step()
        return fe.diagnostics.gradient_noise_ratio(optimizer).ratios

    adapting = steps(3)
    optimizer.freeze_preconditioner()
    frozen = steps(2)
    torch.testing.assert_close(frozen, adapting, rtol=1e-5, atol=0)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_weights_without_gradients_hide_no_noise(eps: float) -> None:
    weight = torch.nn.Parameter(torch.randn(10))
    optimizer = fe.LangevinAdam([weight], lr=0.1, temperature=1e-3, prior_precision=1e-3, eps=eps, seed=0)
    for _ in range(20):
        weight.grad = torch.randn(10) * (torch.arange(10) < 4)
        optimizer.step()
    found = fe.diagnostics.gradient_noise_ratio(optimizer)
    alone = found.ratios[:4]
    assert found.median == pytest.approx(float(alone.quantile(0.5))) and found.median > 1
    assert found.quantiles((0.0, 1.0)) == pytest.approx([float(alone.min()), float(alone.max())])
    weight.grad = torch.zeros(10)
    dead = fe.LangevinAdam([weight], lr=0.1, temperature=1e-3, prior_precision=1e-3, seed=1)
    dead.step()
    assert fe.diagnostics.gradient_noise_ratio(dead).median == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_not_quiet(bad: float) -> None:
    """Their ratios are NaN, as are 0 / 0 of weights without any; left out, the others would answer for them."""
    weight = torch.zeros(6, requires_grad=True)
    optimizer = fe.LangevinAdam([weight], lr=0.1, temperature=1e-3, prior_precision=1e-3, seed=1)
    weight.grad = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, bad])
    optimizer.step()
    ratio = fe.diagnostics.gradient_noise_ratio(optimizer)
    assert math.isnan(ratio.median) and all(math.isnan(each) for each in ratio.quantiles())
    assert ratio.ratios[:3].tolist() == [0.0, 0.0, 0.0]
    model = torch.nn.Linear(3, 2, bias=False)
    samples = fe.PosteriorSamples(model, optimizer=optimizer)
    for _ in range(60):
        torch.nn.init.normal_(model.weight)
        samples.collect()
    with pytest.warns(UserWarning, match="the gradients' noise is r = nan"):
        samples.predict(torch.zeros(1, 3))
