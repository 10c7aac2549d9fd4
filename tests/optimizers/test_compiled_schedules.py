"""Schedules of lr, betas and temperature under torch.compile: the eager step's bits, and two compilations at most."""

import numpy as np
import pytest
import torch

import fekernels as fe
from tests.support.implementations import PLACES, Place
from tests.support.pairwise import pairwise
from tests.support.parameters import HOT, parameters, same, set_gradients, step
from tests.support.tensors import bits_equal

lr_scheduler = torch.optim.lr_scheduler
SCHEDULES = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=7, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 8, eta_min=1e-3),
    "ExponentialTemperature": lambda o: fe.optim.ExponentialTemperature(o, 0.9),
    "CosineTemperature": lambda o: fe.optim.CosineTemperature(o, 20, eta_min=0.01),
}
KINDS = {
    "floats": {},
    "tensor lr": {"lr": 0.1},
    "tensors": {"lr": 0.1, "betas": (0.9, 0.99), "temperature": 0.5},
}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def tensors(values):
    def convert(v):
        return tuple(map(convert, v)) if isinstance(v, tuple) else torch.tensor(v, dtype=torch.float64)

    return {key: convert(value) for key, value in values.items()}


# What is compiled is the operator's call, whatever the backend: one of them tries every schedule, each of them one.
CPP = Place("cpp", "cpu")
KINDS_OF = [(name, "floats") for name in SCHEDULES] + [("OneCycleLR", "tensor lr"), ("OneCycleLR", "tensors")]


@pytest.mark.parametrize(
    ("name", "kind", "place"),
    [(*each, CPP) for each in KINDS_OF]
    + [
        pytest.param("OneCycleLR", "tensors", *each.values, marks=each.marks)
        for each in PLACES
        if each.values != (CPP,)
    ],
    indirect=["place"],
)
def test_a_schedule_compiles_twice_at_most(name, kind, place, fresh_dynamo):
    eager, traced = (
        fe.LangevinAdam(parameters(place), **{**HOT, **tensors(KINDS[kind])}, backend=place.backend)
        for _ in range(2)
    )
    schedules = [SCHEDULES[name](optimizer) for optimizer in (eager, traced)]
    compiled = torch.compile(traced.step, backend="aot_eager")
    states = 0
    for i in range(30):
        step(eager, i)
        set_gradients(traced, i)
        compiled()
        if i == 0:  # whose graph made the states, and is used no more
            states = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for schedule in schedules:
            schedule.step()
        assert same(eager, traced)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - states <= 2
    assert states == 1


@pytest.mark.parametrize("name", ["CosineAnnealingWarmRestarts", "ExponentialTemperature"])
@pytest.mark.parametrize("place", [CPP], indirect=True, ids=str)
def test_sgld_too(name, place, fresh_dynamo):
    eager, traced = (fe.SGLD(parameters(place), 0.1, seed=7, backend=place.backend) for _ in range(2))
    schedules = [SCHEDULES[name](optimizer) for optimizer in (eager, traced)]
    compiled = torch.compile(traced.step, backend="aot_eager")
    for i in range(30):
        step(eager, i)
        set_gradients(traced, i)
        compiled()
        for schedule in schedules:
            schedule.step()
        assert same(eager, traced)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


NUMPYS = pairwise(
    make=[fe.LangevinAdam, fe.SGLD], key=["temperature", "lr"], kind=[np.float64, np.float32, np.array]
)


@pytest.mark.parametrize(NUMPYS[0]._fields, NUMPYS)
@pytest.mark.parametrize("place", [CPP], indirect=True, ids=str)
def test_numpys_numbers_compile_twice_at_most(make, key, kind, place, fresh_dynamo):
    options = {**HOT} if make is fe.LangevinAdam else {"lr": 0.1, "seed": 7}
    eager, traced = (make(parameters(place), **options, backend=place.backend) for _ in range(2))
    compiled = torch.compile(traced.step, backend="aot_eager", fullgraph=True)
    for i in range(6):
        for optimizer in (eager, traced):
            optimizer.param_groups[0][key] = kind(0.1 + 0.05 * i)
        step(eager, i)
        set_gradients(traced, i)
        compiled()
        for p, q in zip(eager.param_groups[0]["params"], traced.param_groups[0]["params"], strict=True):
            assert bits_equal(p, q)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first makes the states


def test_from_cold_to_hot_and_back(place, fresh_dynamo):
    eager, traced = (
        fe.LangevinAdam(parameters(place), **{**HOT, "temperature": 0.0}, backend=place.backend)
        for _ in range(2)
    )
    compiled = torch.compile(traced.step, backend="aot_eager")
    for i, (temperature, lr) in enumerate(
        [(0.0, 0.1), (0.5, 0.2), (0.25, 0.1), (0.0, 0.05), (0.125, 0.2), (0.0, 0.1)]
    ):
        for optimizer in (eager, traced):
            optimizer.param_groups[0].update(temperature=temperature, lr=lr)
        step(eager, i)
        set_gradients(traced, i)
        compiled()
        for p, q in zip(eager.param_groups[0]["params"], traced.param_groups[0]["params"], strict=True):
            assert bits_equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_betas_may_be_tensors(dtype, place):
    betas = (0.75, 0.875)
    plain = fe.LangevinAdam(parameters(place), **HOT, betas=betas, backend=place.backend)
    given = tuple(torch.tensor(beta, dtype=dtype) for beta in betas)
    optimizer = fe.LangevinAdam(parameters(place), **HOT, betas=given, backend=place.backend)
    for i in range(4):
        if i == 2:  # in place, as a scheduler of torch moves a tensor
            given[0].fill_(0.5)
            plain.param_groups[0]["betas"] = (0.5, 0.875)
        step(plain, i)
        step(optimizer, i)
    assert same(plain, optimizer) and optimizer.param_groups[0]["betas"][0] is given[0]


@pytest.mark.parametrize(
    ("betas", "error", "message"),
    [
        ((torch.tensor(1.0), 0.9), ValueError, r"betas\[0\] must be in \[0, 1\); got 1.0"),
        ((0.9, torch.tensor(-0.5)), ValueError, r"betas\[1\] must be in \[0, 1\); got -0.5"),
        (
            (0.9, torch.ones(2)),
            ValueError,
            r"betas\[1\] must be a number or a tensor with one element; got .*\(2,\)",
        ),
        (
            (torch.tensor(0.5, device="meta"), 0.9),
            ValueError,
            r"betas\[0\] must be on cpu like its parameters",
        ),
        ((None, 0.9), TypeError, r"betas\[0\] must be a number; got NoneType"),
    ],
)
def test_bad_tensor_betas(betas, error, message):
    with pytest.raises(error, match=f"LangevinAdam: {message}"):
        fe.LangevinAdam([torch.ones(3, requires_grad=True)], betas=betas)
