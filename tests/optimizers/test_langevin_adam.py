"""fe.LangevinAdam's step: the formula over several steps, Adam at T = 0, its switches, and what must never move."""

import dataclasses
import math

import pytest
import torch

import fekernels as fe
from tests.support.formulas import assert_close_to_formula, langevin_adam_formula
from tests.support.implementations import at_places
from tests.support.optimizer_rows import Row, make_row
from tests.support.optimizers import NOISES, Case, Options, noise_unit
from tests.support.tensors import DTYPES, UNIT, Frozen, bits_equal

KEYWORDS = (
    "lr",
    "eps",
    "weight_decay",
    "amsgrad",
    "temperature",
    "noise",
    "prior_precision",
    "decoupled_weight_decay",
)


def parameter(*shape, scale=1.0, dtype=torch.float32):
    return torch.nn.Parameter((torch.randn(*shape, dtype=torch.float64) * scale).to(dtype))


def optimizer_for(params, options, place, **changes):
    keywords = {name: getattr(options, name) for name in (*KEYWORDS, "maximize", "bias_correction", "seed")}
    betas = (options.beta1, options.beta2)
    return fe.LangevinAdam(params, betas=betas, backend=place.backend, **{**keywords, **changes})


def simulate(param, grads, settings, options, stream, anchor, dtype):
    """The formula over several steps with everything kept in ``dtype``."""
    zeros = torch.zeros_like(param, dtype=dtype)
    row = Row(param.detach().to(dtype), zeros, zeros, zeros, zeros, anchor.to(dtype), torch.zeros(()), stream)
    unit = 0.0
    for t, (grad, (lr, temperature)) in enumerate(zip(grads, settings, strict=True), 1):
        row.grad = grad.to(dtype)
        now = dataclasses.replace(options, lr=lr, temperature=temperature, t=t, noise_unit=unit)
        for name, value in langevin_adam_formula(row, now, dtype).items():
            setattr(row, name, value)
        if lr > 0:
            unit = noise_unit(lr, options.beta1) if temperature > 0 and options.noise == "momentum" else 0.0
    return row


# lr and temperature of each step: warm, colder, off, on again after lr has changed, nothing at all, restarted.
SETTINGS = [
    (0.02, 0.5),
    (0.01, 0.3),
    (0.01, 0.0),
    (0.05, 0.4),
    (0.0, 0.4),
    (0.002, 0.4),
    (0.02, 0.5),
    (0.02, 0.5),
]
SWITCHES = {
    "plain": {},
    "amsgrad": dict(amsgrad=True),
    "maximize": dict(maximize=True, weight_decay=0.1),
    "decoupled": dict(weight_decay=0.1, decoupled_weight_decay=True),
    "prior": dict(prior_precision=0.5, anchor=True),
    "uncorrected": dict(bias_correction=False),
}


@pytest.mark.parametrize(**at_places(switch=list(SWITCHES), noise=NOISES))
def test_steps_are_the_formula(noise, switch, place):
    options = Options(noise=noise, eps=0.05, **SWITCHES[switch])
    params = [parameter(33, 7), parameter(130)]
    starts = [p.detach().clone() for p in params]
    params = [p.detach().to(place.device).requires_grad_() for p in params]
    optimizer = optimizer_for(params, options, place, anchor="init" if options.anchor else None)
    grads = [[torch.randn_like(start) for start in starts] for _ in SETTINGS]
    for (lr, temperature), now in zip(SETTINGS, grads, strict=True):
        optimizer.param_groups[0].update(lr=lr, temperature=temperature)
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(place.device)
        optimizer.step()
    for i, p in enumerate(params):
        exact, eager = (
            simulate(starts[i], [g[i] for g in grads], SETTINGS, options, i, starts[i], dtype)
            for dtype in (torch.float64, torch.float32)
        )
        for name in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[p][name]
            assert_close_to_formula(state, getattr(exact, name), getattr(eager, name), name)
        assert_close_to_formula(p, exact.param, eager.param, "param")
        assert optimizer.state[p]["step"].item() == len(SETTINGS)
        assert ("max_exp_avg_sq" in optimizer.state[p]) == options.amsgrad


