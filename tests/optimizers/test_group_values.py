"""Group values set by hand between two steps: every backend heeds them, or refuses them before anything moves."""

import numpy as np
import pytest
import torch

import fekernels as fe

MAKE = {
    "langevin_adam": lambda params, **more: fe.LangevinAdam(
        params, lr=0.1, temperature=0.5, eps=0.1, seed=1, **more
    ),
    "sgld": lambda params, **more: fe.SGLD(params, lr=0.1, temperature=0.5, seed=1, **more),
}


def parameters(count=2):
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(4)
    return params


@pytest.mark.parametrize("name", MAKE)
def test_a_schedule_gives_the_bits_of_values_that_are_checked_anew(name):
    """Positive lr and temperature after positive ones are taken over; another value between them makes them anew."""
    results = []
    for anew in (False, True):
        params = parameters()
        optimizer = MAKE[name](params, prior_precision=0.5)
        (group,) = optimizer.param_groups
        moves = [
            ("lr", 0.2),
            ("temperature", 0.3),
            ("lr", 0.05),
            ("temperature", 0.0),
            ("lr", 0.0),
            ("lr", 0.07),
        ]
        moves += [("temperature", 2.0), ("prior_precision", 0.1), ("lr", np.float64(0.03)), ("lr", 0.04)]
        for key, value in moves:
            group[key] = value
            if anew:
                optimizer._kept.clear()
            optimizer.step()
        results.append(torch.stack([p.detach() for p in params]))
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1"])
@pytest.mark.parametrize("key", ["lr", "temperature"])
@pytest.mark.parametrize("name", MAKE)
def test_a_schedule_that_goes_wrong_moves_nothing(name, key, value):
    params = parameters()
    optimizer = MAKE[name](params, prior_precision=0.5)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0][key] = value
    with pytest.raises((TypeError, ValueError), match=f"{key} must be"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_a_schedule_from_cold_to_hot_warns():
    params = parameters()
    optimizer = fe.LangevinAdam(params, lr=0.1, seed=1)
    optimizer.step()
    optimizer.param_groups[0]["temperature"] = 1.0
    with pytest.warns(UserWarning, match="prior_precision = 0"):
        optimizer.step()


@pytest.mark.parametrize(("key", "value"), [("streams", [7, 8]), ("anchor", None)])
@pytest.mark.parametrize("name", MAKE)
def test_a_value_set_later_counts_on_every_backend(name, key, value):
    results = []
    for backend in ("reference", "auto"):
        params = parameters()
        optimizer = MAKE[name](
            params, prior_precision=0.5, anchor=[torch.full((4,), 3.0)] * 2, backend=backend
        )
        for step in range(5):
            if step == 2:
                optimizer.param_groups[0][key] = value
            optimizer.step()
        results.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", MAKE)
def test_a_stream_that_is_none_is_refused_before_the_first_group_moves(name, backend):
    params = parameters()
    optimizer = MAKE[name]([{"params": [p]} for p in params], backend=backend)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1]["streams"] = [-1]
    with pytest.raises(ValueError, match=r"streams\[0\] must be in \[0, 4294967296\); got -1"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("temperature", [float("nan"), -1.0])
@pytest.mark.parametrize("name", MAKE)
def test_a_compiled_step_refuses_a_temperature_that_is_none(name, temperature):
    torch._dynamo.reset()
    params = parameters(1)
    optimizer = MAKE[name](params)
    take = torch.compile(optimizer.step, backend="eager")
    take()
    optimizer.param_groups[0]["temperature"] = temperature
    before = params[0].detach().clone()
    # torch.compile does not put the grad mode back where its graph raises.
    with pytest.raises(Exception, match="temperature"), torch.enable_grad():
        take()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("name", MAKE)
def test_a_compiled_step_takes_a_parameter_that_was_appended(name):
    torch._dynamo.reset()
    params = parameters()
    optimizer = MAKE[name](params[:1])
    take = torch.compile(optimizer.step, backend="eager")
    take()
    optimizer.param_groups[0]["params"].append(params[1])
    take()
    assert params[1].detach().abs().min() > 0 and optimizer.param_groups[0]["streams"] == [0, 1]


def test_a_state_that_sgld_does_not_use_is_left_alone():
    (p,) = parameters(1)
    optimizer = fe.SGLD([p], lr=0.1)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["noise_unit"] = 0.25
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("key", ["fused", "foreach"])
def test_a_switch_is_none_or_a_bool(key):
    with pytest.raises(TypeError, match=f"LangevinAdam: {key} must be a bool; got Tensor"):
        fe.LangevinAdam(parameters(1), **{key: torch.zeros(3)})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "noise_unit",
            torch.full((1,), float("nan"), dtype=torch.float64),
            "must be finite and >= 0; got nan",
        ),
        ("noise_unit", torch.full((1,), -1.0, dtype=torch.float64), "must be finite and >= 0; got -1.0"),
        ("step", torch.ones((), device="meta"), "must hold a value; got a tensor on the meta device"),
    ],
)
def test_a_state_that_is_none_is_refused_before_the_first_group_moves(key, value, message, backend, compiled):
    torch._dynamo.reset()
    params = parameters()
    optimizer = MAKE["langevin_adam"]([{"params": [p]} for p in params], backend=backend)
    take = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    take()
    saved, before = optimizer.state_dict(), [p.detach().clone() for p in params]
    saved["state"][1] = {**saved["state"][1], key: value}
    with pytest.raises(ValueError, match=f"LangevinAdam.load_state_dict: {key} of parameter 1 must be"):
        optimizer.load_state_dict(saved)
    optimizer.state[params[1]][key] = value
    error = Exception if compiled else ValueError  # which torch.compile wraps
    with pytest.raises(error, match=rf"LangevinAdam: {key} of params\[0\] {message}"), torch.enable_grad():
        take()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("key", ["lr", "temperature", "betas"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.nested.nested_tensor([torch.full((1,), 0.5)]), TypeError, "must be dense; got nested"),
        (torch.full((1,), 0.5).to_sparse(), TypeError, "must be dense; got layout sparse_coo"),
        (torch.ones(1, dtype=torch.complex64), TypeError, "floating point or integer; got torch.complex64"),
        (torch.full((2,), 0.5), ValueError, r"a tensor with one element; got shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("name", MAKE)
def test_a_tensor_that_is_no_number(name, key, value, error, message):
    if key == "betas" and name == "sgld":
        return
    given = {"betas": (value, 0.9)} if key == "betas" else {key: value}
    found = "betas\\[0\\]" if key == "betas" else key
    make = {"langevin_adam": fe.LangevinAdam, "sgld": fe.SGLD}[name]
    with pytest.raises(error, match=f"{make.__name__}: {found} .*{message}"):
        make(parameters(1), **{"lr": 0.1, **given})


@pytest.mark.parametrize("make", [fe.LangevinAdam, lambda params: fe.SGLD(params, 0.1)])
@pytest.mark.parametrize("bad", [np.ones(2), None, 3.0], ids=["ndarray", "NoneType", "float"])
def test_a_parameter_that_is_none(make, bad):
    with pytest.raises(
        TypeError, match=rf"params\[1\] must be a tensor or a .*pair; got {type(bad).__name__}"
    ):
        make([*parameters(1), bad])
    optimizer = make(parameters(1))
    with pytest.raises(TypeError, match=rf"params\[0\] must be a tensor or a .*got {type(bad).__name__}"):
        optimizer.add_param_group({"params": [bad]})
    for odd, layout in (
        (torch.nested.nested_tensor([torch.ones(2)]), "nested"),
        (torch.eye(2).to_sparse(), "layout"),
    ):
        with pytest.raises(TypeError, match=rf"params\[0\] must be dense; got {layout}"):
            make([odd])
