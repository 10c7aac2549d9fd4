"""Batches of gradients, of is_grads_batched, jacobian(vectorize=True), torch.vmap: those of single ones in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels.ops.free_energy import autograd
from tests.support.public_free_energy import LIKELIHOOD, inputs, terms

BATCH = 3
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}  # of the largest: as `close`, and rounding alone


@pytest.fixture(params=["native", "python"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node of csrc/torch/host, where there is one, and its twin."""
    if request.param == "python":
        monkeypatch.setattr(autograd, "_native", lambda: None)


def assert_batches(outputs: Any, leaves: Any, twice: bool = True) -> None:
    """``twice``: that they can be differentiated again."""
    outputs, leaves = list(outputs), list(leaves)
    # Of one sign: what comes from several terms does not cancel.
    above = [0.5 + torch.rand(BATCH, *out.shape, dtype=out.dtype, device=out.device) for out in outputs]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}

    def single(factors: Any) -> Any:
        return torch.autograd.grad(outputs, leaves, factors, **options)

    every = [single([each[i] for each in above]) for i in range(BATCH)]
    expected = [torch.stack(of_leaf) for of_leaf in zip(*every, strict=True)]
    legacy = torch.autograd.grad(outputs, leaves, above, is_grads_batched=True, **options)
    assert not any(gradient.requires_grad for gradient in legacy)
    results = [legacy, torch.vmap(single)(above)]
    if twice:
        results.append(
            torch.autograd.grad(outputs, leaves, above, is_grads_batched=True, create_graph=True, **options)
        )
    for found in results:
        for got, wanted, leaf in zip(found, expected, leaves, strict=True):
            assert got.dtype == leaf.dtype and got.shape == wanted.shape
            assert (got - wanted).abs().max() <= TOLERANCE[leaf.dtype] * wanted.abs().max()


@LIKELIHOOD
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_free_energy(reduction: str, dtype: torch.dtype, likelihood: int, node: None, backend: Any) -> None:
    """With a mask, a weight and padding, and with none of them, which is the node's."""
    for options in ({"masked": "some", "padded": "some", "weight": "dropped"}, {}):
        call = inputs(likelihood, backend, dtype, (4, 7, 3), **options)
        found = terms(call, likelihood, reduction=reduction)
        assert_batches(found, call.operands)
        assert_batches([found.free_energy], call.operands)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_energy_and_kl(reduction: str, dtype: torch.dtype, node: None, backend: Any) -> None:
    call = inputs(3, backend, dtype, (4, 7, 3))
    energy = fe.energy(call.params[0], call.target, "bernoulli", reduction=reduction)
    assert_batches([energy], call.params)
    assert_batches([fe.gaussian_kl(*call.latent, reduction=reduction)], call.latent)
    if reduction == "none":
        assert_batches([fe.gaussian_kl(*call.latent, reduction="elements")], call.latent)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_options(dtype: torch.dtype, node: None, backend: Any) -> None:
    call = inputs(3, backend, dtype, (4, 7, 3))
    beta = torch.tensor(0.7, dtype=dtype, device=backend.device, requires_grad=True)
    for options in (
        {"free_bits": 0.3},
        {"beta": beta},
        {"reduction": "none", "prior_mean": call.latent[0] / 2},
    ):
        assert_batches(terms(call, 3, **options), [*call.operands, *([beta] if "beta" in options else [])])


def test_a_prediction_that_its_gradient_replaces(node: None, backend: Any) -> None:
    """Its one backward pass may be of a batch, whose gradients have memory of their own."""
    call = inputs(3, backend, shape=(4, 7, 3))
    above = torch.randn(BATCH, device=backend.device)
    kept = terms(call, 3).free_energy
    expected = torch.autograd.grad(kept, call.operands, above, is_grads_batched=True)
    value = fe.free_energy(
        call.params[0] * 1.0,
        call.target,
        *call.latent,
        likelihood="bernoulli",
        beta=0.7,
        inplace_backward=True,
    ).free_energy
    found = torch.autograd.grad(value, call.operands, above, is_grads_batched=True)
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))


def test_functions_of_torch(node: None, backend: Any) -> None:
    call = inputs(3, backend, shape=(4, 7, 3))
    functions: list[Callable[..., Tensor]] = [
        lambda p, m, v: fe.free_energy(p, call.target, m, v, likelihood="bernoulli").free_energy,
        lambda p, m, v: (
            fe.free_energy(p, call.target, m, v, likelihood="bernoulli", reduction="none").free_energy
        ),
    ]
    operands = tuple(operand.detach() for operand in call.operands)
    for function in functions:
        expected = torch.autograd.functional.jacobian(function, operands)
        by_rows = torch.autograd.functional.jacobian(function, operands, vectorize=True)
        by_transform = torch.func.jacrev(function, (0, 1, 2))(*operands)
        for wanted, *found in zip(expected, by_rows, by_transform, strict=True):
            for got in found:
                assert (got - wanted).abs().max() <= TOLERANCE[torch.float32] * wanted.abs().max()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_operators(reduction: str, backend: Any) -> None:
    """What torch.compile sees, called by hand."""
    call = inputs(3, backend, shape=(4, 7, 3))
    operator = torch.ops.fekernels.free_energy
    energy, kl, _ = operator(
        call.params, call.target, None, call.latent, None, "bernoulli", reduction, 7, None
    )
    assert_batches([energy, kl], call.operands, twice=False)
    kl = torch.ops.fekernels.gaussian_kl(*call.latent, None, None, reduction)
    assert_batches([kl], call.latent, twice=False)
    z = torch.ops.fekernels.reparameterize(*call.latent, 0, 0, 0, 0, 2)
    assert_batches([z], call.latent, twice=False)
