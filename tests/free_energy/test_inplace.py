"""inplace_backward: the gradient overwrites the prediction, and nothing that anybody else still needs."""

import pytest
import torch

import fekernels as fe
from tests.support.free_energy import NAMES
from tests.support.public_free_energy import gradients, inputs, same, terms


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_inplace_backward(reduction, backend):
    call = inputs(NAMES.index("gaussian2"), backend)
    wanted = gradients(2 * terms(call, 2, reduction=reduction).free_energy, call)
    prediction = call.params[0].detach().clone().requires_grad_()
    # A producer that does not need its output and has nothing to compute.
    output = torch.ops.aten._unsafe_view(prediction, prediction.shape)
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
    prediction = call.params[0] * 1.0
    value = fe.free_energy(
        prediction, call.target, *call.latent, likelihood="mse", inplace_backward=True
    ).free_energy
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        gradients(value, call, create_graph=True)


@pytest.mark.parametrize("view", [False, True])
def test_inplace_backward_leaves_leaves_alone(view, backend):
    """An optimizer would step from what the gradient left in its parameter."""
    call = inputs(0, backend)
    leaf, which = call.params[0], "a view of a leaf" if view else "a leaf"
    before = leaf.detach().clone()
    prediction = leaf.view_as(leaf) if view else leaf
    with pytest.raises(ValueError, match=f"params must be the result of an operation .*; got {which}"):
        fe.free_energy(prediction, call.target, *call.latent, likelihood="mse", inplace_backward=True)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize(
    "shared",
    [
        "target", "scale", "mean", "logvar", "prior_mean", "prior_logvar", "weight", "mask", "latent_mask",
    ],
)  # fmt: skip
def test_inplace_backward_overwrites_no_other_operand(shared, backend):
    """What the kernel has still to read is not where it writes."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(70, 6, generator=generator)
    if "mask" in shared:  # of the bytes 0 and 1, so that they are a mask too
        leaf = torch.randint(0, 2, (70, 24), generator=generator, dtype=torch.uint8).view(torch.float32)
    leaf = leaf.to(backend.device).requires_grad_()
    ones = torch.ones(70, 6, device=backend.device)
    results = []
    for inplace in (False, True):
        p = leaf * 1.0
        values = p.detach()
        views = {
            "target": values[:1].expand(70, 6),
            "scale": p[:1],
            "weight": values.view(-1)[:70],
            "mask": values.view(torch.bool)[:, 8:14],
            "latent_mask": values.view(torch.bool)[:, 8:14],
        }
        options = {shared: views.get(shared, p)}
        scale = options.pop("scale", None)
        operands = [options.pop(name, ones) for name in ("target", "mean", "logvar")]
        found = fe.free_energy(
            p if scale is None else (p, scale), *operands, inplace_backward=inplace, **options,
            likelihood="mse" if scale is None else "gaussian",
        )  # fmt: skip
        results.append([*found, *torch.autograd.grad(found.free_energy, leaf)])
    for separate, in_place in zip(*results, strict=True):
        assert torch.equal(separate, in_place)


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


@pytest.mark.parametrize("likelihood", ["mse", "categorical"])
def test_inplace_backward_leaves_a_lazy_clone_as_it_was(likelihood, backend):
    leaf = torch.randn(6, 5, 4, device=backend.device, requires_grad=True)
    target = torch.zeros(6, 5, dtype=torch.int64, device=backend.device)
    target = target if likelihood == "categorical" else torch.zeros_like(leaf)
    mean = torch.randn(6, 2, device=backend.device)
    results = []
    for inplace in (False, True):
        prediction = leaf * 1
        kept = torch._lazy_clone(prediction.detach())
        loss = fe.free_energy(
            prediction, target, mean, mean, likelihood=likelihood, inplace_backward=inplace
        ).free_energy
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
        assert torch.equal(kept, leaf)
    assert same(*results)
