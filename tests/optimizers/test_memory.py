"""Tensors that an optimizer must not read by their address, or not any longer, and those that it must refuse."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fekernels as fe
from tests.support.parameters import parameters, set_gradients, step
from tests.support.tensors import Frozen, bits_equal, freed, survives

OPTIMIZERS = [fe.LangevinAdam, fe.SGLD]
COLD = dict(lr=0.1, temperature=0.0, seed=7)


@pytest.fixture(params=OPTIMIZERS, ids=lambda kind: kind.__name__)
def make(request, place):
    return lambda params, **changes: request.param(params, **{**COLD, **changes, "backend": place.backend})


def negated(values):
    """``values``, stored with the other sign and the bit that says so."""
    view = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert view.is_neg()
    return view


def frozen(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in params for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    return Frozen([*params, *states])


# Lazily negated: right, whatever it is.


def test_negated_gradients_step_the_right_way(make, place):
    optimizer, plain = make(parameters(place)), make(parameters(place))
    for i in range(4):
        for o in (optimizer, plain):
            set_gradients(o, i)
        if i != 1:  # not at every step, so that the tables are tried
            for p in optimizer.param_groups[0]["params"]:
                p.grad = negated(p.grad)
        for o in (optimizer, plain):
            o.step()
        for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, plain)), strict=True):
            assert bits_equal(p, q)


def test_a_gradient_of_autograd_with_the_bit_on_it(make, place):
    b = torch.ones(4, device=place.device, requires_grad=True)
    loss = (torch.complex(torch.ones_like(b), b).conj() * (1 + 2j)).imag.sum()  # its derivative is -1
    (b.grad,) = torch.autograd.grad(loss, [b])
    make([b]).step()
    assert (b > 1).all()


@pytest.mark.parametrize("what", ["param", "exp_avg", "anchor"])
def test_a_negated_parameter_state_or_anchor(what, place):
    values = torch.linspace(-1, 1, 7)
    ends = []
    for lazy in (False, True):
        p = (negated(values) if lazy and what == "param" else values.clone()).requires_grad_()
        anchor = negated(values + 1) if lazy and what == "anchor" else values + 1
        p.grad = torch.ones(7)
        optimizer = fe.LangevinAdam(
            [p], **COLD, eps=0.1, prior_precision=0.5, anchor=[anchor], backend=place.backend
        )
        optimizer.step()
        if lazy and what == "exp_avg":
            optimizer.state[p]["exp_avg"] = negated(optimizer.state[p]["exp_avg"].clone())
        optimizer.step()
        optimizer.step()
        ends.append([p.detach().resolve_neg(), optimizer.state[p]["exp_avg"].resolve_neg()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# Wrapper subclasses have no memory of their own.


@pytest.mark.parametrize("hot", [False, True])
def test_wrapper_subclasses_are_stepped_by_operators(make, place, hot):
    start, grad = torch.linspace(-1, 1, 7), torch.linspace(1, 2, 7)
    plain = start.clone().to(place.device).requires_grad_()
    other = plain.detach().clone().requires_grad_()
    two = torch.nn.Parameter(TwoTensor(plain.detach().clone(), plain.detach().clone()))
    temperature = 0.01 if hot else 0.0
    optimizer = make([other, two], temperature=temperature)
    alone = make([other.detach().clone().requires_grad_(), plain], temperature=temperature)
    for _ in range(3):
        for p in (*optimizer.param_groups[0]["params"], *alone.param_groups[0]["params"]):
            p.grad = grad.clone().to(place.device)
        two.grad = TwoTensor(two.grad, two.grad.clone())
        optimizer.step()
        alone.step()
    torch.testing.assert_close(two.a, plain.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(two.a, two.b)
    assert bits_equal(other, alone.param_groups[0]["params"][0])  # whose group it is in changes nothing
    assert all(state["step"].item() == 3 for state in optimizer.state.values())


def test_a_wrapper_as_the_gradient_of_a_plain_parameter(make, place):
    p, q = (torch.ones(4, device=place.device, requires_grad=True) for _ in range(2))
    optimizer, plain = make([p]), make([q])
    for i in range(3):
        p.grad = TwoTensor(torch.ones_like(q), torch.ones_like(q)) if i != 1 else torch.ones_like(q)
        q.grad = torch.ones_like(q)
        optimizer.step()
        plain.step()
    assert bits_equal(p, q)


def test_fake_tensors_are_left_to_their_mode(make):
    with FakeTensorMode():
        p = torch.zeros(4, requires_grad=True)
        p.grad = torch.ones(4)
        optimizer = make([p])
        optimizer.step()
        optimizer.step()
    assert p.shape == (4,)


# What changes behind the parameter's back.


@pytest.mark.parametrize("size", [0, 1, 999])
def test_a_gradient_made_smaller_after_a_step_raises(make, place, size):
    p = torch.zeros(1000, device=place.device, requires_grad=True)
    optimizer = make([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = frozen(optimizer)
    p.grad.data = torch.zeros(size, device=place.device)
    with pytest.raises(ValueError, match=rf"grad of params\[0\] must have shape \(1000,\).*got \({size},\)"):
        optimizer.step()
    assert before.unchanged()


# The same memory, seen otherwise.
VIEWS = {
    "smaller": lambda tensor: tensor[:1],
    "shape": lambda tensor: tensor.view(2, 4),
    "halves": lambda tensor: tensor.view(torch.float16),
    "integers": lambda tensor: tensor.view(torch.int32),
}
KINDS = {"grad": ("smaller", "shape"), "step": ("halves", "integers"), "noise_unit": ("halves", "integers")}
SEEN = [
    (which, how)
    for which in ("grad", "exp_avg", "exp_avg_sq", "anchor", "step", "noise_unit")
    for how in KINDS.get(which, VIEWS)  # one number has no other shape, a gradient its parameter's dtype
]


@pytest.mark.parametrize(("which", "how"), SEEN)
def test_another_shape_or_dtype_at_the_same_address_raises(which, how, place):
    p = torch.zeros(8, device=place.device, requires_grad=True)
    optimizer = fe.LangevinAdam(
        [p], lr=0.1, temperature=0.1, eps=0.1, anchor="init", prior_precision=1.0, backend=place.backend
    )
    step(optimizer, 0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    tensor = p.grad if which == "grad" else optimizer.state[p][which]
    flat = tensor.view(1) if tensor.dim() == 0 else tensor
    tensor.data = VIEWS[how](flat)
    before = Frozen([p])
    with pytest.raises((TypeError, ValueError), match=rf"{which} of params\[0\] must"):
        optimizer.step()
    assert before.unchanged()


def test_in_a_large_group_every_tensor_has_its_turn(place):
    params = [torch.zeros(8, device=place.device).requires_grad_() for _ in range(100)]
    optimizer = fe.LangevinAdam(params, lr=0.1, seed=0, backend=place.backend)
    step(optimizer, 0)
    state = optimizer.state[params[97]]["exp_avg"]
    state.data = state.data.view(2, 4)
    with pytest.raises(ValueError, match=r"exp_avg of params\[97\] must have shape \(8,\)"):
        for i in range(1, 6):
            step(optimizer, i)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("exp_avg", None, TypeError, r"exp_avg of params\[1\] must be a tensor; got NoneType"),
        ("exp_avg_sq", 0.5, TypeError, r"exp_avg_sq of params\[1\] must be a tensor; got float"),
        ("step", 3, TypeError, r"step of params\[1\] must be a tensor; got int"),
        ("noise_unit", 3.0, TypeError, r"noise_unit of params\[1\] must be a tensor; got float"),
        (
            "exp_avg",
            torch.zeros(1),
            ValueError,
            r"exp_avg of params\[1\] must have shape \(130,\).*got \(1,\)",
        ),
        ("exp_avg", torch.zeros(130).double(), ValueError, r"the states of params\[1\] must have one dtype"),
        ("exp_avg", torch.zeros(130, device="meta"), ValueError, r"exp_avg of params\[1\] must be on"),
        (
            "exp_avg",
            torch.zeros(1).expand(130),
            ValueError,
            r"exp_avg of params\[1\] must have memory of its own",
        ),
        ("exp_avg", torch.zeros(130).to_sparse(), ValueError, r"exp_avg of params\[1\] must be dense"),
        ("step", torch.zeros(2), ValueError, r"step of params\[1\] must be one float32 or float64"),
        ("noise_unit", torch.zeros(()), ValueError, r"noise_unit of params\[1\] must be one float64"),
    ],
    ids=range(11),
)
def test_a_state_set_by_hand_raises_before_anything_moves(key, value, error, message, place):
    optimizer = fe.LangevinAdam(parameters(place), lr=0.1, temperature=0.1, eps=0.1, backend=place.backend)
    params = optimizer.param_groups[0]["params"]
    step(optimizer, 0)
    state = optimizer.state[params[1]]
    is_here = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    state[key] = value.to(place.device) if is_here else value
    set_gradients(optimizer, 1)
    before = Frozen([*params, *(optimizer.state[params[0]].values())])
    with pytest.raises(error, match=f"LangevinAdam: {message}"):
        optimizer.step()
    assert before.unchanged()


def test_a_missing_state_raises(place):
    optimizer = fe.LangevinAdam(parameters(place), lr=0.1, backend=place.backend)
    step(optimizer, 0)
    del optimizer.state[optimizer.param_groups[0]["params"][1]]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"the state of params\[1\] must have exp_avg_sq; got step, exp_avg"):
        step(optimizer, 1)


# Memory that is not a tensor's own, or not there.


@pytest.mark.parametrize("how", ["expand", "as_strided"])
def test_a_parameter_whose_elements_share_memory_is_refused(make, place, how):
    base = torch.zeros(8, device=place.device)
    shared = base[:1].expand(5) if how == "expand" else base.as_strided((4, 4), (1, 1))
    p = torch.nn.Parameter(shared)
    p.grad = torch.ones_like(p)
    optimizer = make([p])
    with pytest.raises(
        ValueError, match=r"param of params\[0\] must have memory of its own.*clone it"
    ) as caught:
        optimizer.step()
    assert isinstance(caught.value, RuntimeError)  # as torch's own optimizers raise
    assert not base.any()


def test_an_expanded_gradient_is_fine(make, place):
    p = torch.zeros(5, device=place.device, requires_grad=True)
    p.grad = torch.ones(1, device=place.device).expand(5)
    make([p]).step()
    assert (p < 0).all()


def test_a_freed_storage_is_refused(make, place):
    p = torch.zeros(5, device=place.device, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = make([p])
    optimizer.step()
    p.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match=r"param of params\[0\] must hold values; its storage has 0 of the 20"
    ):
        optimizer.step()


@pytest.mark.parametrize("ahead", [0, 4000])
@pytest.mark.parametrize("what", ["param", "grad", "anchor", "exp_avg", "exp_avg_sq", "step", "noise_unit"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_view_into_freed_storage_is_refused(what, ahead, before, place):
    """Before the first step or a later one, and what is behind an address that is not null."""
    p = torch.zeros(4000, device=place.device, requires_grad=True)
    optimizer = fe.LangevinAdam(
        [p],
        **{**COLD, "temperature": 1e-3, "backend": place.backend, "prior_precision": 1.0, "anchor": "init"},
    )
    for _ in range(before or int(what not in ("param", "grad"))):
        p.grad = torch.ones_like(p)
        optimizer.step()
    state = optimizer.state[p]
    if what == "param":
        p.grad = None
        p.data = freed(p, ahead)
    p.grad = freed(p, ahead) if what == "grad" else torch.ones(4000, device=place.device)
    if what in state:
        state[what] = freed(state[what], ahead)

    def refused():
        with pytest.raises(
            ValueError, match=rf"{what} of params\[0\] must hold values; its storage has 0 of the"
        ):
            optimizer.step()

    assert survives(refused) if place.device == "cpu" else refused() is None


@pytest.mark.parametrize("what", ["param", "grad", "exp_avg"])
def test_a_storage_that_has_shrunk_is_refused(what, place):
    """Some memory, but not all: beyond it lies another's."""
    p = torch.zeros(4000, device=place.device, requires_grad=True)
    optimizer = fe.LangevinAdam([p], **COLD, backend=place.backend)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    tensor = {"param": p, "grad": p.grad}.get(what, optimizer.state[p].get(what))
    if what == "grad":  # its address may stay the same, which the Python check does not notice
        optimizer._reset_caches()
    tensor.untyped_storage().resize_(8)
    with pytest.raises(
        ValueError, match=rf"{what} of params\[0\] must hold values; its storage has 8 of the 16000"
    ):
        optimizer.step()


