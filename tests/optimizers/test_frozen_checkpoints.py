"""Checkpoints and copies of a frozen preconditioner: they go on to the bit; Adam's, and those without one, adapt."""

import copy
import io
import pickle

import pytest
import torch

import fekernels as fe
from tests.optimizers.test_frozen_preconditioner import moments, stepped
from tests.support.implementations import at_places
from tests.support.parameters import HOT, parameters, same, step
from tests.support.tensors import Frozen


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(**at_places(dtype=[torch.float32, torch.bfloat16], amsgrad=[False, True]))
def test_a_frozen_checkpoint_goes_on_to_the_bit(dtype, amsgrad, place):
    keywords = dict(amsgrad=amsgrad, stochastic_rounding=dtype == torch.bfloat16)
    optimizer = stepped(place, 3, dtype, **keywords)
    optimizer.freeze_preconditioner()
    step(optimizer, 3)
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["frozen"] is True
    weights = [p.detach().clone().requires_grad_() for p in optimizer.param_groups[0]["params"]]
    resumed = fe.LangevinAdam(weights, **{**HOT, "seed": None}, **keywords, backend=place.backend)
    resumed.load_state_dict(saved)
    copies = [resumed, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for i in (4, 5):
        step(optimizer, i)
        for other in copies:
            step(other, i)
    optimizer.freeze_preconditioner(False)
    step(optimizer, 6)
    for other in copies:
        other.freeze_preconditioner(False)
        step(other, 6)
        assert same(optimizer, other)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_goes_on_frozen(flatten):
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    nets = [torch.nn.Linear(5, 3) for _ in range(2)]
    optimizers = [fe.LangevinAdam(net.parameters(), **HOT) for net in nets]
    for i in range(3):
        step(optimizers[0], i)
    optimizers[0].freeze_preconditioner()
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(nets[0], optimizers[0], options=options))
    nets[1].load_state_dict(nets[0].state_dict())
    dcp.set_optimizer_state_dict(nets[1], optimizers[1], saved, options=options)
    for optimizer in optimizers:
        assert optimizer.param_groups[0]["frozen"] is True
        step(optimizer, 3)
    assert same(*optimizers)


def test_adams_checkpoint_is_not_frozen(place):
    theirs = parameters(place)
    adam = torch.optim.Adam(theirs, lr=0.1)
    step(adam, 0)
    optimizer = stepped(place, temperature=0.0)
    optimizer.freeze_preconditioner()
    optimizer.load_state_dict(through_a_file(adam.state_dict()))
    assert optimizer.param_groups[0]["frozen"] is False
    held = Frozen(moments(optimizer))
    step(optimizer, 1)
    assert not held.unchanged()


def test_an_optimizer_of_an_earlier_release_unpickles(place):
    optimizer = stepped(place)
    state = optimizer.__getstate__()
    for values in (state["defaults"], *state["param_groups"]):
        del values["frozen"]
    old = fe.LangevinAdam.__new__(fe.LangevinAdam)
    old.__setstate__(state)
    step(old, 3)
    old.freeze_preconditioner()
    held = Frozen(moments(old))
    step(old, 4)
    assert held.unchanged()
