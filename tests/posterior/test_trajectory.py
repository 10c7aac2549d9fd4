"""Temperatures of positions, KL divergences of steps, and Brier's score, beside what they are by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.diagnostics import TrajectoryKL, brier_score, configurational_temperature


def test_the_temperature_of_exact_draws_is_the_one_that_was_asked_for() -> None:
    g = torch.Generator().manual_seed(0)
    curvature = torch.tensor([0.1, 1.0, 50.0])
    for temperature in (0.01, 2.0):
        theta = 3.0 + torch.randn(200_000, 3, generator=g) * (temperature / curvature).sqrt()
        found = configurational_temperature(theta, curvature * (theta - 3.0))
        # Its variance is 2 T^2 / n.
        assert float((found / temperature - 1).abs().max()) < 5 * math.sqrt(2 / 200_000)
    quartic = np.random.default_rng(1).standard_normal(400_000)  # by acceptance, from exp(-x^4)
    quartic = quartic[
        np.random.default_rng(2).random(400_000) < np.exp(-(quartic**4) + quartic**2 / 2 - 1 / 16)
    ]
    found = configurational_temperature(quartic, 4 * quartic**3)
    assert abs(float(found) - 1) < 0.02


def test_gradient_noise_heats() -> None:
    theta = torch.zeros(4000, requires_grad=True)
    optimizer = fe.LangevinAdam(
        [theta], lr=0.1, betas=(0.9, 0.999), temperature=1.0, prior_precision=0, eps=1e-4, seed=0
    )
    optimizer.state[theta].update(
        step=torch.zeros(()), exp_avg=torch.zeros(4000), exp_avg_sq=torch.ones(4000)
    )
    optimizer.freeze_preconditioner()
    g = torch.Generator().manual_seed(3)
    draws = []
    for step in range(900):
        theta.grad = theta.detach() + 3.0 * torch.randn(4000, generator=g)
        optimizer.step()
        if step >= 200 and step % 20 == 0:
            draws.append(theta.detach().clone())
    weights = torch.stack(draws)
    found = float(configurational_temperature(weights, weights).mean())
    assert abs(found / (1 + 0.1 * 9 / 2) - 1) < 0.05  # 1 + h s^2 / (2 T D)


def test_steps_are_weighed_by_the_beliefs_width() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([p], lr=0.5)
    kl = TrajectoryKL(optimizer, std=0.1)
    for grad in ([1.0, 0.0], [2.0, -4.0]):
        p.grad = torch.tensor(grad)
        optimizer.step()
    assert kl.values.tolist() == pytest.approx([0.25 / 0.02, (1.0 + 4.0) / 0.02])
    assert kl.total == pytest.approx(5.25 / 0.02)
    kl.remove()
    optimizer.step()
    assert len(kl.values) == 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_of_langevin_adam_the_width_is_that_of_its_preconditioner(frozen: bool, amsgrad: bool) -> None:
    p = nn.Parameter(torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    still = nn.Parameter(torch.ones(3))  # never has a gradient
    optimizer = fe.LangevinAdam(
        [p, still], lr=0.01, temperature=0.5, prior_precision=0.1, amsgrad=amsgrad, seed=0
    )
    g = torch.Generator().manual_seed(2)

    def step() -> Tensor:
        before = p.detach().clone()
        p.grad = torch.randn(50, dtype=torch.float64, generator=g)
        optimizer.step()
        state = optimizer.state[p]
        v = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        denominator = (v / (1.0 if frozen else 1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8
        return (denominator * (p.detach() - before) ** 2).sum() / (2 * 0.5)

    step()
    if frozen:
        optimizer.freeze_preconditioner()
    kl = TrajectoryKL(optimizer)
    expected = [float(step()) for _ in range(3)]
    assert kl.values.tolist() == pytest.approx(expected)


def test_at_temperature_0_a_step_that_moves_is_infinite_and_one_that_does_not_is_none() -> None:
    p, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = fe.LangevinAdam([{"params": [p]}, {"params": [still]}], lr=0.1, temperature=0.0)
    kl = TrajectoryKL(optimizer)
    for grad in (0.0, 0.0, 1.0):
        p.grad, still.grad = torch.full((3,), grad), torch.zeros(2)
        optimizer.step()
        if grad == 0:
            assert kl.total == 0
    assert kl.values.tolist() == [0, 0, math.inf] and kl.total == math.inf


def test_briers_score_by_hand() -> None:
    probabilities = [[0.8, 0.2, 0.0], [0.1, 0.1, 0.8]]
    assert brier_score(torch.tensor(probabilities), [0, 1]) == pytest.approx((0.08 + 0.01 + 0.81 + 0.64) / 2)
    assert brier_score(torch.eye(3), torch.arange(3)) == 0
    assert brier_score(torch.eye(3), torch.tensor([1, 2, 0])) == 2
    with pytest.raises(ValueError, match=r"brier_score: labels must be in \[0, 3\); got 0 to 3"):
        brier_score(torch.eye(3), torch.tensor([3, 2, 0]))
    with pytest.raises(
        ValueError, match="brier_score: probabilities must sum to 1 in every row; got a sum of 1.5"
    ):
        brier_score(torch.ones(2, 3) / 2, [0, 1])
    assert brier_score(torch.randn(50, 30).softmax(1).bfloat16(), torch.arange(50) % 30) > 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"gradients, with 2 draws or more; got \(1, 3\) and \(1, 3\)"):
        configurational_temperature(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(TypeError, match="weights must be floating point; got torch.int64"):
        configurational_temperature([1, 2], [1.0, 2.0])
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(TypeError, match="std must be given for an optimizer without temperature"):
        TrajectoryKL(sgd)
    with pytest.raises(ValueError, match="std must be finite and > 0; got 0"):
        TrajectoryKL(sgd, std=0.0)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer; got int"):
        TrajectoryKL(3)
