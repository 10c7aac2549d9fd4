"""reparameterize: the same noise wherever and however a batch is split, its gradients, and its arguments."""

import warnings

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import fekernels as fe
from tests.support.implementations import ISAS, Place, instruction_set
from tests.support.optimizers import SEED
from tests.support.tensors import UNIT

CPP = Place("cpp", "cpu")
LATENT = 3  # purpose of the noise


def latents(rows, columns, dtype=torch.float32, device="cpu"):
    return [torch.randn(rows, columns, device=device).to(dtype).requires_grad_() for _ in range(2)]


def assert_sample(z, mean, logvar, eps):
    """mean + e^(logvar/2) eps: two roundings' worth in e^x (1.2e-7), one of the product, one of the sum."""
    spread = torch.exp(logvar.double() / 2) * eps.double()
    error = (z.double() - (mean.double() + spread)).abs()
    assert (error <= UNIT * (mean.abs() + 4 * spread.abs()) * 1.01).all()


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 0), (5, 7), (130, 20), (9, 1001)], ids=str)
def test_it_is_the_formula(shape, backend, poisoned):
    mean, logvar = latents(*shape, device=backend.device)
    z = fe.reparameterize(mean, logvar, seed=SEED, step=5, stream=2, offset=11)
    eps = fe.random.normal(
        shape, seed=SEED, step=5, stream=2, offset=11 * shape[1], purpose=LATENT, device=backend.device
    )
    assert_sample(z, mean, logvar, eps)
    grad = torch.randn_like(z)
    z.backward(grad)
    assert torch.equal(mean.grad, grad)
    wanted = grad.double() * eps.double() * torch.exp(logvar.double() / 2) / 2
    # e^x and two products; half of that is exact
    torch.testing.assert_close(logvar.grad.double(), wanted, rtol=4.01 * UNIT, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4)], ids=str)
def test_no_samples_are_an_empty_tensor_with_gradients_of_zero(shape, compiled, backend):
    mean, logvar = (torch.randn(shape, device=backend.device).requires_grad_() for _ in range(2))
    draw = torch.compile(fe.reparameterize, backend="aot_eager") if compiled else fe.reparameterize
    z = draw(mean, logvar, seed=SEED, samples=0, stream=3)
    assert z.shape == (0, *shape) and z.dtype == mean.dtype
    z.sum().backward()
    assert (mean.grad == 0).all() and (logvar.grad == 0).all()


def test_instruction_sets_and_threads_agree_to_the_bit():
    if (obstacle := CPP.obstacle()) is not None:
        pytest.skip(obstacle)
    mean, logvar = latents(300, 257)

    def run():
        z = fe.reparameterize(mean, logvar, seed=3, samples=2)
        return [z, *torch.autograd.grad(z, (mean, logvar), torch.cos(z.detach()))]

    with fe.use_backend("cpp"):
        wanted = run()
        torch.set_num_threads(2)
        assert all(map(torch.equal, run(), wanted))
        for isa in ISAS:
            with instruction_set(isa):
                assert all(map(torch.equal, run(), wanted))


@pytest.mark.parametrize("columns", [1, 4, 7, 130])
def test_a_split_batch_is_the_whole(columns, backend):
    mean, logvar = latents(23, columns, device=backend.device)
    whole = fe.reparameterize(mean, logvar, seed=7, step=2, samples=2)
    at = 0
    for rows in (1, 9, 0, 13):
        part = fe.reparameterize(
            mean[at : at + rows], logvar[at : at + rows], seed=7, step=2, samples=2, offset=at
        )
        assert torch.equal(part, whole[:, at : at + rows])
        at += rows


def test_samples_are_streams(backend):
    mean, logvar = latents(6, 5, device=backend.device)
    several = fe.reparameterize(mean, logvar, seed=1, stream=4, samples=3)
    assert several.shape == (3, 6, 5)
    for k in range(3):
        assert torch.equal(several[k], fe.reparameterize(mean, logvar, seed=1, stream=4 + k))
    alone = fe.reparameterize(mean, logvar, seed=1, stream=4)
    assert not torch.equal(alone, fe.reparameterize(mean, logvar, seed=1, stream=4, step=1))
    assert not torch.equal(alone, fe.reparameterize(mean, logvar, seed=2, stream=4))


