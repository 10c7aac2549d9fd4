"""The public functions of the free energy: gradients of every order, compilation, transforms, and their arguments."""

import pytest
import torch
import torch._dynamo.testing
from free_energy_cases import CATEGORICAL, NAMES, arguments
from torch import nn

import fekernels as fe
from fekernels.reference.free_energy import LIKELIHOODS

LIKELIHOOD = pytest.mark.parametrize("likelihood", range(len(NAMES)), ids=NAMES)


@pytest.fixture
def backend(place):
    with fe.use_backend(place.backend):
        yield place


def inputs(likelihood, place, dtype=torch.float32, shape=(6, 37, 4), **keywords):
    """(params, target, latent) with gradients wanted."""
    call = arguments(likelihood, shape, dtype=dtype, prior=False, **keywords).to(place.device)
    for operand in call.operands:
        operand.requires_grad_()
    return call


def terms(call, likelihood, **keywords):
    keywords = {"beta": 0.7, "mask": call.mask, "weight": call.weight, **keywords}
    return fe.free_energy(
        tuple(call.params), call.target, *call.latent, likelihood=LIKELIHOODS[likelihood], **keywords
    )


def gradients(value, call, **keywords):
    return torch.autograd.grad(value, call.operands, **keywords)


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def close(ones, others, bound=2e-6):
    return all(
        (one.double().cpu() - other.double().cpu()).abs().max() <= bound * other.abs().max().clamp_min(1e-3)
        for one, other in zip(ones, others, strict=True)
    )


@LIKELIHOOD
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_of_each_term(likelihood, reduction, backend):
    """Of free energy, energy and KL, alone and together, under factors: as float64's, by plain PyTorch."""
    call = inputs(likelihood, backend, masked=True, weighted=True)
    wide = call._map(lambda t: t.detach().double() if t.dtype.is_floating_point else t)
    for operand in wide.operands:
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
        wanted = gradients(values(wide, rows, which), wide, allow_unused=True, materialize_grads=True)
        assert close(got, wanted), which


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
    wide = call._map(lambda t: t.detach().double() if t.dtype.is_floating_point else t)
    for operand in wide.operands:
        operand.requires_grad_()
    results = []
    for each in (call, wide):
        first = gradients(terms(each, likelihood).free_energy, each, create_graph=True)
        results.append(
            gradients(sum((g * g).sum() for g in first), each, allow_unused=True, materialize_grads=True)
        )
    assert close(*results, bound=1e-5)


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
    assert close(*results, bound=1e-5)


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
    assert torch.allclose(gradient, 2 * residual * 8, rtol=2e-3, atol=0)
    assert torch.allclose(value, 2 * residual.float().square().mean(), rtol=1e-5)


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
    assert torch.allclose(got, (wanted * tangent).sum(), rtol=1e-4, atol=1e-5)


@LIKELIHOOD
def test_gradcheck(likelihood):
    call = inputs(likelihood, type("Place", (), {"device": "cpu"}), torch.float64, (2, 3, 2))
    call.target.data = call.target.double() if likelihood != CATEGORICAL else call.target
    count = len(call.params)

    def function(*operands):
        return tuple(
            fe.free_energy(
                operands[:count], call.target, *operands[count:], likelihood=LIKELIHOODS[likelihood], beta=0.3
            )
        )

    assert torch.autograd.gradcheck(function, call.operands)
    assert torch.autograd.gradgradcheck(function, call.operands)


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


