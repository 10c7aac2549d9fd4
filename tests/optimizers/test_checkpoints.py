"""Checkpoints of fe.LangevinAdam: resumed with the identical noise, copied, pickled, under other names."""

import copy
import io
import pickle

import pytest
import torch

import fekernels as fe
from tests.support.implementations import at_places
from tests.support.optimizers import NOISES, noise_unit
from tests.support.parameters import HOT, step
from tests.support.tensors import DTYPES, Frozen, bits_equal

SHAPES = ((33, 7), (130,), (0,))


def parameters(dtype=torch.float32, place=None):
    torch.manual_seed(1)
    values = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [v.to(place.device if place else "cpu").requires_grad_() for v in values]


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(optimizer, other):
    """Parameters, states and group values, bit for bit."""
    for a, b in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"params"}:
            assert bits_equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key], key
        for p, q in zip(a["params"], b["params"], strict=True):
            assert bits_equal(p, q)
            assert optimizer.state[p].keys() == other.state[q].keys()
            assert all(bits_equal(optimizer.state[p][key], other.state[q][key]) for key in optimizer.state[p])
    return True


def cyclical(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4, eta_min=1e-4)


VARIANTS = {
    **{noise: dict(noise=noise) for noise in NOISES},
    "cold": dict(temperature=0.0),
    "amsgrad": dict(amsgrad=True),
    "anchored": dict(prior_precision=0.3, anchor="init"),
    "float32_states": dict(state_dtype=torch.float32),
    "bfloat16_states": dict(state_dtype=torch.bfloat16, stochastic_rounding=True),
    "tensor_lr": dict(lr=torch.tensor(0.1), temperature=torch.tensor([0.5])),
}


@pytest.mark.parametrize(
    **at_places(variant=list(VARIANTS), dtype=[torch.float32, torch.float64, torch.bfloat16])
)
def test_a_resumed_run_is_the_uninterrupted_run(dtype, variant, place):
    keywords = {**HOT, **VARIANTS[variant], "backend": place.backend}
    params = parameters(dtype, place)
    uninterrupted = fe.LangevinAdam(params, **copy.deepcopy(keywords))
    schedule = cyclical(uninterrupted)
    saved = None
    for i in range(13):
        if i == 6:  # in the middle of a cycle
            weights = [p.detach().clone() for p in params]
            saved = through_a_file([uninterrupted.state_dict(), schedule.state_dict()])
        step(uninterrupted, i)
        schedule.step()

    # Constructed as a restarted script would, but for what the checkpoint holds.
    resumed = fe.LangevinAdam(
        [w.requires_grad_() for w in weights], **{**copy.deepcopy(keywords), "seed": None}
    )
    schedule = cyclical(resumed)
    resumed.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    for i in range(6, 13):
        step(resumed, i)
        schedule.step()
    assert same(uninterrupted, resumed)


def test_rescaling_of_the_momentum_survives_a_restart(place):
    results, unit = {}, noise_unit(0.1, 0.9)
    for how in ("uninterrupted", "restarted", "forgetful"):
        params = parameters(place=place)
        optimizer = fe.LangevinAdam(params, **HOT, backend=place.backend)
        step(optimizer, 0)
        if how != "uninterrupted":
            saved = through_a_file(optimizer.state_dict())
            assert [state["noise_unit"].item() for state in saved["state"].values()] == [unit] * len(params)
            optimizer = fe.LangevinAdam(params, **HOT, backend=place.backend)
            optimizer.load_state_dict(saved)
        if how == "forgetful":
            optimizer.state[params[0]]["noise_unit"].zero_()
        optimizer.param_groups[0]["lr"] = 1e-4
        step(optimizer, 1)
        results[how] = optimizer.state[params[0]]["exp_avg"].clone()
    assert bits_equal(results["restarted"], results["uninterrupted"])
    assert not torch.allclose(results["forgetful"], results["uninterrupted"])


