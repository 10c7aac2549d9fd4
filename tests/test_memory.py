"""The gate of the kernels: what may be read by its address, and the values of what may not."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from fekernels.ops._memory import has_plain_memory, in_plain_memory


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
