"""A checkpoint may come from anywhere: what no step could use is refused at the load, and nothing has changed."""

import copy

import numpy as np
import pytest
import torch

import fekernels as fe
from tests.support.parameters import parameters, set_gradients, step
from tests.support.tensors import Frozen, bits_equal

NAN, INF = float("nan"), float("inf")


def trained(place, kind=fe.LangevinAdam, **changes):
    keywords = dict(lr=0.1, temperature=0.5, seed=7) | (dict(eps=0.1) if kind is fe.LangevinAdam else {})
    optimizer = kind(parameters(place), **{**keywords, **changes}, backend=place.backend)
    step(optimizer, 0)
    return optimizer


def state(**changes):
    return lambda saved: saved["state"][1].update(changes)


def group(**changes):
    return lambda saved: saved["param_groups"][0].update(changes)


def without(*keys):
    return lambda saved: [saved["state"][1].pop(key) for key in keys]


def replaced(value):
    return lambda saved: saved["state"].update({1: value})


BAD = {
    "step of none": (state(step=None), TypeError, "step of parameter 1 must be a number; got NoneType"),
    "step of text": (state(step="3"), TypeError, "step of parameter 1 must be a number; got str"),
    "step of a bool": (state(step=True), TypeError, "step of parameter 1 must be a number; got bool"),
    "step of nan": (state(step=torch.tensor(NAN)), ValueError, "step of parameter 1 must be .*; got nan"),
    "step of inf": (state(step=torch.tensor(INF)), ValueError, "step of parameter 1 must be a whole number .* inf"),
    "negative step": (state(step=-1), ValueError, "step of parameter 1 must be .*>= 0.*; got -1"),
    "half a step": (state(step=torch.tensor(1.5)), ValueError, "must be a whole number in .*16777216.*; got 1.5"),
    "late step": (state(step=2**24 + 1), ValueError, "must be a whole number in .*16777216.*; got 16777217"),
    "late float64 step": (state(step=torch.tensor(2.0**33).double()), ValueError, "in .0, 4294967295.; got 8589934592"),
    "two steps": (state(step=torch.zeros(2)), ValueError, r"step of parameter 1 must be one number; got .* \(2,\)"),
    "no step in it": (state(step=torch.zeros(0)), ValueError, r"step of parameter 1 must be one number; got .* \(0,\)"),
    "meta step": (state(step=torch.zeros((), device="meta")), ValueError, "must be one number; got .* on meta"),
    "unit of none": (state(noise_unit=None), TypeError, "noise_unit of parameter 1 must be a number"),
    "negative unit": (state(noise_unit=torch.tensor(-1.0)), ValueError, "noise_unit of parameter 1 must be"),
    "two units": (state(noise_unit=torch.zeros(2)), ValueError, "noise_unit of parameter 1 must be one number"),
    "no tensor": (state(exp_avg=None), TypeError, "exp_avg of parameter 1 must be a tensor; got NoneType"),
    "number": (state(exp_avg_sq=1.0), TypeError, "exp_avg_sq of parameter 1 must be a tensor; got float"),
    "shape": (state(exp_avg=torch.zeros(1)), ValueError, r"exp_avg of parameter 1 must have shape \(130,\).*\(1,\)"),
    "integers": (state(exp_avg=torch.zeros(130).int()), TypeError, "exp_avg of parameter 1 must be one of float32"),
    "sparse": (state(exp_avg=torch.zeros(130).to_sparse()), ValueError, "exp_avg of parameter 1 must be dense"),
    "meta": (state(exp_avg=torch.zeros(130, device="meta")), ValueError, "exp_avg of parameter 1 must hold values"),
    "anchor": (state(anchor=torch.zeros(3)), ValueError, r"anchor of parameter 1 must have shape \(130,\)"),
    "maximum": (state(max_exp_avg_sq=torch.zeros(3)), ValueError, r"max_exp_avg_sq of parameter 1 must have shape"),
    "no step": (without("step"), ValueError, "parameter 1 must have step, exp_avg, exp_avg_sq; got exp_avg"),
    "no average": (without("exp_avg"), ValueError, "the state of parameter 1 must have step, exp_avg, exp_avg_sq; got"),
    "momentum of SGD": (replaced({"momentum_buffer": torch.zeros(130)}), ValueError, "got momentum_buffer"),
    "no dict": (replaced([1, 2]), TypeError, "the state of parameter 1 must be a dict; got list"),
    "lr": (group(lr=-1.0), ValueError, "lr must be"),
    "lr of text": (group(lr="0.1"), TypeError, "lr must be"),
    "betas": (group(betas=(0.9,)), (TypeError, ValueError), "betas"),
    "beta": (group(betas=(0.9, 1.5)), ValueError, "betas"),
    "noise": (group(noise="pink"), ValueError, "noise must be one of"),
    "temperature": (group(temperature=None), TypeError, "temperature must be"),
    "seed of text": (group(seed="7"), TypeError, "seed must be an int"),
    "large seed": (group(seed=1 << 70), ValueError, "seed must be"),
    "streams of none": (group(streams=None), TypeError, "streams must be a list of ints; got NoneType"),
    "few streams": (group(streams=[0, 1]), ValueError, "streams must have 3 entries like params; got 2"),
    "stream": (group(streams=[0, 1, -2]), ValueError, r"streams\[2\] must be"),
    "stream of text": (group(streams=[0, 1, "2"]), TypeError, r"streams\[2\] must be"),
    "one stream twice": (group(streams=[0, 1, 1]), ValueError, "streams must be different .*; got 1 twice"),
    "anchor kind": (group(anchor="elsewhere"), ValueError, "anchor must be one of"),
    "previous": (group(previous=torch.zeros(1)), ValueError, "previous must be two numbers, lr and temperature; got 1"),
    "no previous": (group(previous=torch.zeros(0)), ValueError, "previous must be two numbers.*; got 0"),
    "previous of none": (group(previous=None), TypeError, "previous must be two numbers; got NoneType"),
    "previous of text": (group(previous=["a", "b"]), TypeError, r"previous\[0\] must be a number"),
    "negative previous": (group(previous=[-1.0, 1.0]), ValueError, r"previous\[0\] must be"),
    "state dtype": (group(state_dtype=torch.int32), (TypeError, ValueError), "state_dtype must be"),
    "backend": (group(backend="fast"), ValueError, "backend must be one of"),
    "state list": (lambda saved: saved.update(state=[]), TypeError, "state must be a dict; got list"),
    "no groups": (lambda saved: saved.pop("param_groups"), ValueError, "must have 'param_groups'; got state"),
    "group": (lambda saved: saved.update(param_groups=[3]), TypeError, "every group must be a dict"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_no_step_could_use_is_refused(what):
    change, error, message = BAD[what]
    saved = copy.deepcopy(fe_trained().state_dict())
    optimizer = fe_trained(seed=9)
    change(saved)
    params = optimizer.param_groups[0]["params"]
    before = Frozen([t for p in params for t in (p, *optimizer.state[p].values())])
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert before.unchanged()
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    step(optimizer, 1)  # and it goes on
    assert not before.unchanged()


def fe_trained(**changes):
    from tests.support.implementations import CPU_PLACES

    return trained(CPU_PLACES[-1], **changes)


def test_what_is_no_state_dict_is_refused():
    for value in (None, 3, [1]):
        with pytest.raises(TypeError, match="LangevinAdam.load_state_dict: state_dict must be a dict"):
            fe_trained().load_state_dict(value)


def test_a_foreign_optimizers_checkpoint_is_refused():
    params = [torch.zeros(3, requires_grad=True)]
    for peer in (torch.optim.SGD(params, 0.1, momentum=0.9), torch.optim.RMSprop(params)):
        params[0].grad = torch.ones(3)
        peer.step()
        with pytest.raises((TypeError, ValueError), match="LangevinAdam"):
            fe.LangevinAdam(params).load_state_dict(peer.state_dict())


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "given",
    [1001, 70_000, 70_000.0, np.int64(70_000), torch.tensor(70_000), torch.tensor(70_000.0)],
    ids=repr,
)
def test_a_step_keeps_its_digits_under_any_default_dtype(default, given, place):
    optimizer = trained(place)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = given
    torch.set_default_dtype(default)
    try:
        optimizer.load_state_dict(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    got = optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
    assert got.item() == int(given) and got.dtype == torch.float32 and got.shape == ()


def test_a_wide_step_stays_wide(place):
    optimizer = trained(place)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor(2.0**30, dtype=torch.float64)
    optimizer.load_state_dict(saved)
    got = optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
    assert got.dtype == torch.float64 and got.item() == 2**30


def test_more_than_an_optimizer_needs_is_kept(place):
    """Of an optimizer that is none of ours."""
    saved = trained(place).state_dict()
    for key in ("streams", "noise"):
        del saved["param_groups"][0][key]
    sgld = trained(place, fe.SGLD, temperature=0.0)
    for key in ("betas", "eps", "amsgrad"):
        assert key in saved["param_groups"][0]
    sgld.load_state_dict(saved)
    before = Frozen(sgld.param_groups[0]["params"])
    step(sgld, 1)
    assert not before.unchanged()


KINDS = {
    "LangevinAdam": lambda params: fe.LangevinAdam(params, seed=1),
    "SGLD": lambda params: fe.SGLD(params, lr=0.1, seed=1),
    "VariationalAdam": lambda params: fe.VariationalAdam(params, lr=0.1, ess=10, seed=1),
}


@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_another_of_our_optimizers_is_named(kind, saved):
    """Also before the first step, whose states would not tell."""
    state = KINDS[saved]([torch.nn.Parameter(torch.ones(3))]).state_dict()
    optimizer = KINDS[kind]([torch.nn.Parameter(torch.ones(3))])
    if kind == saved:
        optimizer.load_state_dict(state)
        return
    before = copy.deepcopy(optimizer.param_groups[0])
    message = rf"{kind}.load_state_dict: param_groups must be {kind}'s; got {saved}'s"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert (
        optimizer.param_groups[0].keys() == before.keys() and optimizer.param_groups[0]["lr"] == before["lr"]
    )


def test_sgld_refuses_what_has_no_step(place):
    sgld = trained(place, fe.SGLD)
    saved = copy.deepcopy(sgld.state_dict())
    saved["state"][1] = {"momentum_buffer": torch.zeros(130)}
    with pytest.raises(
        ValueError, match="SGLD.load_state_dict: the state of parameter 1 must have step; got mom"
    ):
        sgld.load_state_dict(saved)


def test_a_hook_of_the_user_may_make_a_checkpoint_right(place):
    optimizer, other = trained(place), trained(place)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1] = {"wrapped": saved["state"][1]}

    def unwrap(_, loading):
        states = {key: value.get("wrapped", value) for key, value in loading["state"].items()}
        return {**loading, "state": states}

    with pytest.raises(ValueError, match="got wrapped"):
        other.load_state_dict(saved)
    other.register_load_state_dict_pre_hook(unwrap)
    other.load_state_dict(saved)
    for o in (optimizer, other):
        set_gradients(o, 1)
        o.step()
    for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, other)), strict=True):
        assert bits_equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
