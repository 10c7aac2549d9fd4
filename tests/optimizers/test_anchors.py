"""The prior's mean outlives whatever users and frameworks do to ``optimizer.state``."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch

import fekernels as fe
from fekernels.optim import _anchors
from fekernels.optim._anchors import Anchors
from tests.support.tensors import Frozen, bits_equal

MAKERS = {
    "LangevinAdam": lambda p, **kw: fe.LangevinAdam(p, lr=0.1, prior_precision=1.0, seed=5, **kw),
    "SGLD": lambda p, **kw: fe.SGLD(p, lr=0.1, temperature=0.0, prior_precision=1.0, seed=5, **kw),
}


def five(place, n=4):
    return torch.full((n,), 5.0, device=place.device).requires_grad_()


def at_rest(optimizer, steps=3):
    """With gradients of 0 and the prior's mean at 5, a parameter at 5 stays there to the bit."""
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
    return all((p == 5).all() for group in optimizer.param_groups for p in group["params"])


@pytest.fixture(params=MAKERS)
def make(request, place):
    return lambda params, **kw: MAKERS[request.param](params, backend=place.backend, **kw)


@pytest.mark.parametrize("given", ["init", "list"])
@pytest.mark.parametrize("reset", ["clear", "replace", "one", "key", "before the first step"])
def test_a_reset_state_gets_its_anchor_back(reset, given, make, place):
    params = [five(place), five(place, 3)]
    anchor = "init" if given == "init" else [torch.full_like(p, 5.0) for p in params]
    optimizer = make(params, anchor=anchor)
    if reset != "before the first step":
        assert at_rest(optimizer)
    with torch.no_grad():  # that what is put back is what was given, and not what is there now
        params[0].fill_(6.0)
    if reset == "replace":
        optimizer.state = defaultdict(dict)
    elif reset == "key":
        del optimizer.state[params[0]]["anchor"]
    elif reset == "one":
        del optimizer.state[params[0]]
    else:
        optimizer.state.clear()
    at_rest(optimizer)
    assert (params[0] < 6).all() and (params[1] == 5).all()
    assert all((optimizer.state[p]["anchor"] == 5).all() for p in params)


def test_without_ranks_the_anchor_is_that_of_construction(make, place):
    """Whatever is loaded before the first step; with ranks: ``distributed/test_optimizers.py``."""
    p = five(place)
    optimizer = make([p], anchor="init")
    with torch.no_grad():
        p.fill_(6.0)
    at_rest(optimizer)
    assert (optimizer.state[p]["anchor"] == 5).all()


def test_anchors_of_an_earlier_release_unpickle(make, place):
    optimizer = make([five(place)], anchor="init")
    del optimizer._anchors.__dict__["_starts"]
    assert at_rest(pickle.loads(pickle.dumps(optimizer)))


def test_a_parameter_in_anothers_place_has_none_and_says_so(make, place):
    kept, old = five(place), five(place)
    optimizer = make([kept, old], anchor="init")
    at_rest(optimizer)
    new = five(place, 6)
    optimizer.state.pop(old)
    optimizer.param_groups[0]["params"][1] = new
    frozen = Frozen([kept, new])
    with pytest.raises(
        ValueError, match=r"params\[1\] must have an anchor like the others of its group; got none"
    ):
        at_rest(optimizer)
    assert frozen.unchanged()
    optimizer.state[new]["anchor"] = torch.full_like(new, 5.0)
    assert at_rest(optimizer)
    optimizer.state.clear()
    assert at_rest(optimizer)
    assert list(optimizer._anchors._kept) == [kept, new]  # the one that left is not held on to


def test_with_ranks_a_parameter_in_anothers_place_before_its_first_step_is_its_own_anchor(
    make, place, monkeypatch
):
    """As when a trainer shards the model after the optimizer was made."""
    monkeypatch.setattr(_anchors, "has_ranks", lambda: True)
    old, new = five(place), five(place)
    with torch.no_grad():
        new.fill_(6.0)
    optimizer = make([old], anchor="init")
    optimizer.param_groups[0]["params"][0] = new
    assert (optimizer.state_dict()["state"][0]["anchor"] == 6).all()
    with torch.no_grad():
        new.fill_(5.0)  # rank 0's
    assert at_rest(optimizer)
    assert (optimizer.state[new]["anchor"] == 5).all()
    listed = make([old], anchor=[torch.full_like(old, 5.0)])
    listed.param_groups[0]["params"][0] = new
    with pytest.raises(ValueError, match="as sharding a model does, make the optimizer after that"):
        at_rest(listed)


