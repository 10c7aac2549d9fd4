"""inplace_backward: the gradient overwrites the prediction, and nothing that anybody else still needs."""

import pytest
import torch
from free_energy_cases import NAMES, gradients, inputs, same, terms

import fekernels as fe


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_inplace_backward(reduction, backend):
    call = inputs(NAMES.index("gaussian2"), backend)
    wanted = gradients(2 * terms(call, 2, reduction=reduction).free_energy, call)
    prediction = call.params[0].detach().clone().requires_grad_()
    output = prediction.view_as(prediction)  # a producer that does not need its output
    value = fe.free_energy(
        (output, call.params[1]), call.target, *call.latent, likelihood="gaussian", beta=0.7, reduction=reduction,
        inplace_backward=True,
    ).free_energy  # fmt: skip
    got = torch.autograd.grad(2 * value, [prediction, *call.operands[1:]], retain_graph=True)
    assert same(got, wanted)
    if backend.backend != "reference":
        assert got[0].data_ptr() == output.data_ptr()
        with pytest.raises(RuntimeError, match="runs once"):
            torch.autograd.grad(value, prediction)


def test_inplace_backward_is_caught_where_the_output_was_needed(backend):
    if backend.backend == "reference":
        pytest.skip("the reference does not write in place")
    logits = torch.randn(4, 9, device=backend.device, requires_grad=True)
    mean, logvar = (torch.randn(4, 2, device=backend.device) for _ in range(2))
    value = fe.free_energy(
        torch.sigmoid(logits), torch.rand(4, 9, device=backend.device), mean, logvar, inplace_backward=True
    ).free_energy
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_inplace_backward_writes_nothing_without_a_gradient(backend):
    call = inputs(0, backend)
    before = call.params[0].detach().clone()
    version = call.params[0]._version
    with torch.no_grad():
        terms(call, 0, inplace_backward=True)
    call.params[0].requires_grad_(False)
    terms(call, 0, inplace_backward=True)
    assert torch.equal(call.params[0], before) and call.params[0]._version == version


def test_inplace_backward_cannot_be_differentiated(backend):
    if backend.backend == "reference":
        pytest.skip("the reference does not write in place")
    call = inputs(0, backend)
    prediction = call.params[0].view_as(call.params[0])
    value = fe.free_energy(
        prediction, call.target, *call.latent, likelihood="mse", inplace_backward=True
    ).free_energy
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        gradients(value, call, create_graph=True)


def test_inplace_backward_leaves_leaves_alone(backend):
    """An optimizer would step from what the gradient left in its parameter."""
    call = inputs(0, backend)
    before = call.params[0].detach().clone()
    with pytest.raises(
        ValueError, match="params must be the result of an operation with inplace_backward=True"
    ):
        terms(call, 0, inplace_backward=True)
    assert torch.equal(call.params[0], before)


@pytest.mark.parametrize("layout", ["chunk", "slice", "expand", "transposed"])
def test_inplace_backward_overwrites_nobody_else(layout, backend):
    """Predictions that share their memory: two heads of one decoder, a bias for all rows."""
    source = torch.randn(6, 20, device=backend.device, requires_grad=True)
    target, mean = torch.randn(6, 10, device=backend.device), torch.randn(6, 2, device=backend.device)
    view = {
        "chunk": lambda t: t.chunk(2, 1)[1],
        "slice": lambda t: t[:, 3:13],
        "expand": lambda t: t[:1, :10].expand(6, 10),
        "transposed": lambda t: t.flatten()[:60].view(10, 6).mT,
    }[layout]
    results = []
    for inplace in (False, True):
        hidden = source * 1
        before = hidden.detach().clone()
        loss = fe.free_energy(
            view(hidden), target, mean, mean, likelihood="mse", inplace_backward=inplace
        ).free_energy
        results.append(torch.autograd.grad(loss, source)[0])
        assert torch.equal(hidden, before)
    assert same(*[[result] for result in results])
