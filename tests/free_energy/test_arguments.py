"""Arguments of the free energy's public functions: shapes that broadcast, dtypes, beta, free bits, autocast."""

import pytest
import torch
from torch import nn

import fekernels as fe
from tests.support.public_free_energy import close, inputs, terms
from tests.support.tensors import UNIT

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
    # Each sum is rounded to float32 once, but the order of its terms may depend on the layout.
    torch.testing.assert_close(*energies, rtol=2.01 * UNIT, atol=0)
    for energy in energies:
        energy.backward()
    assert scale.grad.shape == given
    # A sum of n terms has an error of n roundings of what their sizes add up to, at most.
    sizes = expanded.grad.abs().sum_to_size(given)
    terms_of_one = expanded.numel() // max(scale.numel(), 1)
    error = (scale.grad - expanded.grad.sum_to_size(given)).abs()
    assert (error <= 2 * terms_of_one * UNIT * sizes).all()


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


def test_empty_batches_of_any_layout(backend):
    """A tensor without elements passes for contiguous whatever its strides."""
    strided = torch.randn(0, 10, device=backend.device)[:, ::2]
    plain = torch.zeros(0, 5, device=backend.device)
    for params, target, mask in (
        (strided, plain, None),
        (plain, strided, None),
        (plain, plain, strided > 0),
        (plain, plain, (torch.ones(0, 10, device=backend.device) > 0)[:, ::2]),
    ):
        assert fe.energy(params, target, "mse", mask=mask).shape == (0,)
    assert fe.gaussian_kl(strided, strided).shape == (0,)


@pytest.mark.parametrize("contiguous", [False, True])
def test_views_that_say_negate(contiguous, backend):
    """What PyTorch makes of the imaginary part of a conjugate: the memory holds the opposite values."""
    negated = torch.randn(2, 6, 3, dtype=torch.complex64, device=backend.device).conj().imag
    if contiguous:
        negated = torch._neg_view(negated.contiguous())
    assert negated.is_neg() and negated.is_contiguous() == contiguous
    plain = negated.resolve_neg()
    counts = torch.randint(0, 3, (2, 6), device=backend.device)
    results = []
    for x in (negated, plain):
        row = x[0, :, 0], x[0, :, 1]
        one = fe.free_energy(
            row[0], counts[0], *row, likelihood="poisson", weight=x[0, :, 2], reduction="sum"
        )
        of_target = fe.free_energy(torch.zeros_like(plain), x, plain, x, likelihood="mse")
        both = fe.free_energy((x, x), plain, x, x, prior_mean=x, prior_logvar=x)
        results.append([*one, *of_target, *both, fe.energy(x, counts, "categorical"), fe.gaussian_kl(x, x)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


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
    in_float64 = counts.double()
    assert torch.equal(fe.energy(rate, in_float64, "poisson"), fe.energy(rate, counts, "poisson"))
    pixels = torch.rand(4, 6, device=backend.device) < 0.5
    assert torch.equal(fe.energy(rate, pixels, "bernoulli"), fe.energy(rate, pixels.float(), "bernoulli"))


def test_elbo_and_beta(backend):
    call = inputs(3, backend)
    result = terms(call, 3, beta=4.0)
    assert torch.equal(result.elbo, -result.free_energy)
    # All terms are positive: three of them rounded once, and their sum again.
    torch.testing.assert_close(result.free_energy, result.energy + 4 * result.kl, rtol=4 * UNIT, atol=0)
    assert torch.equal(result.kl, terms(call, 3, beta=0.0).kl)
    assert torch.equal(fe.gaussian_kl(*call.latent, reduction="mean"), result.kl)
    assert torch.equal(fe.energy(call.params[0], call.target, "bernoulli", reduction="mean"), result.energy)


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
    # No number here needs more digits than float32 has, but for the 0.1 that free_bits replaces.
    assert result.kl.item() == factor * (1.25 + 0.5)
    assert torch.equal(result.free_energy, 2 * result.kl)
    result.free_energy.backward()
    wanted = factor * torch.tensor([[2.0, 0.0], [1.0, 0.0]], device=backend.device)
    assert torch.equal(mean.grad, wanted)
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
    # One rounding to bfloat16, of a float32 whose parts are below 1/5 and four roundings old.
    torch.testing.assert_close(prediction.grad.float(), wanted, rtol=2.0**-8, atol=4 * UNIT)
