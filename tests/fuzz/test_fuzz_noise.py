"""Noise, reparameterised samples and importance bounds under random arguments."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

import fekernels as fe
from tests.fuzz.budget import examples
from tests.fuzz.drawn_arguments import BACKENDS, LAYOUTS, laid_out, on

WORD = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high & WORD, (low >> 32) ^ c[3] ^ k[1], low & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def words(count: int, seed: int, stream: int, step: int, offset: int, purpose: int) -> list[int]:
    out = []
    for g in range(offset, offset + count):
        quad = g // 4
        counter = [quad & WORD, (quad >> 32) & 0xFFFF | purpose << 16, step, stream]
        out.append(philox(counter, [seed & WORD, seed >> 32 & WORD])[g % 4])
    return out


@examples(0.04)
@given(
    st.integers(0, 70), st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, WORD), st.integers(0, (1 << 24) - 1),
    st.one_of(st.integers(0, 40), st.integers(0, (1 << 50) - 100)), st.integers(0, 7), BACKENDS,
)  # fmt: skip
def test_random(count, seed, stream, step, offset, purpose, backend) -> None:
    key = dict(seed=seed, stream=stream, step=step, offset=offset, purpose=purpose)
    want = words(count, **key)
    bits = on(backend, lambda: fe.random.bits((count,), **key))
    assert [b & WORD for b in bits.tolist()] == want
    uniform = on(backend, lambda: fe.random.uniform((count,), **key)).double()
    exact = torch.tensor([(w + 0.5) * 2.0**-32 for w in want], dtype=torch.float64)
    assert bool(((uniform - exact).abs() <= 2.0**-24 * exact + 2.0**-33).all()) and bool((uniform > 0).all())
    normal = on(backend, lambda: fe.random.normal((count,), **key)).double()
    for i in range(count):
        g = offset + i
        a, b = words(2, **{**key, "offset": g - g % 2})
        radius = math.sqrt(-2 * math.log((a + 0.5) * 2.0**-32))
        turn = math.cos if g % 2 == 0 else math.sin
        value = radius * turn(2 * math.pi * b / 2**32)
        # Near u = 1 the radius is the square root of 1 - u, which float32 rounds to 2^-24.
        assert abs(normal[i].item() - value) <= 4e-6 * max(radius, 1) + 1e-3 * (radius < 1e-2)


@examples(0.04)
@given(
    st.integers(0, 9), st.lists(st.integers(0, 5), min_size=1, max_size=2), st.sampled_from((None, 1, 3)),
    st.integers(0, (1 << 63) - 1), st.integers(0, 100), st.integers(0, 5), st.integers(0, 1000), BACKENDS,
    st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    LAYOUTS,
)  # fmt: skip
def test_reparameterize(batch, latent, samples, seed, step, stream, offset, backend, dtype, layout) -> None:
    shape = (batch, *latent)
    values = fe.random.normal((2, *shape), seed=seed, purpose=5).double()
    mean, logvar = (laid_out(v.to(dtype), layout).requires_grad_() for v in values)
    size = math.prod(latent)
    with fe.use_backend("reference"):
        eps = [
            fe.random.normal(shape, seed=seed, step=step, stream=stream + k, offset=offset * size, purpose=3)
            for k in range(samples or 1)
        ]
    noise = (torch.stack(eps) if samples else eps[0]).double()
    in_float64 = [t.detach().double().requires_grad_() for t in (mean, logvar)]
    exact = in_float64[0] + (in_float64[1] / 2).exp() * noise
    upstream = torch.cos(torch.arange(exact.numel(), dtype=torch.float64)).view(exact.shape)

    def call():  # type: ignore[no-untyped-def]
        z = fe.reparameterize(
            mean, logvar, seed=seed, step=step, stream=stream, offset=offset, samples=samples
        )
        return z, torch.autograd.grad((z * upstream.to(z.dtype)).sum(), (mean, logvar))

    z, gradients = on(backend, call)
    assert z.shape == exact.shape and z.dtype == dtype
    unit = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 2e-7)  # the noise is float32
    assert bool(
        ((z.double() - exact).abs() <= unit * (in_float64[0].abs() + (exact - in_float64[0]).abs() + 1)).all()
    )
    wanted = torch.autograd.grad((exact * upstream.to(dtype).double()).sum(), in_float64)
    scale = (noise.abs() + 1) * (in_float64[1] / 2).exp()
    bound = 4 * unit * (scale.sum(0) if samples else scale) + 4 * unit
    for got, want in zip(gradients, wanted, strict=True):
        assert bool(((got.double() - want).abs() <= bound * (samples or 1)).all())


@examples(0.02)
@given(
    st.integers(1, 9), st.lists(st.integers(0, 4), max_size=2), st.sampled_from(("iwae", "renyi")),
    st.sampled_from((0.0, 0.5, 1.0, 0.999, 0.25)), st.sampled_from((0.1, 5.0, 300.0)), st.integers(0, 1 << 30),
    st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
def test_importance_weighted_bound(count, shape, estimator, alpha, spread, seed, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_w = (
        (torch.randn(count, *shape, generator=generator, dtype=torch.float64) * spread)
        .to(dtype)
        .requires_grad_()
    )
    alpha = alpha if estimator == "renyi" else None
    got = fe.importance_weighted_bound(log_w, estimator=estimator, alpha=alpha)
    in_float64 = log_w.detach().double().requires_grad_()
    t = 1 - (alpha or 0.0)
    exact = in_float64.mean(0) if t == 0 else (torch.logsumexp(t * in_float64, 0) - math.log(count)) / t
    bound = (
        4 * torch.finfo(dtype).eps * (in_float64.detach().abs().amax(0) + 1 if count else 1)
        + (dtype == torch.float64) * 1e-12
    )
    assert bool(((got - exact).abs() <= bound).all())
    (gradient,) = torch.autograd.grad(got.sum(), log_w)
    (want,) = torch.autograd.grad(exact.sum(), in_float64)
    assert bool(((gradient.double() - want).abs() <= 1e-6 * (1 + spread)).all())
