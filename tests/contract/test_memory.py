"""The gate of the kernels: what may be read by its address, and the values of what may not."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from fekernels.ops.plain_memory import has_plain_memory, in_plain_memory, needed_bytes, overlaps_itself


class Labelled(torch.Tensor):
    """Has memory of its own: only its functions are overridden."""


def negated():
    return torch.complex(torch.zeros(3), torch.arange(3.0)).conj().imag


def fake():
    with FakeTensorMode():
        return torch.zeros(3)


PLAIN = {
    "tensor": lambda: torch.arange(3.0),
    "parameter": lambda: torch.nn.Parameter(torch.arange(3.0)),
    "buffer": lambda: torch.nn.Buffer(torch.arange(3.0)),
    "view": lambda: torch.arange(6.0)[::2],
    "subclass": lambda: torch.arange(3.0).as_subclass(Labelled),
    "empty": lambda: torch.zeros(0),
    "resolved": lambda: negated().resolve_neg(),
}
WITH_VALUES = {
    "wrapper": (lambda: TwoTensor(torch.ones(3), torch.ones(3)), torch.ones(3)),
    "wrapped parameter": (lambda: torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3))), torch.ones(3)),
    "negated": (negated, -torch.arange(3.0)),
    "expanded and negated": (lambda: negated()[1:2].expand(3), -torch.ones(3)),
    "conjugated": (lambda: torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
    "unwritten zeros": (lambda: torch._efficientzerotensor(3), torch.zeros(3)),
}
WITHOUT_VALUES = {
    "meta": lambda: torch.zeros(3, device="meta"),
    "fake": fake,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.zeros(3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "empty on meta": lambda: torch.zeros(0, device="meta"),
}


@pytest.mark.parametrize("what", PLAIN)
def test_plain_tensors_are_taken_as_they_are(what):
    tensor = PLAIN[what]()
    assert has_plain_memory(tensor) and in_plain_memory(tensor) is tensor


@pytest.mark.parametrize("what", WITH_VALUES)
def test_others_are_copied_by_operators(what):
    make, values = WITH_VALUES[what]
    tensor = make()
    assert not has_plain_memory(tensor)
    copy = in_plain_memory(tensor)
    assert type(copy) is torch.Tensor and has_plain_memory(copy)
    assert torch.equal(copy, values) and not copy.requires_grad


@pytest.mark.parametrize("what", WITHOUT_VALUES)
def test_what_has_no_strided_memory_is_never_plain(what):
    assert not has_plain_memory(WITHOUT_VALUES[what]())


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_tensors_of_transforms_are_not_plain_and_stay_so(transform):
    seen = []

    def function(x):
        seen.append((x, has_plain_memory(x)))
        return x * 2

    transform(function)(torch.ones(3))
    ((tensor, inside),) = seen
    assert not inside and not has_plain_memory(tensor)


@pytest.mark.parametrize(
    ("shape", "strides", "shared"),
    [
        ((4,), (0,), True),
        ((1,), (0,), False),
        ((3, 4), (0, 1), True),
        ((3, 4), (1, 3), False),
        ((3, 4), (4, 0), True),
        ((3, 3), (1, 1), True),  # a Hankel matrix
        ((2, 3), (3, 2), False),  # woven, yet each element has its place: 0 2 4, 3 5 7
        ((2, 3), (2, 2), True),
        ((5, 2), (2, 4), True),
        ((0, 4), (0, 0), False),
        ((), (), False),
        ((3, 1, 2), (10, 0, 2), False),
    ],
)
def test_elements_that_share_an_address(shape, strides, shared):
    assert overlaps_itself(torch.zeros(64).as_strided(shape, strides, 3)) is shared


def test_the_bytes_that_a_view_needs_of_its_storage():
    base = torch.zeros(10, 4, dtype=torch.float64)
    assert needed_bytes(base) == needed_bytes(base.t()) == base.untyped_storage().nbytes()
    assert needed_bytes(base[2:3, 1]) == 8 * 10 and needed_bytes(base[:0]) == 0
