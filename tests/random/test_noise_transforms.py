"""Counter-based noise under torch.vmap, torch.func, torch.compile and torch.export."""

import warnings

import pytest
import torch

import fekernels as fe
from tests.support.tensors import UNIT

N, B, Z = 6, 2, 3
KEY = dict(seed=3, step=2, stream=1, offset=5)


@pytest.fixture
def pair(backend):
    return [torch.randn(N, B, Z, device=backend.device) for _ in range(2)]


def sample(mean, logvar):
    return fe.reparameterize(mean, logvar, **KEY)


def stacked(mean, logvar, **keywords):
    """One call on the rows of all instances, one instance below the other: [..., N, B, Z]."""
    z = fe.reparameterize(mean.reshape(-1, Z), logvar.reshape(-1, Z), **KEY, **keywords)
    return z.view(*z.shape[:-2], *mean.shape)


def assert_close(got, wanted):
    """The transformed call is plain PyTorch: the same noise, another exp."""
    torch.testing.assert_close(got, wanted, rtol=8 * UNIT, atol=8 * UNIT)


def test_randomness_is_an_error_unless_it_is_chosen(pair):
    mean, logvar = pair
    for function in (
        lambda m, v: sample(m, v),
        lambda m, v: sample(mean[0], logvar[0]) + 0 * m,
        lambda m, v: m + fe.random.normal((B, Z), seed=0, device=mean.device),
        lambda m, v: torch.ops.fekernels.reparameterize(m, v, 0, 0, 0, 0, 1),
        lambda m, v: torch.ops.fekernels.philox_normal(m.clone(), 0, 0, 0, 0, 0),
    ):
        with pytest.raises(RuntimeError, match="called random operation.* randomness error mode"):
            torch.vmap(function)(mean, logvar)


def test_same_is_one_noise_for_all(pair):
    got = torch.vmap(sample, randomness="same")(*pair)
    assert_close(got, torch.stack([sample(*each) for each in zip(*pair, strict=True)]))


def test_different_is_the_noise_of_one_call_on_all_rows(pair):
    mean, logvar = pair
    different = torch.vmap(sample, randomness="different")
    assert_close(different(mean, logvar), stacked(mean, logvar))
    assert torch.equal(different(mean, logvar), different(mean, logvar))
    aside = torch.vmap(sample, in_dims=(2, None), out_dims=1, randomness="different")
    shared = logvar[:1].expand_as(logvar)
    assert_close(aside(mean.movedim(0, 2), logvar[0]).movedim(1, 0), stacked(mean, shared))
    constant = torch.vmap(lambda x: sample(mean[0], logvar[0]) + 0 * x, randomness="different")
    assert_close(constant(mean), stacked(mean[:1].expand_as(mean), shared))


def test_levels_of_vmap(pair):
    mean, logvar = (tensor.view(2, 3, B, Z) for tensor in pair)
    different = torch.vmap(sample, randomness="different")
    both = torch.vmap(different, randomness="different")
    assert_close(both(mean, logvar), stacked(mean, logvar))
    outer_same = torch.vmap(different, randomness="same")(mean, logvar)
    assert torch.equal(outer_same[1], different(mean[1], logvar[1]))
    inner_same = torch.vmap(torch.vmap(sample, randomness="same"), randomness="different")(mean, logvar)
    assert torch.equal(inner_same[:, 1], different(mean[:, 1], logvar[:, 1]))


def test_samples(pair):
    several = torch.vmap(
        lambda m, v: fe.reparameterize(m, v, samples=4, **KEY), out_dims=1, randomness="different"
    )
    assert_close(several(*pair), stacked(*pair, samples=4))


