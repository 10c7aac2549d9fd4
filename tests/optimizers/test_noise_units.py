"""Under "momentum" each parameter knows the unit of the noise in its exp_avg, so that lr and beta1 may change."""

import math

import pytest
import torch

import fekernels as fe
from tests.support.optimizers import noise_unit
from tests.support.parameters import HOT, parameters, same, step
from tests.support.tensors import bits_equal

COUNT = 20_000  # of independent weights: five standard errors of a variance of 1 are .05
ADAMS = {"step", "exp_avg", "exp_avg_sq"}


def weights(seed):
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def chain(place, *params):
    """U = theta^2 / 2 at T = 1, with the preconditioner frozen by a huge eps: x = lr / 1e4."""
    keywords = dict(lr=1e3, eps=1e4, temperature=1.0, bias_correction=False, seed=0)
    return fe.LangevinAdam(params, **keywords, backend=place.backend)


def walk(optimizer, steps, frozen=()):
    """The largest variance of each parameter on the way."""
    params = optimizer.param_groups[0]["params"]
    largest = [0.0] * len(params)
    for _ in range(steps):
        for i, p in enumerate(params):
            p.grad = None if i in frozen else p.detach().clone()
        optimizer.step()
        largest = [max(v, p.detach().double().var().item()) for v, p in zip(largest, params, strict=True)]
    return largest


# Simulated: at most 1.02 T for beta1; without the rescaling 6.1 and, over the cold restart of lr, 162.


def test_beta1_may_jump(place):
    p = weights(0).to(place.device).detach().requires_grad_()
    optimizer = chain(place, p)
    walk(optimizer, 60)
    optimizer.param_groups[0]["betas"] = (0.99, 0.999)
    (largest,) = walk(optimizer, 40)
    assert 0.9 < p.detach().var().item() and largest < 1.15


def test_lr_may_jump_while_a_parameter_has_no_gradient(place):
    params = [weights(i).to(place.device).detach().requires_grad_() for i in range(2)]
    optimizer = chain(place, *params)
    walk(optimizer, 30)
    optimizer.param_groups[0]["lr"] = 1.0
    walk(optimizer, 60)
    optimizer.param_groups[0]["lr"] = 1e3
    walk(optimizer, 2, frozen=(1,))
    assert max(walk(optimizer, 20)) < 1.15
    assert all(p.detach().var().item() > 0.9 for p in params)


def test_each_parameter_is_in_the_unit_of_its_own_last_step(place):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    params = optimizer.param_groups[0]["params"]
    step(optimizer, 0)
    optimizer.param_groups[0].update(lr=0.02, betas=(0.8, 0.999))
    params[1].grad = None
    optimizer.step()
    units = [optimizer.state[p]["noise_unit"].item() for p in params]
    assert units == [noise_unit(0.02, 0.8), noise_unit(0.1, 0.9), noise_unit(0.02, 0.8)]
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, 1)
    assert [optimizer.state[p]["noise_unit"].item() for p in params] == units
    optimizer.param_groups[0].update(lr=0.1, temperature=0.0)
    step(optimizer, 2)
    assert [optimizer.state[p]["noise_unit"].item() for p in params] == [0.0] * 3


@pytest.mark.parametrize("noise", ["momentum", "preconditioned", "isotropic"])
def test_a_cold_optimizer_has_the_states_of_adam(noise, place):
    optimizer = fe.LangevinAdam(
        parameters(place), **{**HOT, "temperature": 0.0}, noise=noise, backend=place.backend
    )
    params = optimizer.param_groups[0]["params"]
    for i in range(2):
        step(optimizer, i)
        assert all(set(optimizer.state[p]) == ADAMS for p in params)
    optimizer.param_groups[0]["temperature"] = 0.5
    step(optimizer, 2)
    extra = {"noise_unit"} if noise == "momentum" else set()
    assert all(set(optimizer.state[p]) == ADAMS | extra for p in params)
    optimizer.param_groups[0]["temperature"] = torch.zeros(())
    step(optimizer, 3)
    assert all(optimizer.state[p].get("noise_unit", torch.zeros(())).item() == 0 for p in params)


def test_a_temperature_that_is_a_tensor_gives_what_the_float_gives(place):
    optimizers = []
    for kind in (float, torch.tensor):
        optimizer = fe.LangevinAdam(
            parameters(place), **{**HOT, "temperature": kind(0.0)}, backend=place.backend
        )
        for i, (lr, hot) in enumerate([(0.1, 0.0), (0.05, 0.3), (0.02, 0.3), (0.02, 0.0), (0.1, 0.5)]):
            optimizer.param_groups[0].update(lr=lr, temperature=kind(hot))
            step(optimizer, i)
        optimizers.append(optimizer)
    assert same(*optimizers)


@pytest.mark.parametrize("temperature", [0.5, 0.0])
def test_a_checkpoint_of_an_earlier_release_goes_on_in_its_unit(temperature, place):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    step(optimizer, 0)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        del state["noise_unit"]
    saved["param_groups"][0]["previous"] = torch.tensor([0.05, temperature], dtype=torch.float64)
    other = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    other.load_state_dict(saved)
    assert "previous" not in other.param_groups[0]
    units = [state.get("noise_unit") for state in other.state.values()]
    if temperature == 0:
        assert units == [None] * 3
    else:
        assert [unit.item() for unit in units] == [noise_unit(0.05, 0.9)] * 3
    p, q = (o.param_groups[0]["params"][0] for o in (optimizer, other))
    before = other.state[q]["exp_avg"].clone()
    for o in (optimizer, other):
        for r in o.param_groups[0]["params"]:
            r.grad = torch.zeros_like(r)
        o.param_groups[0].update(temperature=0.0, lr=0.1)
        o.step()
    factor = math.sqrt(0.05 / 0.1) if temperature else 1.0
    torch.testing.assert_close(other.state[q]["exp_avg"], before * 0.9 * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], before * 0.9, rtol=1e-6, atol=0)


def test_the_unit_keeps_its_digits_in_a_low_precision_run(place):
    optimizer = fe.LangevinAdam(parameters(place, torch.bfloat16), **HOT, backend=place.backend)
    step(optimizer, 0)
    optimizer.load_state_dict(optimizer.state_dict())
    for state in optimizer.state.values():
        assert state["noise_unit"].dtype == torch.float64 and state["noise_unit"].item() == noise_unit(
            0.1, 0.9
        )
        assert bits_equal(state["step"], torch.ones((), device=state["step"].device))