def test_moments():
    mean, logvar = torch.full((1000, 400), 3.0), torch.full((1000, 400), -1.0)
    z = fe.reparameterize(mean, logvar, seed=9).double()
    variance = torch.exp(torch.tensor(-1.0)).item()
    n = z.numel()
    assert abs(z.mean() - 3) < 5 * (variance / n) ** 0.5
    assert abs(z.var() - variance) < 5 * variance * (2 / n) ** 0.5


def test_layouts_and_float64(backend):
    mean, logvar = (torch.randn(7, 5, device=backend.device).mT for _ in range(2))
    z = fe.reparameterize(mean, logvar, seed=1)
    assert torch.equal(z, fe.reparameterize(mean.contiguous(), logvar.contiguous(), seed=1))
    in_float64 = fe.reparameterize(mean.double(), logvar.double(), seed=1)
    eps = fe.random.normal(z.shape, seed=1, purpose=LATENT, device=backend.device)
    assert in_float64.dtype == torch.float64
    torch.testing.assert_close(
        in_float64, mean + torch.exp(logvar.double() / 2) * eps, rtol=1e-14, atol=1e-14
    )
    assert_sample(z, mean, logvar, eps)
    image = torch.randn(2, 3, 4, device=backend.device)
    assert fe.reparameterize(image, image, seed=1).shape == (2, 3, 4)
    assert fe.reparameterize(image, image, seed=1, samples=2).shape == (2, 2, 3, 4)


def test_gradients_of_gradients(backend):
    mean, logvar = (
        tensor.detach().double().requires_grad_() for tensor in latents(2, 3, device=backend.device)
    )

    def function(mean, logvar):
        return fe.reparameterize(mean, logvar, seed=4, samples=2)

    assert torch.autograd.gradcheck(function, (mean, logvar))
    assert torch.autograd.gradgradcheck(function, (mean, logvar))
    single = [mean.detach().float().requires_grad_(), logvar.detach().float().requires_grad_()]
    seconds = []
    for pair in (single, [mean, logvar]):
        (first,) = torch.autograd.grad(function(*pair).pow(2).sum(), pair[1], create_graph=True)
        seconds.append(torch.autograd.grad(first.sum(), pair))
    # A dozen roundings, of the largest as terms may cancel.
    for single, double in zip(*seconds, strict=True):
        assert (single - double).abs().max() <= 12 * UNIT * double.abs().max()


def test_eager_and_compiled_are_the_same(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def sample(mean, logvar, step, offset):
        return fe.reparameterize(mean, logvar, seed=5, step=step, offset=offset)

    for rows in (4, 7, 9):
        pair = latents(rows, 6, device=backend.device)
        got, wanted = (
            sample(*pair, rows, 3 * rows),
            fe.reparameterize(*pair, seed=5, step=rows, offset=3 * rows),
        )
        assert torch.equal(got, wanted)
        factor = torch.randn_like(got)
        for one, other in zip(
            torch.autograd.grad(got, pair, factor), torch.autograd.grad(wanted, pair, factor), strict=True
        ):
            assert torch.equal(one, other)
        if rows == 4:
            compiled_once = counter.frame_count
    assert counter.frame_count == compiled_once


def test_opcheck(backend):
    mean, logvar = latents(4, 5, device=backend.device)
    torch.library.opcheck(torch.ops.fekernels.reparameterize.default, (mean, logvar, 1, 0, 2, 3, 2))
    grad = torch.randn(2, 4, 5, device=backend.device)
    torch.library.opcheck(
        torch.ops.fekernels.reparameterize_backward.default, (grad, logvar.detach(), 1, 0, 2, 3)
    )


def test_vmap_and_grad(backend):
    mean, logvar = (torch.randn(3, 4, 5, device=backend.device) for _ in range(2))

    def function(mean, logvar):
        return fe.reparameterize(mean, logvar, seed=2)

    got = torch.vmap(function, randomness="same")(mean, logvar)
    wanted = torch.stack([function(*pair) for pair in zip(mean, logvar, strict=True)])
    # Either may have what assert_sample allows.
    assert ((got - wanted).abs() <= 2 * UNIT * (mean.abs() + 4 * (wanted - mean).abs()) * 1.01).all()
    slope = torch.func.grad(lambda m: function(m, logvar[0]).sum())(mean[0])
    assert torch.equal(slope, torch.ones_like(slope))


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.quint8)