def test_gradients_of_instances(pair):
    leaves = [tensor.clone().requires_grad_() for tensor in pair]
    wanted = torch.autograd.grad(stacked(*leaves).pow(2).sum(), leaves)
    of_one = torch.func.grad(lambda m, v: sample(m, v).pow(2).sum(), argnums=(0, 1))
    for got, want in zip(torch.vmap(of_one, randomness="different")(*pair), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=20 * UNIT, atol=20 * UNIT)
    of_all = torch.vmap(sample, randomness="different")
    for got, want in zip(torch.autograd.grad(of_all(*leaves).pow(2).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=20 * UNIT, atol=20 * UNIT)


def test_batched_gradients_keep_the_noise_of_the_forward_pass(pair):
    leaves = [tensor[0].clone().requires_grad_() for tensor in pair]
    z = sample(*leaves)
    directions = torch.randn(4, B, Z, device=z.device)
    batched = torch.autograd.grad(z, leaves, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        for got, want in zip(
            batched, torch.autograd.grad(z, leaves, direction, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got[i], want, rtol=8 * UNIT, atol=0)


@pytest.mark.parametrize("kind", ["bits", "uniform", "normal"])
def test_draws(kind, backend):
    draw = getattr(fe.random, kind)
    key = dict(seed=3, offset=7, device=backend.device)

    def within(x):
        return draw((B, Z), **key) + 0 * x

    def raw(x):
        out = torch.zeros_like(x)
        getattr(torch.ops.fekernels, f"philox_{kind}")(out, 3, 0, 0, 7, 4)
        return out

    x = torch.zeros(N, B, Z, device=backend.device, dtype=draw(1, seed=0).dtype)
    for function in (within, raw):
        got = torch.vmap(function, randomness="different", in_dims=1)(x.movedim(0, 1))
        assert torch.equal(got, draw((N, B, Z), **key))
        assert torch.equal(torch.vmap(function, randomness="same")(x)[1], draw((B, Z), **key))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_raw_operators(randomness, pair):
    mean, logvar = pair
    forward, backward = torch.ops.fekernels.reparameterize, torch.ops.fekernels.reparameterize_backward
    numbers = KEY["seed"], KEY["stream"], KEY["step"], KEY["offset"]
    z = torch.vmap(lambda m, v: forward(m, v, *numbers, 2), out_dims=1, randomness=randomness)(mean, logvar)
    grad = torch.randn_like(z)
    slopes = torch.vmap(lambda g, v: backward(g, v, *numbers), in_dims=(1, 0), randomness=randomness)(
        grad, logvar
    )
    if randomness == "different":
        assert torch.equal(z, stacked(mean, logvar, samples=2))
        wanted = backward(grad.flatten(1, 2), logvar.flatten(0, 1), *numbers)
        assert all(torch.equal(s, w.view_as(s)) for s, w in zip(slopes, wanted, strict=True))
    else:
        assert torch.equal(z[:, 1], forward(mean[1], logvar[1], *numbers, 2))
        wanted = backward(grad[:, 1].contiguous(), logvar[1], *numbers)
        assert all(torch.equal(s[1], w) for s, w in zip(slopes, wanted, strict=True))


def test_chunks_do_not_repeat_the_noise_of_the_first(pair):
    with pytest.raises(RuntimeError, match="chunk_size"):
        torch.vmap(sample, randomness="different", chunk_size=4)(*pair)
    assert_close(
        torch.vmap(sample, randomness="same", chunk_size=4)(*pair)[5], sample(pair[0][5], pair[1][5])
    )


def test_the_default_generator_stays(pair):
    before = torch.get_rng_state()
    torch.vmap(sample, randomness="different")(*pair)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_compiled_vmap(randomness, pair):
    torch._dynamo.reset()

    def instances(mean, logvar):
        return torch.vmap(sample, randomness=randomness)(mean, logvar)

    compiled = torch.compile(instances, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*pair), instances(*pair))


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 2 * Z)

    def forward(self, x):
        mean, logvar = self.linear(x).chunk(2, -1)
        z = fe.reparameterize(mean, logvar, samples=2, **KEY)
        return z, fe.random.normal((x.shape[0], 3), seed=1, offset=2), fe.random.bits(x.shape[:-1], seed=1)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("shape", [(4, 5), (4, 7, 5)], ids=str)
def test_an_exported_program_takes_any_batch(strict, shape):
    encoder, b, t = Encoder(), torch.export.Dim("b"), torch.export.Dim("t")
    dynamic = {0: b} if len(shape) == 2 else {0: b, 1: t}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            encoder, (torch.randn(shape),), dynamic_shapes=(dynamic,), strict=strict
        ).module()
    for rows in (1, 4, 9):
        x = torch.randn(rows, *(2 + rows for _ in shape[1:-1]), 5)
        assert all(map(torch.equal, program(x), encoder(x)))