SHAPES = {
    "gene": ((7,), (1, 7)),
    "sample": ((5, 1), (5, 1)),
    "number": ((), (1, 1)),
    "one": ((1, 1), (1, 1)),
    "full": ((5, 7), (5, 7)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_broadcast(shape, backend):
    given, _ = SHAPES[shape]
    location, target = (torch.randn(5, 7, device=backend.device) for _ in range(2))
    scale = torch.randn(given, device=backend.device, requires_grad=True)
    expanded = scale.detach().expand(5, 7).clone().requires_grad_()
    energies = [fe.energy((location, each), target, reduction="sum") for each in (scale, expanded)]
    assert torch.allclose(*energies, rtol=2e-7)
    for energy in energies:
        energy.backward()
    assert scale.grad.shape == given
    assert torch.allclose(scale.grad, expanded.grad.sum_to_size(given), rtol=1e-5, atol=1e-5)


def test_events_of_any_shape(backend):
    """Images with a log-variance a channel, channels last, and latents of two dimensions."""
    images = torch.randn(3, 2, 4, 5, device=backend.device).contiguous(memory_format=torch.channels_last)
    prediction = torch.randn(3, 2, 4, 5, device=backend.device, requires_grad=True)
    channel = torch.randn(2, 1, 1, device=backend.device, requires_grad=True)
    mean, logvar = (torch.randn(3, 2, 2, device=backend.device, requires_grad=True) for _ in range(2))
    prior = torch.randn(2, 2, device=backend.device, requires_grad=True)
    mask = torch.rand(3, 2, 4, 5, device=backend.device) < 0.5
    everything = prediction, channel, mean, logvar, prior
    results = []
    for make in (lambda t: t, lambda t: t.double()):
        p, c, m, v, q = map(make, everything)
        value = fe.free_energy(
            (p, c), make(images), m, v, prior_mean=q, mask=mask, reduction="sum"
        ).free_energy
        results.append([value, *torch.autograd.grad(value, everything)])
    assert [g.shape for g in results[0]] == [torch.Size(()), *(t.shape for t in everything)]
    assert close(*results)


def test_an_expanded_parameter_of_part_of_the_event(backend):
    location, target = (torch.randn(2, 3, 7, device=backend.device) for _ in range(2))
    scale = torch.tensor(0.3, device=backend.device).expand(7)
    got = fe.energy((location, scale), target)
    assert torch.equal(got, fe.energy((location, scale.expand(2, 3, 7).contiguous()), target))


def test_float64_stays_float64(backend):
    r = torch.zeros(1, 1, dtype=torch.float64, device=backend.device)
    large = torch.tensor([[(1 << 24) + 1]], device=backend.device)
    weight = torch.tensor([0.1], dtype=torch.float64, device=backend.device)
    energy = fe.energy(r, large, "mse", weight=weight)
    assert abs(energy.item() / (0.1 * ((1 << 24) + 1) ** 2) - 1) < 1e-14


def test_integer_targets(backend):
    counts = torch.randint(0, 9, (4, 6), device=backend.device)
    rate = torch.randn(4, 6, device=backend.device)
    for dtype in (torch.int64, torch.uint8, torch.int32):
        assert torch.equal(
            fe.energy(rate, counts.to(dtype), "poisson"), fe.energy(rate, counts.float(), "poisson")
        )
    wide = counts.double()
    assert torch.equal(fe.energy(rate, wide, "poisson"), fe.energy(rate, counts, "poisson"))
    pixels = torch.rand(4, 6, device=backend.device) < 0.5
    assert torch.equal(fe.energy(rate, pixels, "bernoulli"), fe.energy(rate, pixels.float(), "bernoulli"))


def test_elbo_and_beta(backend):
    call = inputs(3, backend)
    result = terms(call, 3, beta=4.0)
    assert torch.equal(result.elbo, -result.free_energy)
    assert torch.allclose(result.free_energy, result.energy + 4 * result.kl)
    assert torch.equal(result.kl, terms(call, 3, beta=0.0).kl)
    assert torch.allclose(fe.gaussian_kl(*call.latent, reduction="mean"), result.kl)
    assert torch.allclose(
        fe.energy(call.params[0], call.target, "bernoulli", reduction="mean"), result.energy
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_free_bits(reduction, backend):
    """sum_j max(free_bits, mean_b KL_bj): a latent below it gets no gradient."""
    mean = torch.tensor([[2.0, 0.1], [1.0, -0.1]], device=backend.device, requires_grad=True)
    logvar = torch.zeros(2, 2, device=backend.device, requires_grad=True)
    x = torch.zeros(2, 3, device=backend.device)
    result = fe.free_energy(
        x, x, mean, logvar, likelihood="mse", free_bits=0.5, beta=2.0, reduction=reduction
    )
    factor = 2 if reduction == "sum" else 1
    assert torch.allclose(result.kl, torch.tensor(factor * (1.25 + 0.5), device=backend.device))
    assert torch.allclose(result.free_energy, 2 * result.kl)
    result.free_energy.backward()
    wanted = factor * torch.tensor([[2.0, 0.0], [1.0, 0.0]], device=backend.device)
    assert torch.allclose(mean.grad, wanted)
    with pytest.raises(ValueError, match="free_bits"):
        fe.free_energy(x, x, mean, logvar, free_bits=0.5, reduction="none")
    empty = fe.free_energy(x[:0], x[:0], mean[:0], logvar[:0], free_bits=0.5, reduction=reduction)
    assert empty.kl == 0 if reduction == "sum" else empty.kl.isnan()


def test_autocast(backend):
    """Under autocast a linear layer gives bfloat16: its gradient has that type, and the terms are float32."""
    layer = nn.Linear(8, 12, device=backend.device)
    x, target = torch.randn(5, 8, device=backend.device), torch.rand(5, 12, device=backend.device)
    mean, logvar = (torch.randn(5, 3, device=backend.device, requires_grad=True) for _ in range(2))
    with torch.autocast(backend.device, torch.bfloat16):
        prediction = layer(x)
        result = fe.free_energy(prediction, target, mean, logvar, likelihood="bernoulli")
    assert prediction.dtype == torch.bfloat16
    assert {value.dtype for value in result} == {torch.float32}
    prediction.retain_grad()
    result.free_energy.backward()
    assert prediction.grad.dtype == torch.bfloat16 and mean.grad.dtype == torch.float32
    wanted = (torch.sigmoid(prediction.detach().float()) - target) / 5
    assert torch.equal(prediction.grad, wanted.bfloat16()) or torch.allclose(
        prediction.grad.float(), wanted, rtol=1e-2
    )


@LIKELIHOOD
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_vmap(likelihood, reduction, backend):
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
            likelihood=LIKELIHOODS[likelihood],
            reduction=reduction,
        ).free_energy

    got = torch.vmap(function)(targets, *stacked)
    wanted = torch.stack([function(call.target, *call.operands) for call in calls])
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_function_transforms(backend):
    call = inputs(3, backend)
    logits, mean, logvar = (operand.detach() for operand in call.operands)

    def value(logits):
        return fe.free_energy(
            logits, call.target, mean, logvar, likelihood="bernoulli", reduction="sum"
        ).free_energy

    got = torch.func.grad(value)(logits)
    assert torch.allclose(got, torch.sigmoid(logits) - call.target, atol=1e-6)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(torch.func.grad(value), backend="aot_eager")(logits), got, atol=1e-6)
    diagonal = torch.func.jvp(torch.func.grad(value), (logits,), (torch.ones_like(logits),))[1]
    assert torch.allclose(diagonal, torch.sigmoid(logits) * torch.sigmoid(-logits), atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@LIKELIHOOD
def test_opcheck(likelihood, reduction, backend):
    call = inputs(likelihood, backend, masked=True, weighted=True)
    name = LIKELIHOODS[likelihood]
    needs = (1 << len(call.operands)) - 1
    torch.library.opcheck(
        torch.ops.fekernels.free_energy.default,
        (call.params, call.target, call.mask, call.latent, call.weight, name, reduction, needs),
    )


def test_opcheck_of_the_other_operators(backend):
    call = inputs(3, backend)
    rows = torch.randn(6, device=backend.device), torch.randn(6, device=backend.device)
    plain = call._map(torch.Tensor.detach)
    torch.library.opcheck(
        torch.ops.fekernels.free_energy_backward.default,
        (*rows, plain.params, plain.target, None, plain.latent, None, "bernoulli", 7),
    )
    priors = [torch.randn(1, 4, device=backend.device, requires_grad=True) for _ in range(2)]
    for prior in ([None, None], priors):
        torch.library.opcheck(torch.ops.fekernels.gaussian_kl.default, (*call.latent, *prior, "sum"))


def test_the_operator_takes_any_layout(backend):
    call = inputs(3, backend, masked=True, weighted=True)
    plain = call._map(torch.Tensor.detach)
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
        call = inputs(3, backend, shape=(rows, 11, 3), masked=True)
        compiled = loss(call.params[0], call.target, *call.latent, call.mask, beta)
        got = gradients(compiled, call)
        eager = terms(call, 3, beta=beta).free_energy
        assert torch.allclose(compiled, eager, rtol=1e-6)
        assert close(got, gradients(eager, call))
        if rows == 4:
            compiled_once = counter.frame_count
    assert counter.frame_count == compiled_once


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compiled_by_inductor(reduction, backend):
    """A whole step, from the layer that makes the prediction to its gradient, with a gene's dispersion."""
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

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    assert close(got, step(*leaves), bound=1e-5)
