"""Whose noise is whose: the seed that ranks agree on, and one warning of two optimizers with the same numbers."""

import copy
import gc
import warnings

import pytest
import torch
from cases import bits_equal

import fekernels as fe
from fekernels.optim import _base, _seeds

HOT = dict(temperature=0.5, eps=0.1)


def parameter(*shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.ones(shape)
    return p


@pytest.fixture
def ranks(monkeypatch):
    """As if this process were one of several, and rank 0 had drawn 77; counts the broadcasts."""
    calls = []
    monkeypatch.setattr(_base, "has_ranks", lambda: True)
    monkeypatch.setattr(_base, "seed_of_rank_0", lambda seed: calls.append(seed) or 77)
    return calls


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_first_noise_is_rank_0s(backend, compiled, ranks):
    torch._dynamo.reset()
    p, q = parameter(5), parameter(5)
    optimizer = fe.LangevinAdam([p], **HOT, backend=backend)
    plain = fe.LangevinAdam([q], **HOT, seed=77, backend=backend)
    take = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
    for _ in range(2):
        take()
        plain.step()
    assert bits_equal(p, q) and len(ranks) == 1 and optimizer.param_groups[0]["seed"] == 77


def test_only_what_needs_the_seed_asks_for_it(ranks):
    cold = fe.LangevinAdam([parameter(5)])
    cold.step()
    given = fe.LangevinAdam([parameter(5)], **HOT, seed=3)
    given.step()
    loaded = fe.LangevinAdam([parameter(5)], **HOT)
    loaded.load_state_dict(given.state_dict())
    loaded.step()
    assert ranks == [] and loaded.param_groups[0]["seed"] == 3
    cold.param_groups[0]["temperature"] = 0.5
    cold.param_groups[0]["eps"] = 0.1
    for optimizer in (copy.deepcopy(cold), cold):  # a copy made before has yet to ask as well
        optimizer.step()
        optimizer.step()
    copy.deepcopy(cold).step()
    assert len(ranks) == 2
    rounding = fe.LangevinAdam([parameter(5).bfloat16().detach().requires_grad_()], stochastic_rounding=True)
    rounding.param_groups[0]["params"][0].grad = torch.ones(5, dtype=torch.bfloat16)
    rounding.step()
    assert len(ranks) == 3


@pytest.fixture
def nobody(monkeypatch):
    """No optimizers of other tests that are still about."""
    gc.collect()
    monkeypatch.setattr(_seeds, "_optimizers", type(_seeds._optimizers)())


def test_one_optimizer_a_parameter_with_one_seed_is_warned_of(nobody):
    first = fe.SGLD([parameter(3)], 0.1, seed=0)
    with pytest.warns(UserWarning, match="SGLD: another optimizer has seed 0 and stream 0 too"):
        second = fe.SGLD([parameter(4)], 0.1, seed=0)
    assert first.param_groups[0]["streams"] == second.param_groups[0]["streams"] == [0]


def test_nothing_is_said_of_noise_that_is_not_shared(nobody):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, q = parameter(3), parameter(4)
        kept = [
            fe.SGLD([p], 0.1, seed=0),
            fe.SGLD([q], 0.1, seed=1),
            fe.SGLD([("q", q)], 0.1, seed=0),
            fe.SGLD([parameter(3)], 0.1, seed=0),  # the same network again, to compare
            fe.LangevinAdam([parameter(5)], seed=0),  # cold
            fe.SGLD([parameter(6)], 0.1),
            fe.SGLD([q, parameter(2)], 0.1, seed=1),  # takes over from that of q alone
        ]
    assert kept
