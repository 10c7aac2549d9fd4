"""The free energy's native node does in autograd's graph what a function in Python does there."""

from __future__ import annotations

import contextlib
import gc
import signal
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
from fekernels.ops.free_energy import autograd

MODES = ("native", "python")


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    if backends.choose("cpu") != "cpp":
        pytest.skip("the node is the C++ kernels'")
    if host.unavailable_reason() is not None:
        pytest.skip(f"no native module: {host.unavailable_reason()}")
    found = autograd._native

    def choose(mode: str) -> None:
        monkeypatch.setattr(autograd, "_native", found if mode == "native" else lambda: None)

    return choose


def operands() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(7, 9, generator=generator)
    shapes = ((7, 9), (7, 4), (7, 4))
    return target, *(torch.randn(s, generator=generator).requires_grad_() for s in shapes)


def loss(given: tuple[Tensor, ...], **options: Any) -> fe.FreeEnergyTerms:
    target, prediction, mean, logvar = given
    return fe.free_energy(prediction, target, mean, logvar, likelihood="bernoulli", **options)


def of_both(native: Callable[[str], None], function: Callable[[tuple[Tensor, ...]], Any]) -> list[Any]:
    results = []
    for mode in MODES:
        native(mode)
        results.append(function(operands()))
    return results


def test_it_is_taken() -> None:
    terms = loss(operands())
    assert {term.grad_fn.name() for term in terms} == {"FreeEnergyBackward"}
    assert [edge.name() for edge, _ in terms.kl.grad_fn.next_functions] == [
        "torch::autograd::AccumulateGrad"
    ] * 3
    assert not loss(tuple(t.detach() for t in operands())).kl.requires_grad


def test_factors_of_the_terms(native: Callable[[str], None]) -> None:
    def gradients(given: tuple[Tensor, ...]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for factors in ((1, 0, 0), (0.3, 0, 0), (0, 2, 0), (0, 0, 2), (0, 1, 1), (0.1, 0.2, 0.3), (1, 1, 1)):
            terms = loss(given, beta=0.7)
            total = sum(f * term for f, term in zip(factors, terms, strict=True) if f)
            found += torch.autograd.grad(total, given[1:], allow_unused=True)
        return found

    ours, pythons = of_both(native, gradients)
    for a, b in zip(ours, pythons, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert any(a is None for a in ours)


@pytest.mark.parametrize("mode", MODES)
def test_a_second_backward_needs_what_the_first_kept(mode: str, native: Callable[[str], None]) -> None:
    native(mode)
    given = operands()
    term = loss(given).free_energy
    first = torch.autograd.grad(term, given[1:], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # the receiver owns it
    again = torch.autograd.grad(term, given[1:])
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(term, given[1:])


@pytest.mark.parametrize("mode", MODES)
def test_an_operand_that_was_written_since_is_found(mode: str, native: Callable[[str], None]) -> None:
    native(mode)
    target, prediction, mean, logvar = operands()
    hidden = prediction * 1.0
    term = loss((target, hidden, mean, logvar)).free_energy
    hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(term, [prediction], create_graph=True)


@pytest.mark.parametrize("mode", MODES)
def test_saved_tensors_go_through_hooks(mode: str, native: Callable[[str], None]) -> None:
    native(mode)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    given = operands()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        term = loss(given).free_energy
    assert [p.shape for p in packed[:3]] == [operand.shape for operand in given[1:]]
    assert packed[3].shape == given[0].shape
    torch.autograd.grad(term, given[1:], create_graph=True)


def test_errors_in_python_come_back(native: Callable[[str], None]) -> None:
    def fail(tensor: Tensor) -> Tensor:
        raise ValueError("not to be had")

    given = operands()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, fail):
        term = loss(given).free_energy
    with pytest.raises((ValueError, RuntimeError), match="not to be had"):
        torch.autograd.grad(term, given[1:], create_graph=True)


def test_an_error_of_what_is_left_to_python_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("no such gradient")

    given = operands()
    term = loss(given).free_energy
    monkeypatch.setattr(autograd, "_gradients", fail)
    with pytest.raises(RuntimeError, match="LookupError: no such gradient"):
        torch.autograd.grad(term, given[1:], create_graph=True)
    torch.autograd.grad(loss(given).free_energy, given[1:])


def test_an_interrupt_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    given = operands()
    term = loss(given).free_energy
    monkeypatch.setattr(autograd, "_gradients", interrupt)
    seen = False
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with contextlib.suppress(RuntimeError):  # what PyTorch makes of it
            torch.autograd.grad(term, given[1:], create_graph=True)
        for _ in range(1000):
            pass
    except KeyboardInterrupt:
        seen = True
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen


def test_gradients_of_gradients(native: Callable[[str], None]) -> None:
    def second(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(loss(given).free_energy, given[1:], create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), given[1:])

    ours, pythons = of_both(native, second)
    assert all(torch.equal(a, b) for a, b in zip(ours, pythons, strict=True))


def test_under_a_checkpoint_and_in_threads(native: Callable[[str], None]) -> None:
    def gradients(given: tuple[Tensor, ...]) -> list[Tensor]:
        value = checkpoint(lambda *each: loss((given[0], *each)).free_energy, *given[1:], use_reentrant=False)
        found = list(torch.autograd.grad(value, given[1:]))
        term = loss(given).free_energy
        thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(term, given[1:])))
        thread.start()
        thread.join()
        return found

    ours, pythons = of_both(native, gradients)
    assert len(ours) == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, pythons, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_behind(mode: str, native: Callable[[str], None]) -> None:
    native(mode)
    given = operands()
    hidden = given[1] * 1.0
    seen = weakref.ref(hidden)
    terms = loss((given[0], hidden, *given[2:]))
    del hidden
    gc.collect()
    assert seen() is not None
    terms.free_energy.backward()
    gc.collect()
    assert seen() is None


