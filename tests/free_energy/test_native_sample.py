"""The native sample of a Gaussian does in autograd's graph what a function in Python does there."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import fekernels as fe
from fekernels._runtime import backends, host
from fekernels.ops.free_energy import reparameterize as file
from fekernels.ops.noise_key import COUNTERS, LAST_INDEX

KEY = {"seed": 3, "stream": 1, "step": 2, "offset": 5}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    if backends.choose("cpu") != "cpp":
        pytest.skip("it calls the C++ kernels")
    if host.unavailable_reason() is not None:
        pytest.skip(f"no native module: {host.unavailable_reason()}")
    found = file._native

    def choose(on: bool) -> None:
        monkeypatch.setattr(file, "_native", found if on else lambda: None)

    return choose


def pair(rows: int = 7, latents: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    mean, logvar = (torch.randn(rows, latents, generator=generator).requires_grad_() for _ in range(2))
    return mean, logvar


def of_both(native: Callable[[bool], None], function: Callable[[], Any]) -> tuple[Any, Any]:
    results = []
    for on in (True, False):
        native(on)
        results.append(function())
    return results[0], results[1]


def name_of(z: Tensor) -> str:
    return z.grad_fn.name() if z.grad_fn is not None else ""


def test_it_is_taken() -> None:
    z = fe.reparameterize(*pair(), **KEY)
    assert name_of(z) == "ReparameterizeBackward"
    assert [edge.name() for edge, _ in z.grad_fn.next_functions] == ["torch::autograd::AccumulateGrad"] * 2
    with torch.no_grad():
        assert not fe.reparameterize(*pair(), **KEY).requires_grad
    assert not fe.reparameterize(*(t.detach() for t in pair()), **KEY).requires_grad


@pytest.mark.parametrize("samples", [None, 1, 4])
@pytest.mark.parametrize("leaf", [(True, True), (True, False), (False, True)])
def test_the_same_bits(native, samples: int | None, leaf: tuple[bool, bool]) -> None:
    mean, logvar = (t.detach().requires_grad_(need) for t, need in zip(pair(), leaf, strict=True))
    wanted = [t for t in (mean, logvar) if t.requires_grad]

    def results() -> list[Tensor]:
        z = fe.reparameterize(mean, logvar, samples=samples, **KEY)
        above = torch.linspace(-1, 2, z.numel()).view_as(z)
        return [z, *torch.autograd.grad(z, wanted, above)]

    ours, pythons = of_both(native, results)
    assert ours[0].shape == (mean.shape if samples is None else (samples, *mean.shape))
    for a, b in zip(ours, pythons, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


def test_gradients_that_no_kernel_takes(native) -> None:
    """Of gradients, of a batch of them, without memory of their own, in 64 bits."""
    mean, logvar = pair()

    def results() -> list[Tensor]:
        z = fe.reparameterize(mean, logvar, samples=2, **KEY)
        first = torch.autograd.grad((z**3).sum(), (mean, logvar), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (mean, logvar), retain_graph=True)
        rows = torch.autograd.grad(
            z, (mean, logvar), torch.eye(z.numel()).view(-1, *z.shape), True, is_grads_batched=True
        )
        expanded = torch.autograd.grad(z.sum(), (mean, logvar), retain_graph=True)
        negative = torch.imag(torch.complex(torch.zeros(()), torch.ones(())).conj()).expand_as(z)
        strided = torch.autograd.grad(z, (mean, logvar), negative)
        return [*first, *second, *rows, *expanded, *strided]

    ours, pythons = of_both(native, results)
    for a, b in zip(ours, pythons, strict=True):
        assert torch.equal(a, b)


def test_what_it_leaves_to_python() -> None:
    mean, logvar = pair()
    for left in (
        (mean[:, ::2], logvar[:, ::2]),
        (mean.double(), logvar.double()),
        (mean.bfloat16(), logvar.bfloat16()),
        (mean.view(7, 3, 1), logvar.view(7, 3, 1)),
        (mean[:0], logvar[:0]),
        (TwoTensor(mean.detach(), mean.detach()), TwoTensor(logvar.detach(), logvar.detach())),
    ):
        z = fe.reparameterize(*left, **KEY)
        assert name_of(z) != "ReparameterizeBackward" and z.shape == left[0].shape
    assert torch.equal(
        fe.reparameterize(mean, logvar, seed=2**64 - 1), fe.reparameterize(mean, logvar, seed=-1)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 1 << 64}, {"seed": 1.0}, {"step": -1}, {"step": COUNTERS}, {"stream": COUNTERS},
        {"stream": COUNTERS - 1, "samples": 2}, {"offset": LAST_INDEX // 3 - 6}, {"offset": -1}, {"samples": -1},
        {"samples": 1 << 31}, {"samples": True}, {"step": True}, {"offset": "first"},
    ],
)  # fmt: skip
def test_the_same_errors(native, wrong: dict[str, Any]) -> None:
    def message() -> tuple[type, str]:
        with pytest.raises((TypeError, ValueError)) as caught:
            fe.reparameterize(*pair(), **{**KEY, **wrong})
        return caught.type, str(caught.value)

    ours, pythons = of_both(native, message)
    assert ours == pythons
    assert next(iter(wrong)) in ours[1]


def test_the_last_numbers_are_taken() -> None:
    last = {"step": COUNTERS - 1, "stream": COUNTERS - 2, "offset": LAST_INDEX // 3 - 7, "samples": 2}
    assert name_of(fe.reparameterize(*pair(), seed=2**63 - 1, **last)) == "ReparameterizeBackward"


def test_a_logvar_that_was_written_is_noticed() -> None:
    mean, logvar = pair()
    scale = logvar * 1.0
    z = fe.reparameterize(mean, scale, **KEY)
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_a_second_pass_needs_the_graph_and_the_graph_is_freed() -> None:
    mean, logvar = pair()
    z = fe.reparameterize(mean, logvar, **KEY)
    once = torch.autograd.grad(z.sum(), (mean, logvar), retain_graph=True)
    again = torch.autograd.grad(z.sum(), (mean, logvar))
    assert all(map(torch.equal, once, again))
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()
    gone = weakref.ref(z)
    del z
    gc.collect()
    assert gone() is None


def test_checkpoints_and_hooks(native) -> None:
    def results() -> list[Tensor]:
        mean, logvar = pair()
        z = checkpoint(lambda m, v: fe.reparameterize(m * 2, v, **KEY), mean, logvar, use_reentrant=False)
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            other = fe.reparameterize(mean, logvar, **KEY)
        assert packed and all(torch.equal(t, logvar) for t in packed)
        return list(torch.autograd.grad((z + other).square().sum(), (mean, logvar)))

    ours, pythons = of_both(native, results)
    assert all(map(torch.equal, ours, pythons))


def test_threads() -> None:
    """A backward pass in each, of one graph."""
    mean, logvar = pair(64, 32)
    z = fe.reparameterize(mean, logvar, **KEY)
    expected = torch.autograd.grad(z.sum(), (mean, logvar), retain_graph=True)
    found: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(torch.autograd.grad(z.sum(), (mean, logvar), retain_graph=True))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for gradients in found:
        assert all(map(torch.equal, gradients, expected))