@pytest.mark.parametrize(
    **at_places(variant=list(VARIANTS), how=[copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
)
def test_copies_go_on_alike(how, variant, place):
    optimizer = fe.LangevinAdam(
        parameters(place=place), **{**HOT, **VARIANTS[variant]}, backend=place.backend
    )
    for i in range(3):
        step(optimizer, i)
    other = how(optimizer)
    assert other.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    frozen = Frozen(optimizer.param_groups[0]["params"])
    for i in range(3, 6):
        step(other, i)
    assert frozen.unchanged()
    for i in range(3, 6):
        step(optimizer, i)
    assert same(optimizer, other)


def test_a_model_and_its_optimizer_copied_together_stay_together(place):
    net = torch.nn.Linear(3, 2).to(place.device)
    optimizer = fe.LangevinAdam(net.parameters(), **HOT, backend=place.backend)
    step(optimizer, 0)
    net_copy, optimizer_copy = copy.deepcopy((net, optimizer))
    step(optimizer, 1)
    step(optimizer_copy, 1)
    assert optimizer_copy.param_groups[0]["params"][0] is net_copy.weight
    assert bits_equal(net.weight, net_copy.weight)


def test_state_dict_is_plain():
    optimizer = fe.LangevinAdam(parameters(), **HOT, amsgrad=True, anchor="init", prior_precision=1.0)
    step(optimizer, 0)
    saved = optimizer.state_dict()
    states = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "noise_unit", "anchor"}
    assert set(saved["state"][0]) == states
    group = saved["param_groups"][0]
    assert group["seed"] == 77 and group["noise"] == "momentum" and group["temperature"] == 0.5
    allowed = (int, float, str, bool, list, tuple, type(None), torch.Tensor, torch.dtype)
    assert all(isinstance(value, allowed) for value in group.values())
    through_a_file(saved)


# Loading into a run that is under way.


def test_a_load_in_mid_run_is_heeded_at_the_next_step(place):
    params = parameters(place=place)
    optimizer = fe.LangevinAdam(params, **HOT, backend=place.backend)
    step(optimizer, 0)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    ends = []
    for _ in range(2):
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for p, w in zip(params, weights, strict=True):
                p.copy_(w)
        for i in range(1, 4):
            step(optimizer, i)
        ends.append([p.detach().clone() for p in params])
    assert all(bits_equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_load_does_not_share_memory_with_the_checkpoint(place):
    optimizer = fe.LangevinAdam(parameters(place=place), **HOT, backend=place.backend)
    step(optimizer, 0)
    saved = optimizer.state_dict()
    tensors = [t for state in saved["state"].values() for t in state.values()]
    other = fe.LangevinAdam(parameters(place=place), **HOT, backend=place.backend)
    other.load_state_dict(saved)
    frozen = Frozen(tensors)
    other.param_groups[0]["lr"] = 0.05
    step(other, 1)
    assert frozen.unchanged()


def test_a_bad_checkpoint_raises_and_changes_nothing():
    params = parameters()
    optimizer = fe.LangevinAdam(params, **HOT)
    step(optimizer, 0)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = [0, 1]
    frozen = Frozen([t for p in params for t in (p, *optimizer.state[p].values())])
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(saved)
    assert frozen.unchanged()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distributed_checkpoint_state_dicts(dtype, place):
    # torch.distributed.checkpoint names states after parameters, and takes a step at lr = 0 to make them.
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    nets, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(torch.nn.Linear(5, 3).to(place.device, dtype))
        optimizers.append(fe.LangevinAdam(nets[-1].parameters(), **HOT, backend=place.backend))
    for i in range(3):
        step(optimizers[0], i)
    saved = get_optimizer_state_dict(nets[0], optimizers[0])
    nets[1].load_state_dict(nets[0].state_dict())
    frozen = Frozen(list(nets[1].parameters()))
    set_optimizer_state_dict(nets[1], optimizers[1], saved)
    assert frozen.unchanged()
    for optimizer in optimizers:
        step(optimizer, 3)
    assert same(*optimizers)


class Two(torch.nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, torch.nn.Linear(4, 4))


@pytest.mark.parametrize("flat", [False, True])
def test_named_parameters_keep_their_noise_in_a_model_of_another_order(flat):
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    nets = [Two("ab"), Two("ba")]
    optimizers = [fe.LangevinAdam(net.named_parameters(), **HOT) for net in nets]

    def go(*which):
        for net, optimizer in which:
            for name, p in net.named_parameters():
                p.grad = torch.full_like(p, sum(map(ord, name)) / 500)
            optimizer.step()

    go((nets[0], optimizers[0]))
    saved = copy.deepcopy(dcp.get_state_dict(nets[0], optimizers[0], options=options))
    dcp.set_state_dict(
        nets[1], optimizers[1], model_state_dict=saved[0], optim_state_dict=saved[1], options=options
    )
    names = [name for name, _ in nets[1].named_parameters()]
    assert optimizers[1].param_groups[0]["param_names"] == names
    go(*zip(nets, optimizers, strict=True))
    others = dict(nets[1].named_parameters())
    for name, p in nets[0].named_parameters():
        assert bits_equal(p, others[name]), name


def test_renamed_parameters_go_on_with_the_noise_they_had():
    """Names that are none of the checkpoint's are a rename: positions tell whose noise it was."""
    nets = [Two("ab"), Two("xy")]
    optimizers = [fe.LangevinAdam(net.named_parameters(), **HOT) for net in nets]
    step(optimizers[0], 0)
    optimizers[1].load_state_dict(through_a_file(optimizers[0].state_dict()))
    assert optimizers[1].param_groups[0]["streams"] == optimizers[0].param_groups[0]["streams"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_copies_a_checkpoint_but_not_the_optimizers_own_states(dtype):
    """torch.distributed.checkpoint reads into the states and hands them back: a copy would hold all of them twice."""
    params = parameters(dtype)
    optimizer = fe.LangevinAdam(params, state_dtype=torch.float32, **HOT)
    step(optimizer, 1)
    moments = ("exp_avg", "exp_avg_sq")

    def places():
        return [optimizer.state[p][key].data_ptr() for p in params[:2] for key in moments]

    before, saved = places(), optimizer.state_dict()
    for state in saved["state"].values():
        state["exp_avg"].mul_(2)
    optimizer.load_state_dict(saved)
    assert places() == before
    other = through_a_file(saved)
    optimizer.load_state_dict(other)
    loaded = places()
    assert not set(loaded) & {other["state"][i][key].data_ptr() for i in range(2) for key in moments}
    assert not set(loaded) & set(before)
    assert all(
        bits_equal(other["state"][i][key], optimizer.state[params[i]][key])
        for i in range(3)
        for key in moments
    )
