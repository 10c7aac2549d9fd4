"""Mistakes with fe.VariationalAdam: the error by name, and every parameter as before."""

import math

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from fekernels._runtime import extension
from fekernels.ops.optimizers import variational_draw
from tests.optimizers.test_variational_adam import all_of, make, parameters, train
from tests.support.tensors import Frozen, freed, survives


def test_contexts_and_steps_in_each_other_are_refused():
    optimizer = make()
    frozen = Frozen(all_of(optimizer))
    with optimizer.sampled_params():
        drawn = Frozen(all_of(optimizer))
        with pytest.raises(RuntimeError, match="must not be entered inside another"):
            with optimizer.sampled_params(train=True):
                pass
        with pytest.raises(RuntimeError, match="step must be called outside of sampled_params"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="load_state_dict must be called outside of sampled_params"):
            optimizer.load_state_dict(optimizer.state_dict())
        assert drawn.unchanged()
    assert frozen.unchanged()
    with pytest.raises(RuntimeError, match="got none since the last step"):
        optimizer.step()
    with pytest.raises(TypeError, match="train must be a bool; got int"), optimizer.sampled_params(train=1):
        pass
    assert frozen.unchanged()


REFUSED = {
    "ess": (dict(ess=0.0), ValueError, "ess must be finite and > 0; got 0.0"),
    "ess_type": (dict(ess="40"), TypeError, "ess must be a number; got str"),
    "hess_init": (dict(hess_init=-1.0), ValueError, "hess_init must be finite and > 0; got -1.0"),
    "weight_decay": (dict(weight_decay=-0.1), ValueError, "weight_decay must be finite and >= 0; got -0.1"),
    "temperature": (dict(temperature=-1.0), ValueError, "temperature must be finite and >= 0; got -1.0"),
    "lr": (dict(lr=math.nan), ValueError, "lr must be finite and >= 0; got nan"),
    "betas": (dict(betas=0.9), TypeError, "betas must be a pair of numbers; got 0.9"),
    "beta": (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in \[0, 1\); got 1.0"),
    "clip_radius": (dict(clip_radius=0.0), ValueError, "clip_radius must be > 0; got 0.0"),
    "mc_samples": (dict(mc_samples=0), ValueError, "mc_samples must be .*; got 0"),
    "estimator": (
        dict(estimator="vogn"),
        ValueError,
        "estimator must be one of natural, reparam; got 'vogn'",
    ),
    "scale": (dict(scale="exp"), ValueError, "scale must be one of softplus, log; got 'exp'"),
    "sync": (dict(sync=2), TypeError, "sync must be a bool; got int"),
    "rescale_lr": (dict(rescale_lr="yes"), TypeError, "rescale_lr must be a bool; got str"),
    "backend": (dict(backend="opencl"), ValueError, "backend must be one of auto, .*; got 'opencl'"),
    "seed": (dict(seed=1.5), TypeError, "seed must be"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_hyperparameters(change, error, message):
    params = parameters()
    frozen = Frozen(params)
    with pytest.raises(error, match=f"VariationalAdam: {message}"):
        make(params, **change)
    optimizer = make()
    train(optimizer, 1)
    if {"mc_samples", "sync", "seed", "estimator", "scale"}.isdisjoint(change):
        before = Frozen(all_of(optimizer))
        optimizer.param_groups[0].update(change)
        with pytest.raises(error, match=f"VariationalAdam: {message}"), optimizer.sampled_params(train=True):
            pass
        assert before.unchanged()
    assert frozen.unchanged()


def test_groups_must_agree_on_the_estimator():
    optimizer = make()
    for key, value, must in (
        ("estimator", "reparam", "be the same in every group"),
        ("scale", "log", "be the same in every group"),
        ("sync", True, "be given to the optimizer"),
        ("mc_samples", 2, "be given to the optimizer"),
    ):
        with pytest.raises(ValueError, match=f"VariationalAdam: {key} must {must}"):
            optimizer.add_param_group({"params": parameters(), key: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("samples", [1, 2])
def test_sparse_gradients_are_refused_and_change_nothing(samples):
    table = torch.nn.Embedding(7, 3, sparse=True)
    optimizer = make(table.parameters(), mc_samples=samples)
    frozen = Frozen([table.weight])
    with pytest.raises(ValueError, match="must be dense"):
        with optimizer.sampled_params(train=True):
            table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert frozen.unchanged()


@pytest.mark.parametrize("training", [True, False])
def test_a_draw_too_many_is_named_and_none_is_made(backend, training):
    """Of groups before the one that refuses too: what they had drawn would have become the mean."""
    if backend.device != "cpu":
        pytest.skip("on a GPU the host counts steps, and no draws: reading them would wait for it")
    params = parameters()
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}])
    with optimizer.sampled_params(train=training):
        pass
    counter = 0 if training else 1
    optimizer.state[params[2]]["draws"][counter] = 2.0**32 - 1
    frozen = Frozen([*params, *(optimizer.state[param]["draws"] for param in params)])
    message = rf"VariationalAdam: draws\[{counter}\] of params\[1\] must be below 2\^32"
    with pytest.raises(RuntimeError, match=message), optimizer.sampled_params(train=training):
        pass
    assert frozen.unchanged()
    with optimizer.sampled_params(train=not training):
        assert not frozen.unchanged()


def test_a_draw_that_ends_half_way_leaves_the_means(monkeypatch):
    if extension.unavailable_reason():
        pytest.skip(extension.unavailable_reason())
    params = parameters()
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}])
    step_tables, calls = variational_draw.OPERATION.step_tables, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        step_tables(*args)

    monkeypatch.setattr(variational_draw.OPERATION, "step_tables", interrupted)
    frozen = Frozen(params)
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params():
        pass
    assert frozen.unchanged() and len(calls) == 2