def test_an_anchor_set_by_hand_is_the_anchor(make, place):
    p = five(place)
    optimizer = make([p], anchor="init")
    at_rest(optimizer)
    optimizer.state[p]["anchor"] = torch.full_like(p, 4.0)
    at_rest(optimizer, 1)
    optimizer.state.clear()
    at_rest(optimizer, 1)
    assert (optimizer.state[p]["anchor"] == 4).all()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle"])
def test_it_is_saved_and_copied_before_and_after_the_first_step(how, steps, make, place):
    p = five(place)
    optimizer = make([p], anchor="init")
    at_rest(optimizer, steps)
    if how in ("deepcopy", "pickle"):
        other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        q = other.param_groups[0]["params"][0]
        with torch.no_grad():
            q.fill_(6.0)
    else:
        saved = optimizer.state_dict()
        assert (saved["state"][0]["anchor"] == 5).all()
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        q = torch.full_like(p, 6.0).requires_grad_()
        other = make([q], anchor="init")
        other.load_state_dict(saved)
        other.state_dict()["state"][0]["anchor"].sub_(0)  # the checkpoint's own memory is not shared
        assert bool(other.state) == bool(steps)
    at_rest(other, 2)
    assert (other.state[q]["anchor"] == 5).all() and (q < 6).all()


def test_a_checkpoint_keeps_the_dtype_of_its_anchor(make, place):
    p = torch.full((4,), 5.0, device=place.device, dtype=torch.bfloat16).requires_grad_()
    fine = torch.full((4,), 5.001, device=place.device)
    optimizer = make([p], anchor=[fine])
    for steps in (0, 1):
        at_rest(optimizer, steps)
        q = torch.ones_like(p).requires_grad_()
        other = make([q], anchor="init")
        other.load_state_dict(optimizer.state_dict())
        at_rest(other, 1)
        assert bits_equal(other.state[q]["anchor"], fine)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_distributed_checkpoints_resume(name, flatten):
    # torch's distributed state dicts take an optimizer with any state for one with all of it.
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 2, generator=generator)

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()

    torch.manual_seed(1)
    net = torch.nn.Linear(6, 2)
    optimizer = MAKERS[name](net.parameters(), anchor="init")
    start = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    twin = copy.deepcopy(net)
    resumed = MAKERS[name](twin.parameters(), anchor="init")
    set_optimizer_state_dict(twin, resumed, saved, options=options)
    for p, q, first in zip(net.parameters(), twin.parameters(), start, strict=True):
        assert resumed.state[q].keys() == optimizer.state[p].keys() and resumed.state[q]["step"] == 3
        assert bits_equal(resumed.state[q]["anchor"], first)
    train(net, optimizer, 3)
    train(twin, resumed, 3)
    assert all(bits_equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("anchor", "error", "message"),
    [
        (torch.nested.nested_tensor([torch.ones(3)]), TypeError, "dense; got nested"),
        (torch.ones(3).to_sparse(), TypeError, "dense; got layout sparse_coo"),
        (torch.ones(3).to_mkldnn(), TypeError, "dense; got layout _mkldnn"),
        (torch.ones(3, device="meta"), ValueError, "hold values; got a tensor on the meta device"),
    ],
    ids=["nested", "sparse", "mkldnn", "meta"],
)
def test_an_anchor_that_holds_no_plain_values(anchor, error, message):
    first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    with pytest.raises(
        error, match=rf"LangevinAdam: anchor\[0\] must {'be' if error is TypeError else ''} *{message}"
    ):
        fe.LangevinAdam([first], anchor=[anchor])
    optimizer = fe.LangevinAdam([first], anchor="init")
    with pytest.raises(error, match=r"LangevinAdam: anchor\[0\] must"):
        optimizer.add_param_group({"params": [second], "anchor": [anchor]})
    assert len(optimizer.param_groups) == 1


def test_the_anchor_follows_a_model_that_moves_before_its_first_step():
    """As a Trainer moves it to its device: ``Module.to`` writes into the parameter that the optimizer has."""
    kept = Anchors()
    here, there = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
    kept.keep(here, here)
    kept._kept[there] = kept._kept.pop(here)
    state: dict = {}
    assert kept.of("LangevinAdam", "params[0]", "init", there, state).device.type == "meta"
    assert state["anchor"] is kept._kept[there]
