"""The free energy under torch.compile, vmap and torch.func, and its operators as PyTorch sees them."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fekernels as fe
from fekernels._catalogue.free_energy import LIKELIHOODS
from tests.support.free_energy import CATEGORICAL, NAMES
from tests.support.inductor import scalar_loops
from tests.support.public_free_energy import LIKELIHOOD, close, gradients, inputs, same, terms
from tests.support.tensors import UNIT


def test_modes_see_operators_and_no_kernel_reads_fake_memory(backend):
    with FakeTensorMode():
        prediction, mean = (torch.randn(4, 6, device=backend.device, requires_grad=True) for _ in range(2))
        target = torch.zeros(4, 6, device=backend.device)
        for kept in (prediction, (prediction, mean)):  # the short way, and the long
            found = fe.free_energy(kept, target, mean, mean)
            assert all(isinstance(term, FakeTensor) and term.shape == () for term in found)
            gradients = torch.autograd.grad(found.free_energy, (prediction, mean))
            assert all(
                isinstance(gradient, FakeTensor) and gradient.shape == (4, 6) for gradient in gradients
            )

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    call, seen = inputs(0, backend), []
    for mask in (None, torch.ones_like(call.target, dtype=torch.bool)):
        seen.clear()
        with Recorder():
            recorded = terms(call, 0, mask=mask).free_energy
        assert "fekernels.free_energy.default" in seen
        assert close([recorded], [terms(call, 0, mask=mask).free_energy])


@LIKELIHOOD
def test_vmap(likelihood, backend):
    """Which plain PyTorch computes."""
    reduction = ("none", "mean")[likelihood % 2]
    calls = [inputs(likelihood, backend, shape=(3, 5, 2)) for _ in range(2)]
    stacked = [
        torch.stack([call.operands[i] for call in calls]).detach() for i in range(len(calls[0].operands))
    ]
    targets = torch.stack([call.target for call in calls])
    count = len(calls[0].params)

    def function(target, *operands):
        return fe.free_energy(
            operands[:count],
            target,
            *operands[count:],
            likelihood=LIKELIHOODS[likelihood].name,
            reduction=reduction,
        ).free_energy

    got = torch.vmap(function)(targets, *stacked)
    wanted = torch.stack([function(call.target, *call.operands) for call in calls])
    assert close([got], [wanted])


def test_function_transforms(backend):
    call = inputs(3, backend)
    logits, mean, logvar = (operand.detach() for operand in call.operands)

    def value(logits):
        return fe.free_energy(
            logits, call.target, mean, logvar, likelihood="bernoulli", reduction="sum"
        ).free_energy

    got = torch.func.grad(value)(logits)
    # The parts are below 1, and free_energy/test_numerics.py holds gradients to 1e-6 of those.
    torch.testing.assert_close(got, torch.sigmoid(logits) - call.target, rtol=0, atol=1e-6)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(torch.func.grad(value), backend="aot_eager")(logits), got)
    diagonal = torch.func.jvp(torch.func.grad(value), (logits,), (torch.ones_like(logits),))[1]
    # Two sigmoids of three roundings each, their product, and ours.
    wanted = torch.sigmoid(logits) * torch.sigmoid(-logits)
    torch.testing.assert_close(diagonal, wanted, rtol=8 * UNIT, atol=0)


@pytest.mark.parametrize(
    ("likelihood", "reduction"),  # the operator's path is one for all that is elementwise
    [(NAMES.index("mse1"), "sum"), (NAMES.index("student_t3"), "none"), (CATEGORICAL, "mean")],
)
def test_opcheck(likelihood, reduction, backend):
    call = inputs(likelihood, backend, masked="some", padded="some", weight="dropped")
    name = LIKELIHOODS[likelihood].name
    needs = (1 << len(call.operands)) - 1
    torch.library.opcheck(
        torch.ops.fekernels.free_energy.default,
        (
            call.params,
            call.target,
            call.mask,
            call.latent,
            call.weight,
            name,
            reduction,
            needs,
            call.latent_mask,
        ),
    )


def test_opcheck_of_the_other_operators(backend):
    call = inputs(3, backend)
    rows = torch.randn(6, device=backend.device), torch.randn(6, device=backend.device)
    plain = call.map(torch.Tensor.detach)
    torch.library.opcheck(
        torch.ops.fekernels.free_energy_backward.default,
        (*rows, plain.params, plain.target, None, plain.latent, None, "bernoulli", 7),
    )
    priors = [torch.randn(1, 4, device=backend.device, requires_grad=True) for _ in range(2)]
    for prior in ([None, None], priors):
        torch.library.opcheck(torch.ops.fekernels.gaussian_kl.default, (*call.latent, *prior, "sum"))


def test_the_operator_takes_any_layout(backend):
    call = inputs(3, backend, masked="some", weight="random")
    plain = call.map(torch.Tensor.detach)
    operator = torch.ops.fekernels.free_energy

    def turned(tensor):
        return tensor.mT.contiguous().mT

    wanted = operator(
        plain.params, plain.target, plain.mask, plain.latent, plain.weight, "bernoulli", "sum", 7
    )
    double = torch.stack((plain.weight, plain.weight), 1)[:, 0].double()
    got = operator(
        [turned(plain.params[0])], turned(plain.target), turned(plain.mask), [turned(t) for t in plain.latent],
        double, "bernoulli", "sum", 7,
    )  # fmt: skip
    assert same([*got[:2], *got[2]], [*wanted[:2], *wanted[2]])
    logits, labels = (
        torch.randn(5, 3, 4, device=backend.device),
        torch.randint(0, 4, (3, 5), device=backend.device).mT,
    )
    wanted = operator([logits], labels.contiguous(), None, [], None, "categorical", "none", 0)
    got = operator([logits.mT.contiguous().mT], labels, None, [], None, "categorical", "none", 0)
    assert same(got[:2], wanted[:2])
    for mask, weight in ((plain.mask[:, :1], None), (None, plain.weight[:2])):
        with pytest.raises(ValueError, match="must"):
            operator(plain.params, plain.target, mask, plain.latent, weight, "bernoulli", "sum", 0)


def test_the_operator_refuses_second_derivatives(backend):
    call = inputs(3, backend)
    energy, _, _ = torch.ops.fekernels.free_energy(
        call.params, call.target, None, call.latent, None, "bernoulli", "sum", 7
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(energy, call.params, create_graph=True)


def test_compiles_whole_and_once(backend):
    """A batch that changes, and a beta that changes, recompile nothing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def loss(prediction, target, mean, logvar, mask, beta):
        return fe.free_energy(
            prediction, target, mean, logvar, likelihood="bernoulli", mask=mask, beta=beta
        ).free_energy

    for rows in (4, 6, 9, 16):
        beta = rows / 7
        call = inputs(3, backend, shape=(rows, 11, 3), masked="some")
        compiled = loss(call.params[0], call.target, *call.latent, call.mask, beta)
        got = gradients(compiled, call)
        eager = terms(call, 3, beta=beta).free_energy
        # The graph adds float32 numbers, all positive, where the kernel rounds the whole once.
        torch.testing.assert_close(compiled, eager, rtol=4 * UNIT, atol=0)
        assert same(got, gradients(eager, call))
        if rows == 4:
            compiled_once = counter.frame_count
    assert counter.frame_count == compiled_once


