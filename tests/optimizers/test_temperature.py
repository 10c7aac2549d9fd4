"""The temperature schedules: closed forms, round trips, what tensors and several groups need, errors."""

import copy
import math
import pickle
import warnings

import pytest
import torch

from fekernels.optim.temperature import (
    ConstantTemperature,
    CosineTemperature,
    CyclicalTemperature,
    ExponentialTemperature,
    LambdaTemperature,
    TemperatureScheduler,
)
from tests.support.temperature import SCHEDULES, Halving, optimizer_with, run

# Cycles of a few steps show which step is which; that they are too short to mix is test_cyclical_temperature.py's.
pytestmark = pytest.mark.filterwarnings("ignore:CyclicalTemperature. the sampling phase")


@pytest.mark.parametrize("burn_in", [0, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_form(name, burn_in):
    make, factor = SCHEDULES[name]
    optimizer = optimizer_with(2.0, 0.5)
    schedule = make(optimizer, burn_in=burn_in)
    expected = [factor(s - burn_in) if s >= burn_in else 0.0 for s in range(17)]
    seen = run(optimizer, schedule, 17)
    assert seen == [[pytest.approx(2.0 * f), pytest.approx(0.5 * f)] for f in expected]
    # The same without applying anything, in any order.
    ahead = make(optimizer_with(2.0, 0.5), burn_in=burn_in)
    assert [ahead.get_temperature(s) for s in reversed(range(17))] == seen[::-1]
    assert ahead.last_epoch == 0


def test_cosine_stays_at_its_minimum():
    optimizer = optimizer_with(1.0)
    seen = run(optimizer, CosineTemperature(optimizer, T_max=4, eta_min=0.25), 9)
    assert seen[2] == [pytest.approx(0.625)]
    assert seen[4:] == [[0.25]] * 5


def test_agrees_with_torch_where_both_are_defined():
    mine, theirs = optimizer_with(0.1), optimizer_with(0.0, lr=0.1)
    schedule = CosineTemperature(mine, 10, eta_min=0.01)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 10, eta_min=0.01)
    for _ in range(10):
        assert mine.param_groups[0]["temperature"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        assert schedule.get_last_temperature() == pytest.approx(peer.get_last_lr(), rel=1e-12)
        for thing in (mine, theirs, schedule, peer):
            thing.step()


def test_cyclical_lr_phase_and_flags():
    optimizer = optimizer_with(1e-3, lr=0.1)
    schedule = CyclicalTemperature(
        optimizer, 10, proportion_exploration=0.6, lr_min=0.0, burn_in=3, proportion_burn_in=0.5
    )
    lrs, hot, sampling, cycles = [], [], [], []
    for _ in range(23):
        lrs.append(optimizer.param_groups[0]["lr"])
        hot.append(optimizer.param_groups[0]["temperature"] > 0)
        sampling.append(schedule.sampling)
        cycles.append(schedule.cycle)
        optimizer.step()
        schedule.step()
    cycle = [0.05 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert lrs == pytest.approx([0.1] * 3 + cycle + cycle)
    assert hot == [False] * 3 + ([False] * 6 + [True] * 4) * 2
    assert sampling == [False] * 3 + ([False] * 8 + [True] * 2) * 2
    assert cycles == [-1] * 3 + [0] * 10 + [1] * 10


def test_cyclical_leaves_lr_alone_when_told_so():
    optimizer = optimizer_with(1.0, lr=0.1)
    schedule = CyclicalTemperature(optimizer, 4, anneal_lr=False)
    optimizer.param_groups[0]["lr"] = 0.3
    run(optimizer, schedule, 3)
    assert optimizer.param_groups[0]["lr"] == 0.3
    always = CyclicalTemperature(optimizer_with(1.0), 4, 0.0, burn_in=2, proportion_burn_in=0.0)
    assert [always.sampling, always.step(), always.sampling, always.step(), always.sampling][::2] == [0, 0, 1]
    floor = optimizer_with(1.0, lr=0.1)
    CyclicalTemperature(floor, 4, lr_min=0.06).step(2)
    assert floor.param_groups[0]["lr"] == pytest.approx(0.08)


def test_tensors_are_written_in_place_and_floats_replaced():
    tensor, lr = torch.tensor(2.0), torch.tensor(0.1)
    optimizer = optimizer_with(tensor, 3.0)
    optimizer.param_groups[0]["lr"] = lr
    schedule = CyclicalTemperature(optimizer, 10, 0.5)
    before = tensor.data_ptr()
    run(optimizer, schedule, 8)
    first, second = optimizer.param_groups
    assert first["temperature"] is tensor and tensor.data_ptr() == before and first["lr"] is lr
    assert tensor.item() == 2.0 and second["temperature"] == 3.0 and type(second["temperature"]) is float
    assert lr.item() == pytest.approx(0.01 + 0.045 * (1 + math.cos(0.8 * math.pi)))
    last = schedule.get_last_temperature()[0]
    last.zero_()
    assert tensor.item() == 2.0 and schedule.get_last_temperature()[0].item() == 2.0
    run(optimizer, schedule, 3)
    assert tensor.item() == 0.0 and schedule.base_temperatures[0].item() == 2.0
    # A float that has become a tensor, as for a capturable optimizer, is written in place too.
    second["temperature"] = later = torch.tensor(0.0)
    schedule.step(5)
    assert second["temperature"] is later and later.item() == 3.0


def test_jump_to_a_step():
    optimizer = optimizer_with(1.0)
    schedule = ExponentialTemperature(optimizer, 0.5)
    schedule.step(3)
    assert optimizer.param_groups[0]["temperature"] == 0.125 and schedule.last_epoch == 3
    schedule.step()
    assert optimizer.param_groups[0]["temperature"] == 0.0625


@pytest.mark.parametrize("name", SCHEDULES)
def test_state_round_trip_goes_on_where_it_was(name):
    make, _ = SCHEDULES[name]
    optimizer = optimizer_with(2.0, torch.tensor(0.5))
    schedule = make(optimizer, burn_in=2)
    run(optimizer, schedule, 6)
    saved = copy.deepcopy(pickle.loads(pickle.dumps(schedule.state_dict())))
    other = optimizer_with(2.0, torch.tensor(0.5))
    resumed = make(other, burn_in=2)
    resumed.load_state_dict(saved)
    assert run(other, resumed, 6) == run(optimizer, schedule, 6)
    # Going on does not reach into what was saved.
    assert saved["last_epoch"] == 6 and saved["base_temperatures"][0] == 2.0


def test_state_of_a_callable_object_is_saved():
    optimizer, halving = optimizer_with(1.0), Halving()
    halving.every = 2
    saved = LambdaTemperature(optimizer, halving).state_dict()
    fresh = Halving()
    LambdaTemperature(optimizer_with(1.0), fresh).load_state_dict(saved)
    assert fresh.every == 2


def test_resumes_from_the_groups_of_a_loaded_optimizer():
    optimizer = optimizer_with(2.0)
    run(optimizer, ExponentialTemperature(optimizer, 0.5), 4)
    other = optimizer_with(7.0)
    other.load_state_dict(optimizer.state_dict())
    ExponentialTemperature(other, 0.5, last_epoch=3)
    assert other.param_groups[0]["temperature"] == 2.0 * 0.5**4


def test_deepcopy_takes_the_optimizer_along():
    optimizer = optimizer_with(1.0)
    twin = copy.deepcopy(ExponentialTemperature(optimizer, 0.5))
    twin.step()
    assert twin.optimizer.param_groups[0]["temperature"] == 0.5
    assert optimizer.param_groups[0]["temperature"] == 1.0


def test_a_later_group_joins():
    optimizer = optimizer_with(1.0)
    schedule = CyclicalTemperature(optimizer, 10, 0.5)
    schedule.step(6)
    saved = schedule.state_dict()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "temperature": 8.0, "lr": 0.2})
    schedule.step()
    second = optimizer.param_groups[1]
    assert second["temperature"] == second["initial_temperature"] == 8.0
    assert second["lr"] == pytest.approx(0.02 + 0.09 * (1 + math.cos(0.7 * math.pi)))
    assert saved["base_temperatures"] == [1.0] and schedule.state_dict()["base_temperatures"] == [1.0, 8.0]


def test_one_function_a_group():
    optimizer = optimizer_with(1.0, 1.0)
    schedule = LambdaTemperature(optimizer, [lambda s: s, lambda s: 2 * s])
    schedule.step()
    assert [g["temperature"] for g in optimizer.param_groups] == [1.0, 2.0]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "temperature": 1.0})
    with pytest.raises(ValueError, match=r"one function per parameter group \(3\); got 2"):
        schedule.step()
    assert schedule.last_epoch == 1


