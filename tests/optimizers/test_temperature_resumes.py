"""Temperature schedules in a training: stopped and resumed, combined, with groups that join."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

import fekernels as fe
from fekernels.optim import (
    ConstantTemperature,
    CosineTemperature,
    CyclicalTemperature,
    ExponentialTemperature,
    LambdaTemperature,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:CyclicalTemperature. the sampling phase"),
    pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step"),
]
MILESTONE, LAST = 5, 12


def sequence(optimizer, *parts):
    return lr_scheduler.SequentialLR(optimizer, list(parts), milestones=[MILESTONE] * (len(parts) - 1))


SCHEDULES = {
    "plain": lambda o: CosineTemperature(o, 9, burn_in=3),
    "cyclical": lambda o: CyclicalTemperature(o, 4, burn_in=3),
    "sequence": lambda o: sequence(
        o, ExponentialTemperature(o, 0.5, burn_in=2), CosineTemperature(o, 4, 0.01)
    ),
    "cold, then hot": lambda o: sequence(o, ConstantTemperature(o, burn_in=100), ConstantTemperature(o)),
    "hot, then cold": lambda o: sequence(o, ConstantTemperature(o), ConstantTemperature(o, burn_in=100)),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), CosineTemperature(o, 9, burn_in=3)]
    ),
    "sequence in a chain": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ExponentialLR(o, 0.9),
            sequence(o, ExponentialTemperature(o, 0.5, burn_in=2), CosineTemperature(o, 4, 0.01)),
        ]
    ),
}


class Training:
    def __init__(self, schedule):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = fe.LangevinAdam(self.model.parameters(), lr=0.1, temperature=0.1, eps=0.1, seed=1)
        self.schedule = SCHEDULES[schedule](self.optimizer)
        self.temperatures = []

    def go(self, begin, end):
        for step in range(begin, end):
            self.temperatures.append([float(group["temperature"]) for group in self.optimizer.param_groups])
            self.optimizer.zero_grad()
            (self.model(torch.full((1, 3), 0.1 * step)) - 1).square().sum().backward()
            self.optimizer.step()
            self.schedule.step()
        return self


@pytest.mark.parametrize("order", list(itertools.permutations(["model", "optimizer", "schedule"])))
@pytest.mark.parametrize("stop", [1, 2, MILESTONE - 1, MILESTONE, MILESTONE + 1, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_training_is_the_uninterrupted_one(name, stop, order):
    whole, part, resumed = Training(name).go(0, LAST), Training(name).go(0, stop), Training(name)
    for each in order:
        getattr(resumed, each).load_state_dict(copy.deepcopy(getattr(part, each).state_dict()))
    resumed.go(stop, LAST)
    assert resumed.temperatures == whole.temperatures[stop:]
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_part_of_a_sequence_begins_at_the_milestone():
    cold = [temperature for (temperature,) in Training("cold, then hot").go(0, 7).temperatures]
    hot = [temperature for (temperature,) in Training("hot, then cold").go(0, 7).temperatures]
    assert cold == [0.0] * MILESTONE + [0.1] * 2
    assert hot == [0.1] * MILESTONE + [0.0] * 2


def joined(training, **values):
    more = torch.nn.Parameter(torch.zeros(2))
    more.grad = torch.full((2,), 1e-3)
    training.optimizer.add_param_group({"params": [more], **values})
    return more


def untouched(training):
    return training


def deep_copied(training):
    return copy.deepcopy(training)


def pickled(training):
    return pickle.loads(pickle.dumps(training))


@pytest.mark.parametrize("copied", [untouched, deep_copied, pickled])
@pytest.mark.parametrize("name", ["plain", "sequence", "chain", "sequence in a chain"])
def test_a_group_that_joins_is_at_the_temperature_of_its_step(name, copied):
    training = copied(Training(name).go(0, 1))
    joined(training, temperature=0.4)
    first, second = training.optimizer.param_groups
    assert first["temperature"] == second["temperature"] == 0.0  # in the burn-in
    assert (first["initial_temperature"], second["initial_temperature"]) == (0.1, 0.4)
    training.go(1, LAST)
    for a, b in training.temperatures[1:]:
        assert b == pytest.approx(4 * a) or (name.startswith("sequence") and a <= b <= 4 * a)
    assert training.temperatures[6][1] > training.temperatures[6][0] > 0


def test_the_first_step_of_a_group_that_joins_in_the_burn_in_is_cold():
    training = Training("plain").go(0, 1)
    more = joined(training)
    training.optimizer.step()
    assert (
        float(more.detach().abs().max()) <= 0.1 * 1.001
    )  # lr, where noise over D = |g| would be a hundred times it


def test_a_group_joins_a_cycle_with_its_own_lr():
    training = Training("cyclical").go(0, 5)
    joined(training, lr=0.2)
    first, second = training.optimizer.param_groups
    assert second["lr"] == pytest.approx(2 * first["lr"]) and second["initial_lr"] == 0.2


def test_what_was_written_by_hand_stays_when_another_joins():
    training = Training("plain").go(0, 6)
    training.optimizer.param_groups[0]["temperature"] = 7.0
    joined(training)
    assert training.optimizer.param_groups[0]["temperature"] == 7.0


def test_groups_that_share_a_tensor_share_its_initial_temperature():
    temperature = torch.tensor(0.1)
    model = torch.nn.Linear(3, 2)
    optimizer = fe.LangevinAdam(model.parameters(), lr=0.1, temperature=temperature, seed=1)
    schedule = ConstantTemperature(optimizer, burn_in=2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert float(temperature) == 0.0
    schedule.step(2)
    assert [float(group["temperature"]) for group in optimizer.param_groups] == [pytest.approx(0.1)] * 2


def test_one_joins_no_schedule_that_has_no_function_for_it():
    training = Training("plain")
    del training.schedule
    schedule = LambdaTemperature(training.optimizer, [lambda step: 0.5])
    with pytest.raises(ValueError, match="one function per parameter group"):
        joined(training)
    assert len(training.optimizer.param_groups) == 1
    schedule.temperature_lambdas.append(lambda step: 0.25)
    joined(training)
    assert [group["temperature"] for group in training.optimizer.param_groups] == [0.05, 0.025]


def test_a_schedule_that_is_gone_has_no_say():
    training = Training("plain")
    del training.schedule
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joined(training, temperature=0.4)
    assert training.optimizer.param_groups[1]["temperature"] == 0.4