def test_anomalies_name_it() -> None:
    given = operands()
    with torch.no_grad():
        given[1][0, 0] = float("nan")
    with pytest.warns(UserWarning, match="FreeEnergyBackward"), torch.autograd.detect_anomaly():
        term = loss(given).free_energy
        with pytest.raises(RuntimeError, match="'FreeEnergyBackward' returned nan"):
            term.backward()


def test_a_profiler_sees_it() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        loss(operands()).free_energy.backward()
    names = {event.key for event in seen.key_averages()}
    assert {"fekernels::free_energy", "FreeEnergyBackward"} <= names


def outlived() -> Tensor:
    kept: list[Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(torch.rand(7, 9))
    return kept[0]


def freed() -> Tensor:
    tensor = torch.rand(7, 9)
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED: dict[str, Callable[[], Any]] = {
    "a subclass": lambda: TwoTensor(torch.rand(7, 9), torch.rand(7, 9)),
    "a lazy negation": lambda: torch._neg_view(torch.rand(7, 9)),
    "one of a transform that has ended": outlived,
    "freed memory": freed,
    "zeros that were never written": lambda: torch._efficientzerotensor((7, 9)),
    "sparse": lambda: torch.rand(7, 9).to_sparse(),
    "another dtype": lambda: torch.rand(7, 9).double(),
    "meta": lambda: torch.empty(7, 9, device="meta"),
    "a list": lambda: [[0.0] * 9] * 7,
    "None": lambda: None,
}


@pytest.mark.parametrize("which", REFUSED)
@pytest.mark.parametrize("place", [0, 1])
def test_what_has_no_plain_memory_is_left_to_python(which: str, place: int) -> None:
    given = list(operands())
    given[place] = REFUSED[which]()
    target, prediction, mean, logvar = given
    function = autograd._native()
    assert function is not None
    assert function(prediction, target, mean, logvar, 1, 0, 1.0, True, False) is None


def test_a_target_with_a_gradient_is_left_to_python() -> None:
    target, *others = operands()
    function = autograd._native()
    assert function is not None
    assert function(others[0], target.requires_grad_(), *others[1:], 1, 0, 1.0, True, False) is None
    with pytest.raises(TypeError, match="takes 9 arguments"):
        function(target)


def test_a_backward_pass_that_is_compiled() -> None:
    given = operands()
    expected = torch.autograd.grad(loss(given).free_energy, given[1:])
    term = loss(given).free_energy
    from torch._dynamo import compiled_autograd, config

    with (
        compiled_autograd._enable(lambda graph: graph),
        pytest.raises(RuntimeError, match="free_energy: compiled autograd"),
    ):
        term.backward()
    with config.patch(compiled_autograd=True):
        term = loss(given).free_energy
        with compiled_autograd._enable(torch.compile(backend="eager")):
            term.backward()
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(given[1:], expected, strict=True))