def test_compiled_by_inductor(backend):
    """A whole step, from the layer that makes the prediction to its gradient, with a gene's dispersion."""
    reduction = "none" if backend.backend == "reference" else "sum"
    torch._dynamo.reset()
    torch.manual_seed(1)
    weight = torch.randn(4, 12, device=backend.device)
    counts = torch.poisson(torch.full((5, 12), 2.0, device=backend.device))
    code = torch.randn(5, 4, device=backend.device)
    dispersion = torch.rand(12, device=backend.device)

    def step(weight, dispersion, code):
        mean = torch.nn.functional.softplus(code @ weight)
        value = fe.free_energy(
            (mean, dispersion), counts, code, code, likelihood="negative_binomial", reduction=reduction
        ).free_energy
        return torch.autograd.grad(value.sum(), (weight, dispersion, code))

    leaves = [tensor.requires_grad_() for tensor in (weight, dispersion, code)]

    def loss(weight, dispersion, code):
        mean = torch.nn.functional.softplus(code @ weight)
        return fe.free_energy(
            (mean, dispersion), counts, code, code, likelihood="negative_binomial", reduction=reduction
        ).free_energy.sum()

    with scalar_loops():
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    assert close(got, step(*leaves))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_trace_of_torch_jit_computes(weighted, wanted):
    """On other values than those that it was traced with, and gradients too."""
    target, mean, logvar = torch.rand(6, 5), torch.randn(6, 2), torch.randn(6, 2)
    weight = torch.rand(6) if weighted else None

    def loss(prediction):
        z = fe.reparameterize(mean + prediction[:, :2], logvar, seed=1)
        return fe.free_energy(
            prediction, target, z, logvar, likelihood="bernoulli", weight=weight
        ).free_energy

    traced = torch.jit.trace(loss, torch.randn(6, 5, requires_grad=wanted), check_trace=False)
    prediction = torch.randn(6, 5, requires_grad=wanted)
    torch.testing.assert_close(traced(prediction), loss(prediction))
    if wanted:
        ours, theirs = (torch.autograd.grad(f(prediction), prediction)[0] for f in (traced, loss))
        torch.testing.assert_close(ours, theirs)