# T = 0.


def ulps(got, want, floor):
    """Largest difference in units of the last place of max(|want|, floor)."""
    got, want = got.detach().cpu(), want.detach().cpu()
    magnitude = torch.maximum(want.abs(), torch.tensor(floor, dtype=want.dtype))
    place = torch.nextafter(magnitude, torch.tensor(math.inf)) - magnitude
    return ((got.double() - want.double()).abs() / place.double()).max().item()


@pytest.mark.parametrize(
    **at_places(
        amsgrad=(False, True),
        maximize=(False, True),
        weight_decay=(0.0, 0.03),
        steps_before=(0, 50),
        peer=[torch.optim.Adam, torch.optim.AdamW],
    )
)
def test_a_cold_step_is_adams(peer, amsgrad, maximize, weight_decay, steps_before, place):
    switches = dict(amsgrad=amsgrad, maximize=maximize, weight_decay=weight_decay)
    theirs = [parameter(4097), parameter(33, 7, scale=1e-3)]
    adam = peer(theirs, lr=1e-2, fused=True, **switches)
    for _ in range(steps_before):
        for p in theirs:
            p.grad = torch.randn_like(p) * 0.1
        adam.step()
    ours = [p.detach().clone().to(place.device).requires_grad_() for p in theirs]
    decoupled = peer is torch.optim.AdamW
    optimizer = fe.LangevinAdam(
        ours, lr=1e-2, decoupled_weight_decay=decoupled, backend=place.backend, noise="isotropic", **switches
    )
    optimizer.load_state_dict(adam.state_dict())
    for p, q in zip(theirs, ours, strict=True):
        p.grad = torch.randn_like(p) * 0.1
        q.grad = p.grad.to(place.device)
    adam.step()
    optimizer.step()
    for p, q in zip(theirs, ours, strict=True):
        assert not bits_equal(p, torch.zeros_like(p)) and ulps(q, p, 1e-2) <= 4
        for name, want in adam.state[p].items():
            # Of gradients of 0.1, which decay may cancel.
            floor = {"exp_avg": 1e-2, "step": 1.0}.get(name, 1e-5)
            assert ulps(optimizer.state[q][name], want, floor) <= 8, name


@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_no_say_in_a_cold_step(noise, place):
    results = []
    for chosen, seed in ((noise, 1), ("momentum", 2)):
        row = make_row(Case((65,)), Options()).clone(place.device)
        p = row.param.requires_grad_()
        p.grad = row.grad
        optimizer = fe.LangevinAdam([p], 0.1, noise=chosen, seed=seed, backend=place.backend)
        for _ in range(3):
            optimizer.step()
        results.append(p)
    assert bits_equal(*results)


def network():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


@pytest.mark.parametrize(
    "flags", [{}, dict(foreach=True), dict(fused=True), dict(foreach=False, capturable=True)], ids=str
)
def test_trains_as_adam_does(flags, place):
    inputs = torch.randn(64, 8, device=place.device)
    targets = inputs[:, :1].sin() * inputs[:, 1:2]
    losses = []
    for make in (torch.optim.Adam, fe.LangevinAdam):
        net = network().to(place.device)
        groups = [
            {"params": net[0].parameters()},
            {"params": net[2].parameters(), "lr": 0.02, "betas": (0.8, 0.99)},
        ]
        mine = dict(flags, backend=place.backend) if make is fe.LangevinAdam else {}
        optimizer = make(groups, lr=0.01, weight_decay=1e-3, **mine)
        # Moves betas as well.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.04], total_steps=80)

        def closure(net=net, optimizer=optimizer):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = (net(inputs) - targets).square().mean()
            loss.backward()
            return loss

        history = []
        for i in range(80):
            history.append(optimizer.step(closure).item() if i % 2 else closure().item())
            if i % 2 == 0:
                assert optimizer.step() is None
            schedule.step()
        losses.append(torch.tensor(history))
    assert losses[0][-1] < 0.2 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=4 * 80 * UNIT, atol=0)  # a few roundings a step


