"""What anybody may do to a parameter group between two steps, and whether its pointer table is right afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import fekernels as fe

Change = Callable[[Any, list[Tensor]], Any]
CHANGES: dict[str, tuple[bool, Change]] = {}


def change(accepted: bool) -> Callable[[Change], Change]:
    def add(function: Change) -> Change:
        CHANGES[function.__name__] = (accepted, function)
        return function

    return add


def state(optimizer: Any, i: int = 0) -> dict[str, Any]:
    return optimizer.state[optimizer.param_groups[0]["params"][optimizer.first + i]]


class Ones(torch.nn.Parameter):
    """A parameter that makes its gradient when it is asked for it."""

    @property
    def grad(self):  # type: ignore[override]
        return torch.ones(self.shape)


SHAPES = [(6, 4), (5, 3), (24,), (0, 3), (4, 1), (2,)]


def stepped(before: int = 0, after: int = 0) -> tuple[Any, list[Tensor]]:
    """An optimizer that has made a step, and those of its parameters that changes are made of.

    The last of them has no gradient. Of others there are so many before and after.
    """
    torch.manual_seed(0)
    every = [torch.nn.Parameter(torch.randn(s)) for s in [*before * [(3, 2)], *SHAPES, *after * [(7,)]]]
    params = every[before : before + len(SHAPES)]
    params[1].data = params[1].data.t().contiguous().t()
    for p in every:
        p.grad = torch.randn_like(p)
    params[5].grad = None
    optimizer: Any = fe.LangevinAdam(every, lr=1e-3, temperature=1e-3, seed=0, backend="cpp", amsgrad=True)
    optimizer.first = before
    optimizer.step()
    return optimizer, params


@change(True)
def nothing(o, p): ...


@change(True)
def new_gradients(o, p):
    for q in p[:5]:
        q.grad = torch.randn_like(q)


@change(True)
def a_gradient_in_place(o, p):
    p[0].grad.mul_(2)


@change(True)
def a_gradient_of_an_inference_tensor(o, p):
    with torch.inference_mode():
        p[0].grad = torch.randn_like(p[0])


@change(True)
def a_gradient_that_is_a_view(o, p):
    p[2].grad = torch.randn(48)[24:]


@change(True)
def a_gradient_with_a_graph(o, p):
    p[0].grad = torch.randn_like(p[0]).requires_grad_() * 2


@change(True)
def a_stride_of_one_element(o, p):
    p[4].grad = torch.randn(4, 1).as_strided((4, 1), (1, 7))


@change(True)
def values_of_a_parameter(o, p):
    p[0].data.zero_()


@change(True)
def values_of_a_state(o, p):
    state(o)["exp_avg"].zero_()


@change(True)
def a_view_as_data_of_the_same_memory(o, p):
    p[0].data = p[0].data.view(6, 4)


@change(True)
def hyperparameters(o, p):
    o.param_groups[0].update(lr=0.5, temperature=0.0)


@change(True)
def parameters_in_a_tuple(o, p):
    o.param_groups[0]["params"] = tuple(o.param_groups[0]["params"])


@change(True)
def parameters_in_a_container(o, p):
    o.param_groups[0]["params"] = torch.nn.ParameterList(o.param_groups[0]["params"])


@change(True)
def a_lazy_clone_of_a_gradient(o, p):  # which is only read
    o.twin = torch._lazy_clone(p[0].grad)


@change(True)
def a_lazy_clone_that_is_gone(o, p):
    torch._lazy_clone(p[0].detach())
    torch._lazy_clone(state(o)["exp_avg"])


@change(False)
def a_lazy_clone_of_a_parameter(o, p):
    o.twin = torch._lazy_clone(p[0].detach())


@change(False)
def a_lazy_clone_of_a_state(o, p):
    o.twin = torch._lazy_clone(state(o)["exp_avg"])


@change(False)
def a_lazy_clone_of_a_step_counter(o, p):
    o.twin = torch._lazy_clone(state(o)["step"])


@change(False)
def a_lazy_clone_that_the_user_wrote(o, p):  # to the parameter, which has then moved
    o.twin = torch._lazy_clone(p[0].detach())
    p[0].data.add_(1)


@change(False)
def a_class_with_a_gradient_of_its_own(o, p):
    p[2].__class__ = Ones


@change(False)
def a_class_of_a_parameter_without_a_gradient(o, p):
    p[5].__class__ = Ones


@change(False)
def a_gradient_goes(o, p):
    p[0].grad = None


@change(False)
def a_gradient_comes(o, p):
    p[5].grad = torch.ones_like(p[5])


@change(False)
def one_comes_and_one_goes(o, p):
    p[4].grad, p[5].grad = None, torch.ones_like(p[5])


@change(False)
def a_transposed_gradient(o, p):
    p[0].grad = torch.randn(4, 6).t()


@change(False)
def a_gradient_that_is_contiguous_where_its_parameter_is_not(o, p):
    p[1].grad = torch.randn(5, 3).contiguous()


@change(False)
def a_gradient_with_gaps(o, p):
    p[2].grad = torch.randn(48)[::2]


@change(False)
def a_broadcast_gradient(o, p):
    p[2].grad = torch.ones(1).expand(24)


@change(False)
def a_negated_gradient(o, p):
    p[2].grad = torch.randn(24, dtype=torch.complex64).conj().imag


@change(False)
def a_negated_gradient_without_gaps(o, p):
    p[2].grad = torch._neg_view(torch.randn(24))


@change(False)
def a_gradient_of_zeros_without_memory(o, p):
    p[2].grad = torch._efficientzerotensor(24)


@change(False)
def a_gradient_of_another_class(o, p):
    p[0].grad = TwoTensor(torch.randn_like(p[0]), torch.randn_like(p[0]))


@change(False)
def another_dtype_of_a_gradient(o, p):
    p[2].grad.data = torch.randn(24, dtype=torch.float64)


@change(False)
def a_smaller_gradient(o, p):
    p[2].grad.data = torch.randn(23)


@change(False)
def a_larger_gradient(o, p):
    p[2].grad.data = torch.randn(25)


@change(False)
def another_shape_of_a_gradient(o, p):
    p[0].grad.data = torch.randn(4, 6)


@change(False)
def a_gradient_without_its_memory(o, p):
    p[0].grad.untyped_storage().resize_(0)


def lost(*shape: int) -> Tensor:
    """A view into freed memory: its address is its offset, not null."""
    memory = torch.randn(48)
    view = memory[24:].view(shape)
    memory.untyped_storage().resize_(0)
    return view


@change(False)
def a_gradient_that_is_a_view_without_its_memory(o, p):
    p[0].grad = lost(6, 4)


@change(False)
def a_parameter_that_is_a_view_without_its_memory(o, p):
    p[0].data = lost(6, 4)


@change(False)
def a_state_that_is_a_view_without_its_memory(o, p):
    state(o)["exp_avg"].data = lost(6, 4)


@change(False)
def other_data_of_a_parameter(o, p):
    p[0].data = p[0].data.clone()


@change(False)
def data_of_another_dtype(o, p):
    p[0].grad = None
    p[0].data = p[0].data.double()
    p[0].grad = torch.randn_like(p[0])


@change(False)
def data_transposed_where_it_lies(o, p):
    p[0].grad = None
    p[0].data = p[0].data.as_strided((4, 6), (1, 4))
    p[0].grad = torch.randn_like(p[0])


@change(False)
def data_of_another_shape_where_it_lies(o, p):
    p[0].grad = None
    p[0].data = p[0].data.view(4, 6)
    p[0].grad = torch.randn_like(p[0])


@change(False)
def less_data_where_it_lies(o, p):
    p[2].grad = None
    p[2].data = p[2].data[:20]
    p[2].grad = torch.randn_like(p[2])


@change(False)
def a_parameter_without_its_memory(o, p):
    p[0].data.untyped_storage().resize_(0)


@change(False)
def another_parameter(o, p):
    q = torch.nn.Parameter(p[0].detach().clone())
    q.grad = torch.randn_like(q)
    o.param_groups[0]["params"][o.first] = q


@change(False)
def parameters_in_another_order(o, p):
    q, i = o.param_groups[0]["params"], o.first
    q[i], q[i + 2] = q[i + 2], q[i]


@change(False)
def one_parameter_less(o, p):
    o.param_groups[0]["params"].pop()


@change(False)
def one_parameter_more(o, p):
    o.param_groups[0]["params"].append(torch.nn.Parameter(torch.randn(3)))


@change(False)
def another_state(o, p):
    state(o)["exp_avg"] = state(o)["exp_avg"].clone()


@change(False)
def a_state_that_is_none(o, p):
    state(o)["exp_avg"] = None


@change(False)
def a_state_that_is_gone(o, p):
    del state(o)["max_exp_avg_sq"]


@change(False)
def the_last_state_is_gone(o, p):
    state(o, 4).popitem()


@change(False)
def a_further_state(o, p):
    state(o)["mine"] = 1


@change(False)
def a_state_of_another_name(o, p):
    state(o)["v"] = state(o).pop("max_exp_avg_sq")


@change(False)
def two_states_of_each_others_names(o, p):
    names = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
    old = dict(state(o))
    state(o).clear()
    state(o).update({names.get(key, key): value for key, value in old.items()})


@change(False)
def a_state_that_went_to_the_next_parameter(o, p):
    key, value = state(o).popitem()
    old = dict(state(o, 1))
    state(o, 1).clear()
    old.pop(key)
    state(o, 1).update({key: value, **old})


@change(False)
def other_data_of_a_state(o, p):
    state(o)["exp_avg"].data = state(o)["exp_avg"].data.clone()


@change(False)
def another_dtype_of_a_state(o, p):
    state(o)["exp_avg"].data = state(o)["exp_avg"].data.double()


@change(False)
def a_state_transposed_where_it_lies(o, p):
    state(o)["exp_avg"].data = state(o)["exp_avg"].data.as_strided((4, 6), (1, 4))


@change(False)
def a_smaller_state_where_it_lies(o, p):
    state(o, 2)["exp_avg_sq"].data = state(o, 2)["exp_avg_sq"].data[:20]


@change(False)
def another_dtype_of_a_state_where_it_lies(o, p):
    state(o, 2)["exp_avg_sq"].data = state(o, 2)["exp_avg_sq"].data.view(torch.float64)


@change(False)
def a_state_without_its_memory(o, p):
    state(o)["exp_avg"].untyped_storage().resize_(0)


@change(False)
def another_step_counter(o, p):
    state(o)["step"] = torch.tensor(5.0)


@change(False)
def the_states_of_another_parameter(o, p):
    o.state[p[0]] = dict(o.state[p[0]])


@change(False)
def no_states(o, p):
    o.state.clear()
