"""Gradients of chains called one by one: `torch.stack`'s, in memory that is used again only when it is free."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.posterior import chain_gradients


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_gradients, "SMALL", 1)


def made() -> fe.Chains:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return fe.Chains(model, 3, jitter=0.3, vectorize=False)


def losses(chains: fe.Chains, rows: Tensor) -> Tensor:
    return chains.losses(lambda model, x: (model(x) ** 2).mean(), rows)


def gradients(chains: fe.Chains) -> list[Tensor]:
    found = [p.grad for p in chains.parameters()]
    assert all(g is not None and g.is_contiguous() for g in found)
    return [g for g in found if g is not None]


def expected(chains: fe.Chains, rows: Tensor) -> list[Tensor]:
    """What autograd gives for each chain as a network of its own."""
    each = []
    for state in chains.states():
        model = chains.model()
        model.load_state_dict(state)
        (model(rows) ** 2).mean().backward()
        each.append([p.grad for p in model.parameters()])
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def test_memory_is_used_again_when_the_gradients_are_gone() -> None:
    chains, rows = made(), torch.randn(4, 3)
    losses(chains, rows).sum().backward()
    places = [g.data_ptr() for g in gradients(chains)]
    for _ in range(2):
        for p in chains.parameters():
            p.grad = None
        rows = torch.randn(4, 3)
        losses(chains, rows).sum().backward()
        assert [g.data_ptr() for g in gradients(chains)] == places
        torch.testing.assert_close(gradients(chains), expected(chains, rows), rtol=0, atol=0)


@pytest.mark.parametrize("held", ["tensor", "view", "numpy"])
def test_memory_that_somebody_holds_is_not_written(held: str) -> None:
    chains, rows = made(), torch.randn(4, 3)
    losses(chains, rows).sum().backward()
    kept: list = gradients(chains)
    if held == "view":
        kept = [g[1:] for g in kept]
    elif held == "numpy":
        kept = [g.numpy() for g in kept]
    before = copy.deepcopy(kept)
    for p in chains.parameters():
        p.grad = None
    losses(chains, torch.randn(4, 3)).sum().backward()
    assert all((own == first).all() for own, first in zip(kept, before, strict=True))


def test_gradients_add_up_over_losses_and_over_passes_of_one_graph() -> None:
    chains, rows = made(), torch.randn(4, 3)
    other = torch.randn(6, 3)
    losses(chains, rows).sum().backward()
    both = losses(chains, other).sum()
    both.backward(retain_graph=True)
    both.backward()
    sums = [a + b + b for a, b in zip(expected(chains, rows), expected(chains, other), strict=True)]
    torch.testing.assert_close(gradients(chains), sums)


def test_two_losses_in_one_pass() -> None:
    chains, rows, other = made(), torch.randn(4, 3), torch.randn(6, 3)
    (losses(chains, rows) + 2 * losses(chains, other)).sum().backward()
    sums = [a + 2 * b for a, b in zip(expected(chains, rows), expected(chains, other), strict=True)]
    torch.testing.assert_close(gradients(chains), sums)


def test_chains_without_a_gradient_get_zeros() -> None:
    chains, rows = made(), torch.randn(4, 3)
    losses(chains, rows)[1].backward()
    for own, whole in zip(gradients(chains), expected(chains, rows), strict=True):
        assert torch.equal(own[1], whole[1])
        assert not own[0].any()
        assert not own[2].any()


def test_gradients_of_gradients() -> None:
    chains, rows = made(), torch.randn(4, 3, dtype=torch.float64)
    chains._model.double()
    for p in chains.parameters():
        p.data = p.data.double()
    weight = next(chains.parameters())

    def squared(value: Tensor) -> Tensor:
        weight.data.copy_(value)
        first = torch.autograd.grad(losses(chains, rows).sum(), list(chains.parameters()), create_graph=True)
        return sum((g**2).sum() for g in first)  # type: ignore[return-value]

    start = weight.detach().clone()
    (second,) = torch.autograd.grad(squared(start), [weight])
    direction, h = torch.randn_like(start), 1e-6
    slope = (squared(start + h * direction) - squared(start - h * direction)) / (2 * h)
    torch.testing.assert_close((second * direction).sum(), slope.detach(), rtol=1e-6, atol=1e-9)


def test_a_copy_of_chains_has_memory_of_its_own() -> None:
    chains, rows = made(), torch.randn(4, 3)
    losses(chains, rows).sum().backward()
    others = copy.deepcopy(chains)
    for p in others.parameters():
        p.grad = None
    before = [g.clone() for g in gradients(chains)]
    losses(others, torch.randn(4, 3)).sum().backward()
    first = chains.first(2)
    losses(first, torch.randn(4, 3)).sum().backward()
    torch.testing.assert_close(gradients(chains), before, rtol=0, atol=0)