# What must not move, and what must come back.


@pytest.mark.parametrize("noise", NOISES)
def test_lr_zero_moves_nothing_and_makes_no_noise(noise, place):
    p = parameter(100).detach().to(place.device).requires_grad_()
    p.grad = torch.ones_like(p)
    optimizer = fe.LangevinAdam([p], 0.1, temperature=1.0, noise=noise, eps=0.1, backend=place.backend)
    optimizer.step()
    group, state = optimizer.param_groups[0], optimizer.state[p]
    before, unit = Frozen([p]), state.get("noise_unit", torch.zeros(())).clone()
    momentum = state["exp_avg"].clone()
    group["lr"] = 0.0
    for _ in range(3):
        optimizer.step()
        momentum = 0.9 * momentum + 0.1  # g = 1 and nothing else
    assert before.unchanged() and ("noise_unit" in state) is (noise == "momentum")
    if noise == "momentum":
        assert bits_equal(state["noise_unit"], unit) and unit.item() == noise_unit(0.1, 0.9)
    torch.testing.assert_close(state["exp_avg"], momentum, rtol=18 * UNIT, atol=0)  # six roundings a step
    assert state["step"].item() == 4


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_a_prior_holds_weights_that_get_no_gradient(temperature, place):
    p = parameter(1000).detach().to(place.device).requires_grad_()
    anchor = torch.linspace(-1, 1, 1000)
    optimizer = fe.LangevinAdam(
        [p],
        0.01,
        temperature=temperature,
        prior_precision=1.0,
        anchor=[anchor],
        seed=1,
        backend=place.backend,
    )
    p.grad = torch.zeros_like(p)
    for _ in range(200):
        optimizer.step()
    distance = (p.detach().cpu() - anchor).square().mean().sqrt().item()
    # D = lr * prior_precision: x = 1 in the variance of test_sampling.py. The start falls as sqrt(beta1)^t, to 3e-5.
    expected = math.sqrt(temperature / (1 - (1 - 0.9) / (2 * (1 + 0.9))))
    assert abs(distance - expected) < (5 * expected / math.sqrt(2 * p.numel()) if temperature else 1e-4)


@pytest.mark.parametrize(
    **at_places(bad=[math.nan, math.inf, -math.inf], dtype=DTYPES, stochastic=(False, True))
)
def test_nan_and_infinity_stay(stochastic, dtype, bad, place):
    p = parameter(200, dtype=dtype).detach().to(place.device)
    p[::2] = bad
    p.requires_grad_()
    optimizer = fe.LangevinAdam(
        [p], 0.1, temperature=1.0, stochastic_rounding=stochastic, eps=0.1, seed=0, backend=place.backend
    )
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(
        p[::2].nan_to_num(7.0, 8.0, 9.0), torch.full_like(p[::2], bad).nan_to_num(7.0, 8.0, 9.0)
    )
    assert p[1::2].isfinite().all()
    p.grad[1::2] = math.nan
    optimizer.step()
    assert p[1::2].isnan().all() and optimizer.state[p]["exp_avg"][1::2].isnan().all()
    assert optimizer.state[p]["exp_avg_sq"][1::2].isnan().all()


