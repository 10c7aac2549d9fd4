"""Checkpoints exchanged with torch.optim.Adam and AdamW: what each lacks, and that the other goes on from them."""

import math

import pytest
import torch

import fekernels as fe
from tests.optimizers.test_checkpoints import parameters, through_a_file
from tests.support.parameters import step
from tests.support.tensors import Frozen, bits_equal


def ulps(got, want, floor):
    got, want = got.detach().cpu(), want.detach().cpu()
    magnitude = torch.maximum(want.abs(), torch.tensor(floor))
    unit = torch.nextafter(magnitude, torch.tensor(math.inf)) - magnitude
    return ((got.double() - want.double()).abs() / unit.double()).amax().item() if got.numel() else 0.0


LR = 2e-2


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("peer", [torch.optim.Adam, torch.optim.AdamW], ids=lambda peer: peer.__name__)
def test_adams_checkpoint_goes_on_as_adam(peer, amsgrad, place):
    theirs = parameters()
    adam = peer(theirs, lr=LR, betas=(0.8, 0.99), weight_decay=0.05, amsgrad=amsgrad, fused=True)
    for i in range(5):
        step(adam, i)
    ours = [p.detach().clone().to(place.device).requires_grad_() for p in theirs]
    optimizer = fe.LangevinAdam(
        ours, decoupled_weight_decay=peer is torch.optim.AdamW, seed=5, temperature=0.0, noise="isotropic",
        backend=place.backend,
    )  # fmt: skip
    optimizer.load_state_dict(through_a_file(adam.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (LR, (0.8, 0.99), 0.05)
    assert group["amsgrad"] is amsgrad and group["noise"] == "isotropic" and group["seed"] == 5
    for i in range(5, 10):
        step(adam, i)
        step(optimizer, i)
        for p, q in zip(theirs, ours, strict=True):
            assert ulps(q, p, LR) <= 4
            with torch.no_grad():  # each step on its own
                q.copy_(p)
    optimizer.param_groups[0]["temperature"] = 1e-3
    frozen = Frozen(ours)
    with pytest.warns(UserWarning, match="eps = 1e-08"):
        step(optimizer, 10)
    assert not frozen.unchanged()


def test_what_a_checkpoint_lacks_stays_as_constructed(place):
    theirs = parameters()
    adam = torch.optim.Adam(theirs)
    step(adam, 0)
    saved = adam.state_dict()
    for key in (
        "decoupled_weight_decay",
        "differentiable",
        "fused",
        "capturable",
    ):  # as an older torch wrote it
        saved["param_groups"][0].pop(key, None)
    keywords = dict(
        temperature=0.25, noise="preconditioned", seed=9, prior_precision=0.5, anchor="init", eps=0.1
    )
    ours = [p.detach().to(place.device).requires_grad_() for p in parameters()]
    optimizer = fe.LangevinAdam(ours, **keywords, decoupled_weight_decay=True, backend=place.backend)
    anchors = [p.detach().clone() for p in ours]
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in ("temperature", "noise", "seed", "prior_precision", "anchor")} == {
        key: keywords[key] for key in ("temperature", "noise", "seed", "prior_precision", "anchor")
    }
    assert group["decoupled_weight_decay"] is True and group["streams"] == [0, 1, 2]
    assert group["eps"] == 1e-8  # this it has
    # Adam's momentum holds no noise to rescale.
    assert all("noise_unit" not in optimizer.state[p] for p in ours)
    step(optimizer, 1)  # prior_precision keeps it from warning
    assert all(bits_equal(optimizer.state[p]["anchor"], a) for p, a in zip(ours, anchors, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adams_low_precision_checkpoint(dtype, place):
    theirs = parameters(dtype)
    adam = torch.optim.Adam(theirs, lr=LR, fused=True)
    for i in range(3):
        step(adam, i)
    ours = [p.detach().clone().to(place.device).requires_grad_() for p in theirs]
    optimizer = fe.LangevinAdam(ours, state_dtype=torch.float32, backend=place.backend)
    optimizer.load_state_dict(adam.state_dict())
    for p, q in zip(theirs, ours, strict=True):
        assert optimizer.state[q]["exp_avg"].dtype == torch.float32
        assert torch.equal(optimizer.state[q]["exp_avg_sq"].cpu(), adam.state[p]["exp_avg_sq"].float())
        assert optimizer.state[q]["step"].item() == 3 and optimizer.state[q]["step"].dtype == torch.float32


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("peer", [torch.optim.Adam, torch.optim.AdamW], ids=lambda peer: peer.__name__)
def test_adam_goes_on_from_our_checkpoint(peer, amsgrad, place):
    ours = parameters(place=place)
    decoupled = peer is torch.optim.AdamW
    optimizer = fe.LangevinAdam(
        ours, LR, weight_decay=0.05, amsgrad=amsgrad, decoupled_weight_decay=decoupled, backend=place.backend
    )
    for i in range(5):
        step(optimizer, i)
    theirs = [p.detach().cpu().clone().requires_grad_() for p in ours]
    adam = peer(theirs, fused=True)
    adam.load_state_dict(through_a_file(optimizer.state_dict()))
    assert adam.param_groups[0]["lr"] == LR
    for i in range(5, 8):
        step(adam, i)
        step(optimizer, i)
        for p, q in zip(theirs, ours, strict=True):
            assert ulps(q, p, LR) <= 4
            with torch.no_grad():
                q.copy_(p)


def test_amsgrad_may_be_switched_on_after_a_load(place):
    ours = parameters(place=place)
    optimizer = fe.LangevinAdam(ours, LR, backend=place.backend)
    step(optimizer, 0)
    optimizer.param_groups[0]["amsgrad"] = True
    step(optimizer, 1)
    state = optimizer.state[ours[0]]
    assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()