def test_a_gradient_of_a_transform_that_has_ended(make, place):
    p, q = (torch.ones(6, device=place.device, requires_grad=True) for _ in range(2))
    kept = []
    torch.func.grad(lambda x: kept.append(x * 2) or (x * 2).sum())(torch.ones(6, device=place.device))
    p.grad, q.grad = kept[0], torch.full_like(q, 2.0)
    for param in (p, q):
        make([param]).step()
    assert bits_equal(p, q) and not torch.equal(p, torch.ones_like(p))


def test_a_meta_parameter_is_one_clear_error(make):
    p = torch.nn.Parameter(torch.zeros(5, device="meta"))
    p.grad = torch.zeros(5, device="meta")
    optimizer = make([p])
    optimizer.param_groups[0]["backend"] = None
    with pytest.raises(ValueError, match="must hold values; got a tensor on the meta device"):
        optimizer.step()


# Groups.


def test_the_step_limit_of_a_later_group_raises_before_anything_moves(make, place):
    params = [p.detach().requires_grad_() for p in parameters(place)]
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}])
    step(optimizer, 0)
    optimizer.state[params[2]]["step"].fill_(2.0**24)
    if place.device != "cpu":  # there the host counts from what it saw at a load
        optimizer.load_state_dict(optimizer.state_dict())
    set_gradients(optimizer, 1)
    before = frozen(optimizer)
    with pytest.raises(RuntimeError, match=r"step (of params\[1\] must be|must stay) below 2\^24"):
        optimizer.step()
    assert before.unchanged()


def test_a_parameter_appended_to_a_group_is_stepped_with_noise_of_its_own(make, place):
    params = [torch.zeros(50, device=place.device, requires_grad=True) for _ in range(4)]
    optimizer = make([{"params": params[:2]}, {"params": params[2:3]}], temperature=1.0)
    optimizer.param_groups[0]["params"].append(params[3])
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.param_groups[0]["streams"] == [0, 1, 3]
    assert all(p.any() for p in params) and not torch.equal(params[3], params[2])
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match="streams must have 2 entries like params of the group; got 3"):
        optimizer.step()
