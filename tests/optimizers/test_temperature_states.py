"""Saved states of the temperature schedules: what they are made of, and bad ones."""

import copy

import numpy as np
import pytest
import torch

from fekernels.optim.temperature import (
    ConstantTemperature,
    CosineTemperature,
    CyclicalTemperature,
    ExponentialTemperature,
)
from tests.support.temperature import SCHEDULES, optimizer_with, run

# Cycles of a few steps show which step is which; that they are too short to mix is test_cyclical_temperature.py's.
pytestmark = pytest.mark.filterwarnings("ignore:CyclicalTemperature. the sampling phase")


def test_bad_states_change_nothing():
    optimizer = optimizer_with(1.0)
    schedule = ExponentialTemperature(optimizer, 0.5)
    schedule.step()
    with pytest.raises(TypeError, match="state_dict must be a dict; got list"):
        schedule.load_state_dict([])
    with pytest.raises(ValueError, match="state_dict must have the keys"):
        schedule.load_state_dict(CosineTemperature(optimizer_with(1.0), 5).state_dict())
    with pytest.raises(ValueError, match="at most 1 parameter groups; got 2"):
        schedule.load_state_dict(ExponentialTemperature(optimizer_with(1.0, 1.0), 0.5).state_dict())
    assert schedule.last_epoch == 1 and optimizer.param_groups[0]["temperature"] == 0.5


@pytest.mark.parametrize(
    ("name", "key", "value", "error", "message"),
    [
        ("cyclical", "cycle_length", 0, ValueError, "must be at least 1; got 0"),
        ("cyclical", "lr_min", "x", TypeError, "must be a number; got str"),
        ("cyclical", "anneal_lr", 1, TypeError, "must be a bool; got int"),
        ("cyclical", "proportion_exploration", 1.0, ValueError, r"must be in \[0, 1\); got 1.0"),
        ("cyclical", "base_lrs", ["x"], TypeError, "must be a number; got str"),
        ("cosine", "T_max", 0, ValueError, "must be at least 1; got 0"),
        ("exponential", "gamma", 0.0, ValueError, "must be finite and > 0; got 0.0"),
        ("lambda", "temperature_lambdas", None, TypeError, "must be a list; got NoneType"),
        ("callable", "temperature_lambdas", [3], TypeError, "must hold dicts or None; got int"),
        *(
            (name, *case)
            for name in SCHEDULES
            for case in (
                ("last_epoch", "x", TypeError, "must be an int; got str"),
                ("last_epoch", -2, ValueError, "must be at least -1; got -2"),
                ("burn_in", None, TypeError, "must be an int; got NoneType"),
                ("base_temperatures", None, TypeError, "must be a list; got NoneType"),
                ("base_temperatures", [-1.0], ValueError, "must be finite and >= 0; got -1.0"),
                ("base_temperatures", [torch.ones(2)], ValueError, r"must hold numbers .*\(2,\)"),
            )
        ),
    ],
)
def test_bad_values_of_a_state_change_nothing(name, key, value, error, message):
    optimizer = optimizer_with(1.0)
    schedule = SCHEDULES[name][0](optimizer)
    run(optimizer, schedule, 3)
    before = copy.deepcopy(schedule.state_dict()), optimizer.state_dict()["param_groups"]
    with pytest.raises(error, match=f"^{type(schedule).__name__}.load_state_dict: {key} {message}"):
        schedule.load_state_dict({**schedule.state_dict(), key: value})
    assert (schedule.state_dict(), optimizer.state_dict()["param_groups"]) == before


def test_a_state_whose_step_has_no_temperature_changes_nothing():
    optimizer = optimizer_with(1.0)
    schedule = ExponentialTemperature(optimizer, 2.0)
    before = schedule.state_dict()
    with pytest.raises(OverflowError):
        schedule.load_state_dict({**before, "last_epoch": 5000})
    assert schedule.state_dict() == before and optimizer.param_groups[0]["temperature"] == 1.0


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path):
    optimizer = optimizer_with(np.float64(0.5), lr=np.float64(0.1))
    for schedule in (ConstantTemperature(optimizer), CyclicalTemperature(optimizer, np.int64(5))):
        schedule.step()
        torch.save(schedule.state_dict(), tmp_path / "state")
        assert torch.load(tmp_path / "state", weights_only=True) == schedule.state_dict()
        assert [type(base) for base in schedule.base_temperatures] == [float]
