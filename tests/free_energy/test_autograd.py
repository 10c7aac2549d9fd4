"""Gradients of the free energy's public functions: of every term and every order, accumulated, scaled, forward."""

import pytest
import torch

import fekernels as fe
from fekernels._catalogue.free_energy import LIKELIHOODS
from tests.support.free_energy import CATEGORICAL, NAMES
from tests.support.implementations import Place
from tests.support.public_free_energy import LIKELIHOOD, close, gradients, inputs, same, terms
from tests.support.tensors import UNIT


@LIKELIHOOD
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_of_each_term(likelihood, reduction, backend):
    """Of free energy, energy and KL, alone and together, under factors: as float64's, by plain PyTorch."""
    call = inputs(likelihood, backend, masked="some", padded="some", weight="dropped")
    in_float64 = call.map(lambda t: t.detach().double() if t.dtype.is_floating_point else t)
    for operand in in_float64.operands:
        operand.requires_grad_()
    factors = 0.5 + torch.rand(3, dtype=torch.float64)  # of one sign: nothing cancels
    rows = torch.rand(6, dtype=torch.float64)

    def values(each, weights, which):
        chosen = [terms(each, likelihood, reduction=reduction)[i] for i in which]
        if reduction == "none":
            chosen = [value * weights.to(value) for value in chosen]
        return sum(factors[i].to(value) * value.sum() for i, value in zip(which, chosen, strict=True))

    for which in ((0,), (1,), (2,), (0, 1), (0, 1, 2)):
        got = gradients(values(call, rows, which), call, allow_unused=True, materialize_grads=True)
        wanted = gradients(
            values(in_float64, rows, which), in_float64, allow_unused=True, materialize_grads=True
        )
        assert close(got, wanted), which


@pytest.mark.parametrize("masked", ["", "some"])
def test_gradients_of_gradients_where_a_term_has_none(masked, backend):
    call = inputs(3, backend, masked=masked)
    call.params[0].requires_grad_(False)
    found = terms(call, 3)
    first = torch.autograd.grad(found.energy + 2 * found.kl, call.latent, create_graph=True)
    assert close(first, torch.autograd.grad(2 * found.kl, call.latent, create_graph=True))
    assert all(gradient.requires_grad for gradient in first)
    alone = torch.autograd.grad(found.energy, call.latent, create_graph=True, allow_unused=True)
    assert alone == (None, None)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_runs_again(reduction, backend):
    call = inputs(NAMES.index("bernoulli1"), backend)
    loss = terms(call, 3, reduction=reduction).free_energy.sum() * 3
    first = gradients(loss, call, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # the receiver owns it
    assert same(gradients(loss, call, retain_graph=True), kept)
    assert same(gradients(loss, call), kept)


def test_gradients_accumulate(backend):
    call = inputs(0, backend)
    terms(call, 0).free_energy.backward()
    once = [operand.grad.clone() for operand in call.operands]
    terms(call, 0).free_energy.backward()
    assert same([operand.grad for operand in call.operands], [2 * gradient for gradient in once])


def test_only_some_want_a_gradient(backend):
    call = inputs(2, backend)
    for operand in (call.params[0], call.latent[1]):
        operand.requires_grad_(False)
    terms(call, 2).free_energy.backward()
    assert [operand.grad is None for operand in call.operands] == [True, False, False, True]
    with torch.no_grad():
        assert not terms(call, 2).free_energy.requires_grad


@LIKELIHOOD
def test_second_derivatives(likelihood, backend):
    call = inputs(likelihood, backend, shape=(2, 3, 2))
    in_float64 = call.map(lambda t: t.detach().double() if t.dtype.is_floating_point else t)
    for operand in in_float64.operands:
        operand.requires_grad_()
    results = []
    for each in (call, in_float64):
        first = gradients(terms(each, likelihood).free_energy, each, create_graph=True)
        results.append(
            gradients(sum((g * g).sum() for g in first), each, allow_unused=True, materialize_grads=True)
        )
    assert close(*results)


def test_second_derivatives_where_operands_depend_on_each_other(backend):
    """As in every VAE: z, and with it the prediction, is a function of the mean."""
    weight, target = torch.randn(3, 5, device=backend.device), torch.rand(4, 5, device=backend.device)
    start = torch.randn(4, 3, device=backend.device)
    results = []
    for dtype in (torch.float32, torch.float64):
        mean = start.to(dtype).requires_grad_()
        prediction = torch.tanh(mean @ weight.to(dtype))
        value = fe.free_energy(
            prediction, target.to(dtype), mean, mean / 2, likelihood="bernoulli"
        ).free_energy
        (first,) = torch.autograd.grad(value, mean, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), mean)])
    assert close(*results)


@pytest.mark.parametrize("compiled", [False, True])
def test_float16_gradients_under_a_grad_scaler(compiled, backend):
    """1e-4 / 8192 is far below float16, 65536 times that is not."""
    residual = torch.full((8192, 2), 1e-4, dtype=torch.float16, device=backend.device).requires_grad_()
    zero = torch.zeros(8192, 2, device=backend.device)

    def loss(residual):
        return fe.free_energy(residual, zero, zero, zero, likelihood="mse").free_energy

    torch._dynamo.reset()
    value = (torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss)(residual)
    (gradient,) = torch.autograd.grad(value * 65536, residual)
    assert gradient.dtype == torch.float16
    assert torch.equal(gradient, 2 * residual * 8)  # the residual times powers of two
    # The square is rounded, and so is the mean.
    wanted = 2 * residual[0, 0].double().square()
    torch.testing.assert_close(value.double(), wanted, rtol=2.01 * UNIT, atol=0)


def test_forward_mode(backend):
    call = inputs(3, backend)
    plain, tangent = call.params[0].detach(), torch.randn_like(call.params[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(plain, tangent)
        value = fe.energy(dual, call.target, "bernoulli", reduction="sum")
        got = torch.autograd.forward_ad.unpack_dual(value).tangent
    wanted = gradients(
        fe.energy(call.params[0], call.target, "bernoulli", reduction="sum"), call, allow_unused=True
    )[0]
    products = wanted.double() * tangent.double()  # of either sign, so that they may cancel
    assert (got - products.sum()).abs() <= 2e-6 * products.abs().sum()  # as `close`


@pytest.mark.parametrize(
    "likelihood", [NAMES.index("student_t3"), CATEGORICAL], ids=["student_t", "categorical"]
)
def test_gradcheck(likelihood):
    """The formulas' are in test_reference_formulas.py."""
    call = inputs(likelihood, Place("reference", "cpu"), torch.float64, (2, 3, 2))
    count = len(call.params)

    def function(*operands):
        return tuple(
            fe.free_energy(
                operands[:count],
                call.target,
                *operands[count:],
                likelihood=LIKELIHOODS[likelihood].name,
                beta=0.3,
            )
        )

    assert torch.autograd.gradcheck(function, call.operands)
    assert torch.autograd.gradgradcheck(function, call.operands)