def test_numpy_numbers():
    mean, logvar = latents(3, 4)
    got = fe.reparameterize(
        mean,
        logvar,
        seed=np.uint64(7),
        step=np.int32(2),
        stream=np.array(1),
        offset=np.int8(3),
        samples=np.int64(2),
    )
    assert torch.equal(got, fe.reparameterize(mean, logvar, seed=7, step=2, stream=1, offset=3, samples=2))


def test_tensors_without_plain_memory(backend):
    # The imaginary part of a conjugate is a view that says "negate"; fake and meta tensors have no numbers at all.
    mean, logvar = (
        torch.randn(3, 4, dtype=torch.complex64, device=backend.device).conj().imag for _ in range(2)
    )
    grad = torch.randn(3, 4, dtype=torch.complex64, device=backend.device).conj().imag
    assert mean.is_neg() and grad.is_neg()
    results = []
    for plain in (False, True):
        pair = [
            (tensor.resolve_neg() if plain else tensor).detach().requires_grad_() for tensor in (mean, logvar)
        ]
        z = fe.reparameterize(*pair, seed=3)
        results.append([z.detach(), *torch.autograd.grad(z, pair, grad.resolve_neg() if plain else grad)])
    assert all(map(torch.equal, *results))
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(3, 4, device=backend.device, requires_grad=True)
        z = fe.reparameterize(fake, fake, seed=3, samples=2)
        assert z.shape == (2, 3, 4) and torch.autograd.grad(z.sum(), fake)[0].shape == (3, 4)


def test_meta_tensors_give_shapes():
    mean = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
    z = fe.reparameterize(mean, mean, seed=3, samples=2)
    assert z.is_meta and z.shape == (2, 3, 4) and z.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mean": [1.0]}, TypeError, "mean must be a tensor; got list"),
        ({"mean": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "mean must be float32.*got int64"),
        (
            {"logvar": torch.zeros(2, 4)},
            ValueError,
            r"logvar must have shape \(2, 3\) like mean; got \(2, 4\)",
        ),
        (
            {"mean": torch.zeros(()), "logvar": torch.zeros(())},
            ValueError,
            r"mean must have shape \(batch, ...\)",
        ),
        ({"mean": np.zeros((2, 3))}, TypeError, "mean must be a tensor; got ndarray"),
        ({"logvar": torch.zeros(2, 3).to_sparse()}, TypeError, "logvar must be dense; got layout sparse_coo"),
        ({"logvar": nested()}, TypeError, "logvar must be dense; got nested"),
        (
            {"mean": torch.zeros(2, 3, dtype=torch.float8_e4m3fn)},
            TypeError,
            "mean must be float32.*float8_e4m3fn",
        ),
        ({"mean": quantized()}, TypeError, "mean must be float32.*got quint8"),
        ({"seed": torch.tensor(1)}, TypeError, "seed must be an int; got Tensor"),
        ({"seed": 1.5}, TypeError, "seed must be an int; got float"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"stream": 1 << 32}, ValueError, "stream must be in"),
        ({"stream": (1 << 32) - 2, "samples": 3}, ValueError, "stream must be in"),
        ({"offset": -1}, ValueError, "offset must be in"),
        ({"offset": 1 << 50}, ValueError, "offset must be in"),
        ({"samples": -1}, ValueError, "samples must be in"),
    ],
)
def test_errors(change, error, message):
    arguments = {"mean": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), "seed": 1, **change}
    with pytest.raises(error, match=f"reparameterize: {message}"):
        fe.reparameterize(arguments.pop("mean"), arguments.pop("logvar"), **arguments)