def test_one_that_cannot_become_its_mean_again_keeps_no_other_from_it():
    """What had stayed a draw would have been the mean of the next."""
    params = parameters()
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}])
    frozen = Frozen(params[1:])
    with pytest.raises(RuntimeError, match="size of tensor"), optimizer.sampled_params():
        params[0].data = torch.ones(8)
    assert frozen.unchanged()
    params[0].data = torch.ones(7)
    with optimizer.sampled_params():
        assert not frozen.unchanged()
    assert frozen.unchanged() and torch.equal(params[0], torch.ones(7))
    assert all(torch.equal(optimizer.state[param]["mean"], param) for param in params)


@pytest.mark.parametrize("ahead", [0, 4000])
@pytest.mark.parametrize("when", ["inside", "before", "mean"])
def test_weights_in_freed_storage_are_refused(when, ahead):
    """Freed inside of a context, or before it."""
    params = [torch.nn.Parameter(torch.zeros(4000)) for _ in range(2)]
    optimizer = make(params)
    train(optimizer, 1)
    frozen = Frozen(params[1:])

    def refused():
        if when == "before":
            params[0].data = freed(params[0], ahead)
        elif when == "mean":
            optimizer.state[params[0]]["mean"] = freed(params[0], ahead)
        with pytest.raises(ValueError, match="must hold values; its storage has 0 of the"):
            with optimizer.sampled_params():
                params[0].data = freed(params[0], ahead)
        assert frozen.unchanged()

    assert survives(refused)


UNUSUAL = {
    "wrapper": lambda: TwoTensor(torch.ones(6), torch.ones(6)),
    "lazily negated": lambda: torch._neg_view(-torch.ones(6)),
    "the imaginary part of a conjugate": lambda: torch.full((6,), 1 - 1j, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("make_one", UNUSUAL.values(), ids=UNUSUAL)
def test_weights_that_have_no_plain_memory_are_drawn_and_restored(make_one):
    params = [*parameters(), torch.nn.Parameter(make_one())]
    optimizer = make(params)
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        for training in (True, False):
            with optimizer.sampled_params(training):
                assert not any(map(torch.equal, params, before))
            assert all(map(torch.equal, params, before))
    train(optimizer, 1)
    assert not any(map(torch.equal, params, before))
