"""What the cycles of CyclicalTemperature collect, and when it warns."""

import math
import warnings

import pytest
import torch

import fekernels as fe
from fekernels.optim import CyclicalTemperature

CHAINS = 20_000
EPS = 1e4  # so large that the preconditioner is 1 / eps: exp(-theta^2/2) has x = lr / eps, all exactly


def optimizer_with(temperature=1.0, lr=0.1):
    return torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "temperature": temperature}], lr=lr
    )


def variances(lr_over_sigma, cycle_length, beta1=0.9, **settings):
    """Of the collected steps of the second cycle, over many chains on N(0, 1); and what the schedule expects."""
    theta = torch.nn.Parameter(torch.randn(CHAINS))
    optimizer = fe.LangevinAdam(
        [theta], lr=lr_over_sigma * EPS, betas=(beta1, 0.999), eps=EPS, temperature=1.0, seed=0
    )
    schedule = CyclicalTemperature(optimizer, cycle_length, **settings)
    collected = []
    for step in range(2 * cycle_length):
        theta.grad = theta.detach().clone()
        optimizer.step()
        if schedule.sampling and step >= cycle_length:
            collected.append(theta.detach().double().var().item())
        schedule.step()
    return collected, schedule.collected_variance(lr_over_sigma)


def test_the_defaults_collect_the_variance():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collected, expected = variances(0.1, 800)
    # The first collected step and the last, and the mean; discretisation adds x/2 (1-b)/(1+b) < .003.
    assert len(collected) == 200 and min(collected) > 0.9
    assert sum(collected) / 200 == pytest.approx(1.0, abs=5 * math.sqrt(2 / CHAINS) + 0.003)
    assert expected == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("beta1", "lag"), [(0.0, 0.0), (0.9, 0.08)])
def test_the_settings_of_the_paper_collect_half_and_warn(beta1, lag):
    settings = dict(proportion_exploration=0.8, lr_min=0.0, proportion_burn_in=0.0)
    with pytest.warns(UserWarning, match=r"of 800 steps is too short.* 10 lr .*would show 0.52 of"):
        collected, expected = variances(0.1, 800, beta1, **settings)
    assert len(collected) == 160
    # What the formula has at once comes later by the memory of the momentum.
    assert sum(collected) / 160 == pytest.approx(expected - lag, abs=0.02)
    assert expected == pytest.approx(0.52, abs=0.005)


def test_expected_variance_is_that_of_the_formula():
    schedule = CyclicalTemperature(
        optimizer_with(lr=0.2), 100, 0.3, lr_min=0.05, burn_in=7, proportion_burn_in=0.25
    )
    relaxed, shares = 0.0, []
    for k in range(30, 100):
        relaxed += 0.4 * (0.05 + 0.15 * (1 + math.cos(math.pi * k / 100)) / 2) / 0.2
        if k / 100 >= 0.3 + 0.25 * 0.7:
            shares.append(1 - math.exp(-2 * relaxed))
    assert schedule.collected_variance(0.4) == pytest.approx(sum(shares) / len(shares), rel=1e-12)
    constant = CyclicalTemperature(optimizer_with(), 100, 0.5, anneal_lr=False, proportion_burn_in=0.0)
    rates = [1 - math.exp(-2 * 0.03 * n) for n in range(1, 51)]
    assert constant.collected_variance(0.03) == pytest.approx(sum(rates) / 50, rel=1e-12)
    with pytest.raises(ValueError, match="lr_over_sigma must be finite and > 0; got 0"):
        schedule.collected_variance(0)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (dict(cycle_length=100), False),
        (dict(cycle_length=90), True),
        (dict(cycle_length=800, proportion_exploration=0.8), False),
        (dict(cycle_length=800, proportion_exploration=0.8, lr_min=0.0), True),
        (dict(cycle_length=20), True),
        (dict(cycle_length=1), True),
    ],
)
def test_a_phase_too_short_to_mix_is_warned_about(settings, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CyclicalTemperature(optimizer_with(), **settings)
        CyclicalTemperature(optimizer_with(0.0), **settings)  # without noise there is nothing to mix
    assert [w.filename for w in caught] == [__file__] * warned


def test_lr_ends_at_a_tenth_of_each_groups_own():
    optimizer = optimizer_with(lr=0.1)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "temperature": 1.0, "lr": 0.4})
    schedule = CyclicalTemperature(optimizer, 1000)
    assert schedule.get_lr(0) == pytest.approx([0.1, 0.4])
    assert schedule.get_lr(500) == pytest.approx([0.055, 0.22])
    assert schedule.get_lr(999) == pytest.approx([0.01, 0.04], rel=1e-3)


def test_states_of_earlier_releases_go_on_as_they_were():
    with pytest.warns(UserWarning, match="too short"):
        schedule = CyclicalTemperature(optimizer_with(), 1000, 0.8, lr_min=0.0, proportion_burn_in=0.2)
    schedule.step(850)
    saved = schedule.state_dict()
    del saved["proportion_burn_in"]
    other = CyclicalTemperature(optimizer_with(), 1000)
    other.load_state_dict(saved)
    assert "proportion_burn_in" not in saved
    assert other.sampling and other.proportion_exploration == 0.8 and other.lr_min == 0.0
    other.step(800)
    assert other.sampling
