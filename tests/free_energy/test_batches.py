"""What counts in a free energy and how it is summed: dimensions of the batch, masks, weights, free bits, beta."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import fekernels as fe
from tests.support.public_free_energy import close, same
from tests.support.tensors import UNIT

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def leaves(*shapes, device="cpu", dtype=torch.float32):
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_two_dimensions_of_a_batch_are_one_batch(reduction, backend):
    """K samples of B data points: as K B data points, and never K of everything."""
    k, b = 4, 4  # alike, where a mistake is silent
    device = backend.device
    r, s, m, v = leaves((k, b, 2, 3), (b, 1, 1), (k, b, 5), (k, b, 5), device=device)
    prior = leaves((1, b, 5), (5,), device=device)
    x = torch.randn(k, b, 2, 3, device=device)
    mask, padding = torch.rand(b, 1, 3, device=device) < 0.7, torch.rand(k, b, 5, device=device) < 0.7
    weight = torch.rand(k, b, device=device)
    got = fe.free_energy(
        (r, s), x, m, v, prior_mean=prior[0], prior_logvar=prior[1], beta=0.7, mask=mask, latent_mask=padding,
        weight=weight, reduction=reduction, batch_dims=2,
    )  # fmt: skip
    wanted = fe.free_energy(
        (r.flatten(0, 1), s.expand(k, b, 1, 1).flatten(0, 1)), x.flatten(0, 1), m.flatten(0, 1), v.flatten(0, 1),
        prior_mean=prior[0].expand(k, b, 5).flatten(0, 1), prior_logvar=prior[1], beta=0.7,
        mask=mask.expand(k, b, 2, 3).flatten(0, 1), latent_mask=padding.flatten(0, 1), weight=weight.flatten(),
        reduction=reduction,
    )  # fmt: skip
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == ((k, b) if reduction == "none" else ())
        assert torch.equal(one.flatten(), other.flatten())
    everything = (r, s, m, v, *prior)
    assert close(
        torch.autograd.grad(got.free_energy.sum(), everything),
        torch.autograd.grad(wanted.free_energy.sum(), everything),
    )


def test_energy_and_kl_of_k_samples(backend):
    logits, counts = torch.randn(3, 5, 7, 4, device=backend.device), torch.randint(0, 4, (3, 5, 7))
    counts = counts.to(backend.device)
    each = torch.stack([fe.energy(logits[k], counts[k], "categorical") for k in range(3)])
    assert torch.equal(fe.energy(logits, counts, "categorical", batch_dims=2), each)
    every = fe.energy(logits, counts, "categorical", batch_dims=3)
    assert every.shape == (3, 5, 7) and close([every.sum(2)], [each])
    mean, logvar = leaves((3, 5, 4), (3, 5, 4), device=backend.device)
    each = torch.stack([fe.gaussian_kl(mean[k], logvar[k]) for k in range(3)])
    assert torch.equal(fe.gaussian_kl(mean, logvar, None, None, "none", 2), each)
    empty = torch.zeros(2, 0, 4, device=backend.device)
    assert fe.gaussian_kl(empty, empty, batch_dims=2).shape == (2, 0)
    assert fe.energy(empty, empty, "mse", batch_dims=2).shape == (2, 0)


def test_importance_weights_of_as_many_samples_as_data_points(backend):
    """log p(x) of a linear Gaussian model, whose exact posterior makes every weight the evidence."""
    k = b = 6
    device = backend.device
    x = torch.randn(b, 1, dtype=torch.float64, device=device)
    mean, logvar = x / 2, torch.full_like(x, math.log(0.5))
    z = mean + (logvar / 2).exp() * torch.randn(k, b, 1, dtype=torch.float64, device=device)
    log_w = -fe.energy(z, x.expand(k, b, 1), "gaussian", batch_dims=2) - fe.monte_carlo_kl(mean, logvar, z)
    evidence = torch.distributions.Normal(0.0, math.sqrt(2.0)).log_prob(x)[:, 0]
    torch.testing.assert_close(fe.importance_weighted_bound(log_w), evidence)


@pytest.mark.parametrize("padded", [False, True])
def test_elements_of_the_kl(padded, backend):
    mean, logvar = leaves((3, 4, 5), (3, 4, 5), device=backend.device)
    prior = leaves((4, 5), (1,), device=backend.device)
    mask = torch.rand(3, 1, 5, device=backend.device) < 0.5 if padded else None
    got = fe.gaussian_kl(mean, logvar, *prior, reduction="elements", latent_mask=mask)
    m, v, p, w = (t.detach().double().requires_grad_() for t in (mean, logvar, *prior))
    wanted = ((m - p) ** 2 * torch.exp(-w) + torch.expm1(v - w) - (v - w)) / 2
    if mask is not None:
        wanted = torch.where(mask, wanted, 0.0)
        assert not got[~mask.expand_as(got)].any()
    assert got.shape == mean.shape and close([got], [wanted])
    assert close(
        torch.autograd.grad(got.square().sum(), (mean, logvar, *prior)),
        torch.autograd.grad(wanted.square().sum(), (m, v, p, w)),
    )


@pytest.mark.parametrize("shape", [(3, 1, 4, 5), (1, 2, 1, 1), (4, 5), (5,), (), (3, 1, 1, 1)], ids=str)
def test_masks_broadcast(shape, backend):
    for likelihood, dtype in (("bernoulli", torch.float32), ("mse", torch.bfloat16)):
        (r,) = leaves((3, 2, 4, 5), device=backend.device, dtype=dtype)
        x = torch.rand(3, 2, 4, 5, device=backend.device)
        mask = torch.rand(shape, device=backend.device) < 0.6
        x[~mask.expand_as(x)] = math.nan
        ones = [fe.energy(r, x, likelihood, each) for each in (mask, mask.expand_as(x).contiguous())]
        assert torch.equal(*ones) and ones[0].isfinite().all()
        gradients = [torch.autograd.grad(one.sum(), r)[0] for one in ones]
        assert torch.equal(*gradients) and not gradients[0][~mask.expand_as(x)].any()


def test_a_mask_of_columns_is_not_copied(monkeypatch):
    from fekernels.ops.free_energy import broadcasting

    mask, x = torch.rand(1, 5000) < 0.5, torch.zeros(64, 5000)
    kept = broadcasting.prepare_mask("energy", "mask", mask, x, "target", "observed", 1)
    assert kept.shape == x.shape and kept.data_ptr() == mask.data_ptr()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_padding_and_dropped_samples_leave_no_trace(nothing, reduction, backend):
    """A ragged batch: as if padding and the samples of weight 0 were not there, but for the division by B."""
    device = backend.device
    lengths, weight = [5, 3, 0, 1, 4], torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0], device=device)
    there = torch.arange(5, device=device) < torch.tensor(lengths, device=device)[:, None]
    values = [torch.randn(5, 5, width, device=device) for width in (4, 4, 2, 2)]
    for value in values:
        value[~there] = nothing
        value[3] = nothing
    x, r, m, v = values
    for operand in (r, m, v):
        operand.requires_grad_()
    options = {"mask": there[..., None], "latent_mask": there[..., None], "weight": weight}
    terms = fe.free_energy(r, x, m, v, likelihood="mse", beta=0.7, reduction=reduction, **options)
    energy, kl = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for i in (0, 1, 4):
        n = lengths[i]
        xi, ri, mi, vi = (t[i, :n].detach().cpu().double() for t in (x, r, m, v))
        energy[i] = weight[i] * ((xi - ri) ** 2).sum()
        kl[i] = weight[i] * (mi**2 + torch.expm1(vi) - vi).sum() / 2
    wanted = [energy + 0.7 * kl, energy, kl]
    if reduction != "none":
        wanted = [each.sum() / (5 if reduction == "mean" else 1) for each in wanted]
    assert close(terms, wanted)
    assert terms.energy.flatten()[-2:].isfinite().all()
    gradients = torch.autograd.grad(terms.free_energy.sum(), (r, m, v), create_graph=reduction == "sum")
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[~there].any() and not gradient[3].any() and gradient[0].all()
    if reduction == "sum":
        for second in torch.autograd.grad(sum(g.square().sum() for g in gradients), (r, m, v)):
            assert second.isfinite().all() and not second[~there].any() and not second[3].any()


def test_free_bits_count_what_is_there(backend):
    """Padding and dropped samples change nothing but B; a latent that no sample has costs nothing."""
    device = backend.device
    x, mean, logvar = (torch.randn(6, n, device=device) for n in (3, 4, 4))
    weight = torch.rand(6, device=device) + 0.5
    options = {"likelihood": "mse", "free_bits": 0.4, "beta": 2.0}
    plain = fe.free_energy(x, x + 1, mean, logvar, weight=weight, reduction="sum", **options)
    kls = weight.double()[:, None] * fe.gaussian_kl(mean, logvar, reduction="elements").double()
    wanted = kls.mean(0).clamp(min=0.4).sum() * 6
    torch.testing.assert_close(plain.kl, wanted.float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(plain.free_energy, plain.energy + 2 * plain.kl, rtol=4 * UNIT, atol=0)

    def grown(tensor, rows, columns):
        result = torch.full((6 + rows, tensor.shape[1] + columns), math.nan, device=device)
        result[:6, : tensor.shape[1]] = tensor
        return result

    more = [grown(x, 2, 0), grown(x + 1, 2, 0), grown(mean, 2, 3), grown(logvar, 2, 3)]
    for operand in more[2:]:
        operand.requires_grad_()
    there = torch.zeros(8, 7, dtype=torch.bool, device=device)
    there[:, :4] = True
    kept = torch.cat((weight, torch.zeros(2, device=device)))
    for reduction, count in (("sum", 1), ("mean", 8)):
        got = fe.free_energy(*more, latent_mask=there, weight=kept, reduction=reduction, **options)
        for one, other in zip(got, plain, strict=True):
            torch.testing.assert_close(one, other / count, rtol=4 * UNIT, atol=0)
        for gradient in torch.autograd.grad(got.free_energy, more[2:]):
            assert gradient.isfinite().all() and not gradient[:, 4:].any() and not gradient[6:].any()
    # A latent that half of the samples have costs nothing up to half of it.
    half = torch.tensor([[True], [False]], device=device)
    m = torch.tensor([[0.5], [9.0]], device=device)
    for free_bits, kl in ((0.2, 0.2 / 2), (0.05, 0.125 / 2)):
        got = fe.free_energy(m, m, m, 0 * m, likelihood="mse", latent_mask=half, free_bits=free_bits)
        assert abs(got.kl.item() - kl) < 1e-7


@pytest.mark.parametrize(("reduction", "free_bits"), [("mean", 0.0), ("mean", 0.3), ("none", 0.0)])
def test_every_mixture_of_dtypes(reduction, free_bits, backend):
    """Of parameters, target, latents, prior and weight: values of float64, in float64 where one of them is."""
    device = backend.device
    base = [torch.randn(5, n, device=device, dtype=torch.float64) for n in (6, 6, 6, 3, 3, 3)]
    w = torch.rand(5, device=device, dtype=torch.float64)
    for i, kinds in enumerate(itertools.product(FLOATS, repeat=3)):
        of_params, of_latent, of_data = kinds
        of_others = FLOATS[i % 3], FLOATS[i % 4]
        dtypes = (of_params, of_others[0], of_data, of_latent, of_others[1], of_latent)
        r, s, x, m, v, p = (t.to(dtype) for t, dtype in zip(base, dtypes, strict=True))
        weight, operands = w.to(of_data), [r, s, m, v, p]
        results = []
        for in_float64 in (False, True):
            given = [t.double() if in_float64 else t for t in operands]
            for operand in given:
                operand.requires_grad_()
            r1, s1, m1, v1, p1 = given
            terms = fe.free_energy(
                (r1, s1), x.double() if in_float64 else x, m1, v1, prior_mean=p1, beta=0.5, free_bits=free_bits,
                weight=weight, reduction=reduction,
            )  # fmt: skip
            results.append((terms, torch.autograd.grad(terms.free_energy.sum(), given)))
        (terms, gradients), (exact, exact_gradients) = results
        result = (
            torch.float64 if torch.float64 in (r.dtype, s.dtype, m.dtype, v.dtype, p.dtype) else torch.float32
        )
        assert {term.dtype for term in terms} == {result}
        assert close(terms, exact), dtypes
        for gradient, wanted, operand in zip(gradients, exact_gradients, operands, strict=True):
            assert gradient.dtype == operand.dtype
            error = (gradient.double() - wanted).abs().max()
            assert error <= (torch.finfo(gradient.dtype).eps + 2e-6) * wanted.abs().max(), dtypes


def test_beta_is_any_one_number(backend):
    device = backend.device
    r, m, v = leaves((4, 3), (4, 2), (4, 2), device=device)
    x = torch.rand(4, 3, device=device)

    def loss(beta, **options):
        return fe.free_energy(r, x, m, v, likelihood="bernoulli", beta=beta, **options)

    wanted = loss(2.0)
    for beta in (2, np.float32(2), np.float64(2), np.int64(2), np.array(2.0)):
        assert same(loss(beta), wanted)
    gradients = torch.autograd.grad(wanted.free_energy, (r, m, v))
    for beta in (torch.tensor(2.0), torch.tensor(2), torch.tensor(2.0, dtype=torch.float64)):
        for there in {"cpu", str(device)}:
            for options in (
                {},
                {"free_bits": 1e-9},
                {"reduction": "none"},
                {"weight": torch.ones(4, device=device)},
            ):
                terms = loss(beta.to(there), **options)
                value = terms.free_energy.mean() if "reduction" in options else terms.free_energy
                torch.testing.assert_close(value, wanted.free_energy, rtol=4 * UNIT, atol=0)
                assert value.dtype == torch.float32
                assert close(torch.autograd.grad(value, (r, m, v)), gradients)
    learned = torch.tensor(0.5, device=device, requires_grad=True)
    terms = loss(learned)
    assert torch.equal(torch.autograd.grad(terms.free_energy, learned)[0], terms.kl)
    prediction = r * 1.0
    terms = fe.free_energy(
        prediction, x, m, v, likelihood="bernoulli", beta=torch.tensor(2.0), inplace_backward=True
    )
    assert close(torch.autograd.grad(terms.free_energy, (r, m, v)), gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scheduled_beta_compiles_once(reduction, backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x, r, m, v = torch.rand(4, 3), *leaves((4, 3), (4, 2), (4, 2))
    x, r, m, v = (t.to(backend.device) for t in (x, r, m, v))

    @torch.compile(fullgraph=True, backend=counter)
    def loss(beta):
        value = fe.free_energy(r, x, m, v, likelihood="bernoulli", beta=beta, reduction=reduction)
        return value.free_energy.sum()

    for step in range(6):
        beta = 0.25 * step
        got = loss(torch.tensor(beta))
        wanted = fe.free_energy(r, x, m, v, likelihood="bernoulli", beta=beta, reduction=reduction)
        torch.testing.assert_close(got, wanted.free_energy.sum(), rtol=8 * UNIT, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_with_everything(reduction, backend):
    device = backend.device
    r, m, v = leaves((3, 4, 6), (3, 4, 2), (3, 4, 2), device=device)
    x, mask = torch.rand(3, 4, 6, device=device), torch.rand(4, 1, device=device) < 0.5
    padding, weight = torch.rand(2, device=device) < 0.5, torch.tensor([[0.0, 1, 2, 0]] * 3, device=device)

    def loss(r, m, v):
        return fe.free_energy(
            r, x, m, v, likelihood="mse", mask=mask, latent_mask=padding, weight=weight, batch_dims=2,
            reduction=reduction,
        ).free_energy  # fmt: skip

    torch._dynamo.reset()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(r, m, v)
    wanted = loss(r, m, v)
    assert got.shape == wanted.shape and close([got], [wanted])
    assert close(torch.autograd.grad(got.sum(), (r, m, v)), torch.autograd.grad(wanted.sum(), (r, m, v)))


def test_under_vmap_and_in_forward_mode(backend):
    """Which plain PyTorch computes."""
    device = backend.device
    r, m, v = (
        torch.randn(3, 4, 6, device=device),
        torch.randn(3, 4, 2, device=device),
        torch.zeros(3, 4, 2, device=device),
    )
    weight = torch.tensor([0.0, 1, 2, 0], device=device)
    r[:, 0], m[:, 3] = math.nan, math.nan
    padding = torch.tensor([True, False], device=device)
    m[..., 1] = math.inf

    def loss(r, m, v):
        terms = fe.free_energy(
            r, torch.zeros_like(r), m, v, likelihood="mse", latent_mask=padding, weight=weight
        )
        return terms.free_energy

    got = torch.vmap(loss)(r, m, v)
    wanted = torch.stack([loss(*each) for each in zip(r, m, v, strict=True)])
    assert got.isfinite().all() and close([got], [wanted])
    gradient = torch.func.grad(loss)(r[0], m[0], v[0])
    assert gradient.isfinite().all() and not gradient[0].any() and not gradient[3].any()
