"""The gate of the kernels: what may be read by its address, and the values of what may not."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fekernels as fe
from fekernels.ops.plain_memory import (
    check_storage,
    has_plain_memory,
    in_plain_memory,
    needed_bytes,
    overlaps_itself,
)
from tests.support.tensors import freed, survives


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


@pytest.mark.parametrize("ahead", [0, 5])
def test_a_view_into_freed_storage_is_refused(ahead):
    """With an offset its address is not null."""
    tensor = freed(torch.ones(3), ahead)
    assert not has_plain_memory(tensor) and (tensor.data_ptr() != 0) == (ahead > 0)
    expected = rf"must hold values; its storage has 0 of the {4 * (ahead + 3)} bytes"

    def refused():
        with pytest.raises(ValueError, match=expected):
            in_plain_memory(tensor)

    assert survives(refused)
    assert has_plain_memory(freed(torch.ones(0), ahead))


def test_what_has_values_or_never_had_memory_passes():
    for make in (*PLAIN.values(), *(make for make, _ in WITH_VALUES.values()), *WITHOUT_VALUES.values()):
        check_storage("it", make())
    short = torch.ones(8)[2:]
    short.untyped_storage().resize_(12)
    with pytest.raises(ValueError, match="it must hold values; its storage has 12 of the 32 bytes needed"):
        check_storage("it", short)


MANY = 4096


def values(*shape):
    return torch.linspace(0.1, 0.9, math.prod(shape)).view(shape)


FREED = {
    "prediction": lambda t: fe.free_energy(
        t(8, 512), torch.rand(8, 512), torch.zeros(8, 2), torch.zeros(8, 2)
    ),
    "prediction that needs a gradient": lambda t: fe.free_energy(
        t(8, 512).requires_grad_(), torch.rand(8, 512), torch.zeros(8, 2), torch.zeros(8, 2)
    ),
    "target": lambda t: fe.free_energy(torch.rand(8, 512), t(8, 512), torch.zeros(8, 2), torch.zeros(8, 2)),
    "mean": lambda t: fe.free_energy(torch.rand(8, 2), torch.rand(8, 2), t(8, 512), torch.zeros(8, 512)),
    "weight": lambda t: fe.free_energy(*4 * [torch.rand(MANY, 1)], weight=t(MANY)),
    "logits": lambda t: fe.energy(t(8, 512), torch.zeros(8, dtype=torch.int64), "categorical"),
    "gaussian_kl": lambda t: fe.gaussian_kl(t(8, 512), torch.zeros(8, 512)),
    "mean of a sample": lambda t: fe.reparameterize(t(8, 512), torch.zeros(8, 512), seed=1),
    "logvar of a sample": lambda t: fe.reparameterize(
        torch.zeros(8, 512, requires_grad=True), t(8, 512), seed=1
    ),
    "particles": lambda t: fe.svgd_direction(t(8, 512), torch.zeros(8, 512)),
    "scores": lambda t: fe.svgd_direction(torch.rand(8, 512), t(8, 512)),
    "kernel_stein_discrepancy": lambda t: fe.kernel_stein_discrepancy(t(8, 512), torch.zeros(8, 512)),
    "median_bandwidth": lambda t: fe.median_bandwidth(t(8, 512)),
    "belief_propagation": lambda t: fe.graph.belief_propagation(
        t(2048, 2), torch.tensor([[0, 1]]), torch.zeros(1, 2, 2)
    ),
    "split_rhat": lambda t: fe.diagnostics.split_rhat(t(4, 16, 64)),
    "effective_sample_size": lambda t: fe.diagnostics.effective_sample_size(t(4, 16, 64)),
    "bits": lambda t: torch.ops.fekernels.philox_bits(t(MANY).view(torch.int32), 1, 0, 0, 0, 4),
    "uniform": lambda t: torch.ops.fekernels.philox_uniform(t(MANY), 1, 0, 0, 0, 4),
    "normal": lambda t: torch.ops.fekernels.philox_normal(t(MANY), 1, 0, 0, 0, 4),
    "variational_kl": lambda t: torch.ops.fekernels.variational_kl(
        t(MANY), torch.ones(MANY), 1.0, 1.0, 1.0, True
    ),
}


@pytest.mark.parametrize("ahead", [0, MANY])
@pytest.mark.parametrize("what", FREED)
def test_no_function_reads_or_writes_freed_memory(what, ahead):
    FREED[what](values)  # what is built at its first use is no fork's to build

    def refused():
        with pytest.raises(ValueError, match="must hold values; its storage has 0 of the"):
            FREED[what](lambda *shape: freed(values(*shape), ahead))

    assert survives(refused)


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