def test_a_schedule_of_ones_own():
    class Steps(TemperatureScheduler):
        def temperature_at(self, step, initial, group):
            return initial * (step + group)

    optimizer = optimizer_with(1.0, 1.0)
    assert run(optimizer, Steps(optimizer, burn_in=1), 3) == [[0, 0], [0, 1], [1, 2]]


# What torch.optim.lr_scheduler, and the frameworks on top of it, ask of a scheduler.


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_a_scheduler_of_torch(name):
    optimizer = optimizer_with(2.0, torch.tensor(0.5))
    optimizer.param_groups[1]["lr"] = torch.tensor(0.25)
    schedule = SCHEDULES[name][0](optimizer)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert schedule.optimizer is optimizer and schedule.last_epoch == 0 and schedule._step_count == 1
    assert schedule.base_lrs == [0.1, 0.25]
    lr = optimizer.param_groups[1]["lr"]
    run(optimizer, schedule, 3)
    assert schedule._step_count == 4 and optimizer.param_groups[1]["lr"] is lr
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    if name != "cyclical":
        assert schedule.get_lr() == schedule.get_last_lr() == [0.1, 0.25]
    schedule.get_last_lr()[1].zero_()
    assert lr != 0
    saved = schedule.state_dict()
    assert {"last_epoch", "_step_count", "base_lrs", "_last_lr"} <= saved.keys() and "optimizer" not in saved
    other = SCHEDULES[name][0](optimizer_with(2.0, torch.tensor(0.5)))
    other.load_state_dict(saved)
    assert (other.last_epoch, other._step_count) == (3, 4)


