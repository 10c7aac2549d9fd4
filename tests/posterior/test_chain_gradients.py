"""Gradients of chains called one by one: `torch.stack`'s, in memory that is used again only when it is free."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


class Network(nn.Module):
    """One use of a linear layer's weight or several, by ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(3, 3, bias=how != "without bias")
        self.words = nn.Embedding(4, 3)
        self.last = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in three dimensions":
            x = x.view(2, 2, 3)
        if self.how == "one row":
            x = x[0]
        if self.how == "beside another use":
            x = x + self.words(torch.tensor([3, 1, 1, 0])) + self.first.weight.sum()
        if self.how == "in bfloat16":
            with torch.autocast("cpu", torch.bfloat16):
                return self.last(self.first(x).tanh()).float()
        if self.how == "by keywords":
            hidden = F.linear(input=x, weight=self.first.weight, bias=self.first.bias)
        elif self.how == "recomputed":
            hidden = checkpoint(self.first, x, use_reentrant=False)
        else:
            hidden = self.first(x)
        if self.how == "twice":
            hidden = self.first(hidden.tanh())
        weight = self.words.weight if self.how == "beside another use" else self.last.weight
        return F.linear(hidden.tanh(), weight, self.last.bias)


HOWS = (
    *("plainly", "without bias", "in three dimensions", "one row", "twice", "beside another use"),
    *("in bfloat16", "by keywords", "recomputed"),
)


@pytest.mark.parametrize("how", HOWS)
def test_weights_of_linear_layers_get_their_gradients_however_they_are_used(how: str) -> None:
    torch.manual_seed(0)
    chains = fe.Chains(Network(how), 3, jitter=0.3, vectorize=False)
    for _ in range(3):  # the first writes to new memory, the others to the memory of the one before
        for p in chains.parameters():
            p.grad = None
        rows = torch.randn(4, 3)
        losses(chains, rows).sum().backward()
        each = []
        for state in chains.states():
            model = chains.model()
            model.load_state_dict(state)
            (model(rows) ** 2).mean().backward()
            each.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
        for p, *parts in zip(chains.parameters(), *each, strict=True):
            own = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(own, torch.stack(parts), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["plainly", "in three dimensions"])
def test_gradients_of_linear_layers_are_made_in_their_place(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []
    put = chain_gradients._Slices.put

    def watched(self: chain_gradients._Slices, k: int, part: Tensor) -> Tensor | None:
        found = put(self, k, part)
        if found is not None:
            copied.append(self.name)
        return found

    monkeypatch.setattr(chain_gradients._Slices, "put", watched)
    chains = fe.Chains(Network(how), 3, vectorize=False)
    losses(chains, torch.randn(4, 3)).sum().backward()
    assert set(copied) == {"first.bias", "last.bias"}


def test_batches_of_gradients() -> None:
    chains, rows = made(), torch.randn(4, 3)
    found = losses(chains, rows)
    parameters = list(chains.parameters())
    together = torch.autograd.grad(found, parameters, torch.eye(3), is_grads_batched=True)
    for k, whole in enumerate(expected(chains, rows)[0]):
        torch.testing.assert_close(together[0][k, k], whole)
        assert not together[0][k, k - 1].any()
