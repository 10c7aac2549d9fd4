"""Tensors of fe.LangevinAdam that are not where they were a step ago, and memory that it must not hold."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import fekernels as fe
from fekernels._runtime import backends
from tests.support.parameters import HOT, SHAPES, parameters, same, set_gradients, step
from tests.support.tensors import Frozen, bits_equal


def reference_run(place, steps=4):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    for i in range(steps):
        step(optimizer, i)
    return optimizer


def test_gradients_that_move_change_layout_or_come_in_place(place):
    expected = reference_run(place, 6)
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    params = optimizer.param_groups[0]["params"]
    kept = []
    for i in range(6):
        if i == 5:  # into the gradients of the step before
            old = [p.grad for p in params]
            set_gradients(optimizer, i)
            for p, g in zip(params, old, strict=True):
                p.grad = g.copy_(p.grad)
        else:
            set_gradients(optimizer, i)
        if i == 2:
            params[0].grad = params[0].grad.t().contiguous().t()
        if i == 3:
            params[1].grad = torch.stack((params[1].grad, params[1].grad), 1)[:, 0]
        kept += [p.grad for p in params]  # so that the next ones cannot lie where these do
        optimizer.step()
        optimizer.zero_grad(set_to_none=i % 2 == 0) if i != 4 else None
    assert same(optimizer, expected)


def test_a_gradient_that_comes_and_goes(place):
    # Of equal shapes, so that one that comes could pass for one that goes.
    params = [torch.randn(33, 7).to(place.device).requires_grad_() for _ in range(3)]
    optimizer = fe.LangevinAdam(params, **HOT, backend=place.backend)
    counts = [0] * len(params)
    for i, missing in enumerate([{0}, {1}, set(), {0, 1, 2}, {2}, set()]):
        set_gradients(optimizer, i)
        for j in missing:
            params[j].grad = None
        frozen = {j: Frozen([params[j]]) for j in range(len(params))}
        optimizer.step()
        assert {j for j in frozen if frozen[j].unchanged()} == missing
        counts = [n + (j not in missing) for j, n in enumerate(counts)]
    assert [optimizer.state[p]["step"].item() for p in params] == counts


def test_replaced_parameter_data_is_noticed(place):
    expected = reference_run(place)
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    params = optimizer.param_groups[0]["params"]
    old = []
    for i in range(4):
        step(optimizer, i)
        if i == 1:
            for p in params:
                old.append(p.data)
                p.data = p.data.clone()
            frozen = Frozen(old)
        if i == 2:
            params[0].data = params[0].data.t().contiguous().t()
    assert same(optimizer, expected) and frozen.unchanged()


def test_data_transposed_where_it_lies_is_noticed(place):
    values = torch.randn(8, 8)
    p, plain = (values.clone().to(place.device).requires_grad_() for _ in range(2))
    optimizer, expected = (fe.LangevinAdam([q], **HOT, backend=place.backend) for q in (p, plain))
    for o in (optimizer, expected):
        step(o, 0)
    p.data = p.data.t()  # the same address and shape
    plain.data = plain.data.t().contiguous()
    for o in (optimizer, expected):
        step(o, 1)
    assert bits_equal(p, plain)


def test_a_parameter_converted_between_steps(place):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    params = optimizer.param_groups[0]["params"]
    step(optimizer, 0)
    for p in params:
        p.grad = None
        p.data = p.data.double()
    step(optimizer, 1)
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in params)
    resized = params[1]
    resized.grad = None
    resized.data = torch.zeros(5, 5, dtype=torch.float64, device=place.device)
    optimizer.state[resized].clear()
    step(optimizer, 2)
    assert optimizer.state[resized]["exp_avg"].shape == (5, 5) and (resized != 0).all()


@pytest.mark.parametrize("how", ["tensor", "in_place", "dict", "data"])
def test_replaced_states_are_noticed(how, place):
    expected = reference_run(place, 2)
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    step(optimizer, 0)
    step(optimizer, 1)
    for o in (expected, optimizer):
        p = o.param_groups[0]["params"][0]
        state = o.state[p]
        if o is expected or how == "in_place":
            state["exp_avg"].fill_(0.25)
            state["step"].fill_(7.0)
        elif how == "tensor":
            state["exp_avg"] = torch.full_like(p, 0.25)
            state["step"] = torch.full_like(state["step"], 7.0)
        elif how == "dict":
            o.state[p] = {key: value.clone() for key, value in state.items()}
            o.state[p]["exp_avg"].fill_(0.25)
            o.state[p]["step"].fill_(7.0)
            state.clear()
        elif how == "data":
            state["exp_avg"].data = torch.full_like(p, 0.25)
            state["step"].data = torch.full_like(state["step"], 7.0)
    for o in (expected, optimizer):
        step(o, 2)
        step(o, 3)
    assert same(optimizer, expected)


@pytest.mark.parametrize("of", ["param", "exp_avg", "exp_avg_sq", "step", "noise_unit"])
def test_a_lazy_clone_stays_as_it_was(of, place):
    """Of what a step writes: the first to write takes other memory, and it is no operator that torch sees."""
    expected = reference_run(place)
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    kept = []
    for i in range(4):
        step(optimizer, i)
        for p in optimizer.param_groups[0]["params"]:
            tensor = p.detach() if of == "param" else optimizer.state[p][of]
            kept.append((torch._lazy_clone(tensor), tensor.tolist()))  # which reads
    assert same(optimizer, expected)
    assert all(clone.tolist() == before for clone, before in kept)


@pytest.mark.parametrize("of", ["param", "hessian", "mean"])
def test_a_lazy_clone_stays_as_it_was_while_weights_are_drawn(of, place):
    optimizers = [
        fe.VariationalAdam(parameters(place), lr=0.1, ess=100.0, seed=0, backend=place.backend)
        for _ in range(2)
    ]
    kept = []

    def keep(optimizer):
        for p in optimizer.param_groups[0]["params"] if optimizer is optimizers[1] else []:
            tensor = p.detach() if of == "param" else optimizer.state[p][of]
            kept.append((torch._lazy_clone(tensor), tensor.tolist()))

    for optimizer in optimizers:
        for i in range(3):
            with optimizer.sampled_params(train=True):
                keep(optimizer)
                set_gradients(optimizer, i)
            keep(optimizer)
            optimizer.step()
            keep(optimizer)
    assert same(*optimizers)
    assert all(clone.tolist() == before for clone, before in kept)


def test_parameters_in_a_tuple(place):
    expected = reference_run(place)
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    for i in range(4):
        step(optimizer, i)
        if i == 1:
            optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])
    assert same(optimizer, expected)


def test_states_of_other_names_are_refused(place):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    step(optimizer, 0)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["v"] = state.pop("exp_avg_sq")
    with pytest.raises(ValueError, match=r"state of params\[0\] must have exp_avg_sq; got .*, v"):
        step(optimizer, 1)


def test_states_of_each_others_names_are_taken_for_what_they_are_called(place):
    optimizers = [fe.LangevinAdam(parameters(place), **HOT, backend=place.backend) for _ in range(2)]
    for optimizer, by_values in zip(optimizers, (False, True), strict=True):
        step(optimizer, 0)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        old = {key: value.clone() for key, value in state.items()}
        if by_values:
            state["exp_avg"].copy_(old["exp_avg_sq"])
            state["exp_avg_sq"].copy_(old["exp_avg"].abs())
        else:
            state["exp_avg"].abs_()
            old = dict(state)
            state.clear()
            names = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
            state.update({names.get(key, key): value for key, value in old.items()})
        step(optimizer, 1)
    assert bits_equal(*(optimizer.param_groups[0]["params"][0] for optimizer in optimizers))


def test_cleared_states_start_again(place):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    step(optimizer, 0)
    optimizer.state.clear()
    step(optimizer, 1)
    assert all(optimizer.state[p]["step"].item() == 1 for p in optimizer.param_groups[0]["params"])


def test_a_parameter_swapped_in_its_group_is_noticed(place):
    optimizer = fe.LangevinAdam(parameters(place), **HOT, backend=place.backend)
    step(optimizer, 0)
    group = optimizer.param_groups[0]
    old, new = group["params"][0], torch.zeros_like(group["params"][0]).requires_grad_()
    group["params"][0] = new
    frozen = Frozen([old])
    step(optimizer, 1)
    assert frozen.unchanged() and (new != 0).all() and optimizer.state[new]["step"].item() == 1


def test_no_memory_is_kept_that_is_not_needed():
    p = torch.zeros(50, requires_grad=True)
    optimizer = fe.LangevinAdam([p], **HOT)
    for _ in range(3):
        array = np.ones(50, dtype=np.float32)
        memory = weakref.ref(array)  # dies with the storage
        p.grad = torch.from_numpy(array)
        del array
        optimizer.step()
        optimizer.zero_grad()
        assert memory() is None
    state = weakref.ref(optimizer.state[p]["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())
    p.grad = torch.ones(50)
    optimizer.step()
    gc.collect()
    assert state() is None
    state = weakref.ref(optimizer.state[p]["exp_avg"])
    del optimizer
    gc.collect()
    assert state() is None


def test_parameters_may_share_memory_with_a_flat_buffer(place):
    # FSDP1, FairScale and DeepSpeed keep parameters as views of one buffer.
    flat = torch.cat([p.detach().flatten() for p in parameters(place)])
    views, at = [], 0
    for shape in SHAPES:
        n = torch.Size(shape).numel()
        views.append(flat[at : at + n].view(shape).requires_grad_())
        at += n
    optimizer, expected = fe.LangevinAdam(views, **HOT, backend=place.backend), reference_run(place, 3)
    for i in range(3):
        step(optimizer, i)
    assert same(optimizer, expected)
    assert bits_equal(flat, torch.cat([p.detach().flatten() for p in views]))


def advised(tensor):
    """Whether the kernel was asked for huge pages where the tensor lies: a flag of the mapping, in Linux's smaps."""
    inside = False
    middle = tensor.data_ptr() + tensor.nbytes // 2
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first:
                begin, end = (int(part, 16) for part in first.split("-"))
                inside = begin <= middle < end
            elif inside and first == "VmFlags:":
                return "hg" in line.split()
    return False


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="no transparent huge pages on this system",
)
def test_large_states_lie_on_huge_pages():
    p = torch.zeros(1025, 2049, dtype=torch.bfloat16).t().requires_grad_()
    p.grad = torch.ones_like(p)
    optimizer = fe.LangevinAdam([p], state_dtype=torch.float32, seed=0, backend="cpp")
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[p][key]
        assert state.stride() == p.stride() and state.dtype == torch.float32
        assert (state == state[0, 0]).all()
        assert advised(state)


def test_the_reference_makes_its_states_without_the_library(monkeypatch):
    monkeypatch.setattr(backends, "native_op", None)
    p = torch.zeros(1 << 21).requires_grad_()
    p.grad = torch.ones_like(p)
    fe.LangevinAdam([p], seed=0, backend="reference").step()
    with pytest.raises(TypeError, match="NoneType"):
        fe.LangevinAdam([p], seed=0, backend="cpp").step()