def test_a_parameter_without_gradient_gets_no_step_and_no_noise(place):
    params = [parameter(65).detach().to(place.device).requires_grad_() for _ in range(3)]
    optimizer = fe.LangevinAdam(params, 0.1, temperature=1.0, eps=0.1, seed=3, backend=place.backend)
    frozen = Frozen([params[1]])
    for i in range(4):
        for j, p in enumerate(params):
            p.grad = None if j == 1 and i < 2 else torch.ones_like(p)
        optimizer.step()
        assert frozen.unchanged() == (i < 2)
        assert (optimizer.state.get(params[1], {}) == {}) == (i < 2)
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 2, 4]
    late = [frozen.before[0].clone().requires_grad_()]
    alone = fe.LangevinAdam(
        [params[0].detach().clone(), *late], 0.1, temperature=1.0, eps=0.1, seed=3, backend=place.backend
    )
    for _ in range(2):  # its own step count, so the first two noises of stream 1
        late[0].grad = torch.ones_like(late[0])
        alone.step()
    assert bits_equal(late[0], params[1])


def test_zero_size_parameters_and_empty_groups(place):
    params = [parameter(0), parameter(3), parameter(4, 0)]
    params = [p.detach().to(place.device).requires_grad_() for p in params]
    optimizer = fe.LangevinAdam(params, 0.1, temperature=1.0, eps=0.1, backend=place.backend)
    for p in params:
        p.grad = torch.ones_like(p)
    frozen = Frozen([params[1]])
    optimizer.step()
    assert not frozen.unchanged() and [optimizer.state[p]["step"].item() for p in params] == [1, 1, 1]
    fe.LangevinAdam([{"params": []}, {"params": params}], 0.1, backend=place.backend).step()


# Counting.


def test_the_step_counter_ends_at_2_to_24(place):
    params = [parameter(5).detach().to(place.device).requires_grad_() for _ in range(2)]
    optimizer = fe.LangevinAdam(params, 0.1, temperature=1.0, eps=0.1, backend=place.backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[params[1]]
    state["step"].fill_(2**24 - 1)
    if place.device != "cpu":  # there the host counts from what it saw at a load
        optimizer.load_state_dict(optimizer.state_dict())
        state = optimizer.state[params[1]]
    optimizer.step()
    assert state["step"].item() == 2**24
    states = [t for p in params for t in optimizer.state[p].values()]
    frozen = Frozen([*params, *states])
    with pytest.raises(RuntimeError, match=r"step (of params\[1\] must be|must stay) below 2\^24"):
        optimizer.step()
    assert frozen.unchanged()


# Numbers that are tensors.


@pytest.mark.parametrize("of", [torch.float32, torch.float64], ids=str)
def test_tensors_for_lr_and_temperature_may_be_filled_in_place(of, place):
    runs = []
    for tensors in (False, True):
        torch.manual_seed(0)
        p = parameter(65).detach().to(place.device).requires_grad_()
        optimizer = fe.LangevinAdam([p], 0.5, temperature=0.5, eps=0.1, seed=0, backend=place.backend)
        group = optimizer.param_groups[0]
        if tensors:
            group["lr"], group["temperature"] = (
                torch.tensor(0.5, dtype=of, device=place.device) for _ in range(2)
            )
        for lr, temperature in ((0.5, 0.5), (0.25, 0.125), (2.0**-6, 0.0), (0.125, 1.0)):
            if tensors:
                group["lr"].fill_(lr)
                group["temperature"].fill_(temperature)
            else:
                group["lr"], group["temperature"] = lr, temperature
            p.grad = torch.ones_like(p)
            optimizer.step()
        runs.append(p)
    assert bits_equal(*runs)


def test_a_scheduled_temperature_is_a_temperature_set_by_hand(place):
    runs = []
    for scheduled in (True, False):
        torch.manual_seed(0)
        p = parameter(65).detach().to(place.device).requires_grad_()
        optimizer = fe.LangevinAdam([p], 0.1, temperature=0.5, eps=0.1, seed=0, backend=place.backend)
        schedule = fe.optim.ExponentialTemperature(optimizer, 0.5) if scheduled else None
        for i in range(4):
            p.grad = torch.ones_like(p)
            if not scheduled:
                optimizer.param_groups[0]["temperature"] = 0.5 ** (i + 1)
            optimizer.step()
            if scheduled:
                schedule.step()
        runs.append(p)
    assert bits_equal(*runs)