def test_a_state_of_an_earlier_release_loads():
    optimizer = optimizer_with(1.0)
    schedule = ExponentialTemperature(optimizer, 0.5)
    schedule.step(3)
    old = {k: v for k, v in schedule.state_dict().items() if k not in ("_step_count", "_last_lr", "base_lrs")}
    fresh = optimizer_with(1.0)
    ExponentialTemperature(fresh, 0.5).load_state_dict(old)
    assert fresh.param_groups[0]["temperature"] == 0.125


@pytest.mark.parametrize("lr_first", [True, False])
def test_a_scheduler_of_lr_beside_it(lr_first):
    optimizer = optimizer_with(1.0, lr=0.5)
    makers = [
        lambda: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        lambda: ExponentialTemperature(optimizer, 0.25),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [make() for make in (makers if lr_first else makers[::-1])]
        for k in range(4):
            group = optimizer.param_groups[0]
            assert (group["lr"], group["temperature"]) == (0.5 * 0.5**k, 0.25**k)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
            assert [s.get_last_lr() for s in schedulers] == [[0.5 * 0.5 ** (k + 1)]] * 2
    # That torch still sees what it should see: an lr scheduler stepped before its optimizer.
    fresh = optimizer_with(1.0)
    late = torch.optim.lr_scheduler.ExponentialLR(fresh, 0.5)
    ExponentialTemperature(fresh, 0.5).step()
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        late.step()


def test_inside_torchs_own_combinations():
    optimizer = optimizer_with(1.0, lr=0.5)
    both = torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), ExponentialTemperature(optimizer, 0.25)]
    )
    seen = run(optimizer, both, 3)
    assert seen == [[1.0], [0.25], [0.0625]] and both.get_last_lr() == [0.0625]
    optimizer = optimizer_with(1.0)
    parts = [ConstantTemperature(optimizer), ExponentialTemperature(optimizer, 0.5)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*epoch parameter.*")
        one_after_the_other = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
        assert run(optimizer, one_after_the_other, 5) == [[1.0], [1.0], [1.0], [0.5], [0.25]]


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: ConstantTemperature(3), TypeError, "torch.optim.Optimizer; got int"),
        (lambda o: ConstantTemperature(sgd()), ValueError, "'temperature' in every parameter group.*got SGD"),
        (lambda o: ConstantTemperature(o, burn_in=-1), ValueError, "burn_in must be at least 0; got -1"),
        (lambda o: ConstantTemperature(o, burn_in=2.0), TypeError, "burn_in must be an int; got float"),
        (lambda o: ConstantTemperature(o, last_epoch=5), ValueError, "last_epoch must be -1 unless"),
        (
            lambda o: ExponentialTemperature(o, 0.0),
            ValueError,
            "gamma must be finite and > 0; got 0",
        ),
        (lambda o: ExponentialTemperature(o, "2"), TypeError, "gamma must be a number; got str"),
        (lambda o: CosineTemperature(o, 0), ValueError, "T_max must be at least 1; got 0"),
        (
            lambda o: CosineTemperature(o, 5, -1e-3),
            ValueError,
            "eta_min must be finite and >= 0; got -0.001",
        ),
        (lambda o: CyclicalTemperature(o, 0), ValueError, "cycle_length must be at least 1; got 0"),
        (lambda o: CyclicalTemperature(o, 5, 1.0), ValueError, r"in \[0, 1\); got 1.0"),
        (
            lambda o: CyclicalTemperature(o, 5, lr_min=-1),
            ValueError,
            "lr_min must be finite and >= 0; got -1",
        ),
        (
            lambda o: CyclicalTemperature(o, 5, proportion_burn_in=1.0),
            ValueError,
            r"proportion_burn_in must be in \[0, 1\); got 1.0",
        ),
        (lambda o: CyclicalTemperature(o, 5, anneal_lr=1), TypeError, "anneal_lr must be a bool; got int"),
        (lambda o: LambdaTemperature(o, 0.5), TypeError, "callable or a list of them; got float"),
        (lambda o: LambdaTemperature(o, [abs, abs]), ValueError, r"parameter group \(1\); got 2"),
        (
            lambda o: LambdaTemperature(o, lambda s: -1.0),
            ValueError,
            "factor of step 0 must be finite and >= 0; got -1",
        ),
        (lambda o: LambdaTemperature(o, lambda s: math.nan), ValueError, "factor of step 0 .*; got nan"),
        (lambda o: TemperatureScheduler(o), NotImplementedError, "must define temperature_at"),
    ],
)
def test_bad_arguments_change_nothing(make, error, message):
    optimizer = optimizer_with(1.5)
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    with pytest.raises(error, match=message):
        make(optimizer)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == before
