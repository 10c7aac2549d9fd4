"""The Triton kernels of the free energy and the reparameterisation, without a GPU: interpreted, and compiled ahead.

Interpreted, values are near those of the reference and elementwise gradients have the bits of the C++ kernels (where
this Triton rounds an fma once). What runs them on a GPU is contract/test_optimizers.py.
"""

import itertools
import re

import pytest
import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL, LIKELIHOODS, MEAN, NONE, SUM, Target
from fekernels._runtime import extension
from fekernels.reference import random as noise
from fekernels.reference.free_energy import free_energy as reference
from tests.support.places import Place
from tests.support.tensors import bits_equal

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.triton import free_energy_machine_code as aot  # noqa: E402
from tests.support.triton.worker import interpreter  # noqa: E402

CODES = [
    pytest.param(code, id=f"{code}-{row.name}") for code, row in enumerate(LIKELIHOODS) if not row.classes
]
SHAPES = ((1, 1), (3, 17), (2, 600), (130, 20))  # and one of several segments, for three terms
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def run():
    with interpreter() as call:
        yield call


@pytest.fixture(scope="module")
def same_bits(run):
    """Whether the interpreter's bits are the C++ kernels', and there are such kernels."""
    if Place("cpp", "cpu").obstacle() is not None:
        return False
    extension.load()
    return run("fuses")


def parameter(code: int, i: int, shape: tuple[int, int]) -> Tensor:
    value = torch.randn(shape)
    return value.exp() if LIKELIHOODS[code].parameters[i].not_negative else value


def case(
    code: int, rows: int, columns: int, kinds: str = "fff", reduction: int = NONE, dtypes=(torch.float32,), mask=False,
    weight=False, prior: str = "", upstream=False, inplace=False, without=False,
):  # fmt: skip
    """Arguments of `free_energy` with every gradient wanted. kinds: full, column, row, scalar, by operand.

    without: some latents are padding, and some rows have a weight of 0; both hold NaN.
    """

    def shape(kind: str, width: int) -> tuple[int, int]:
        return (rows if kind in "fr" else 1, width if kind in "fc" else 1)

    turn = itertools.cycle(dtypes)
    count = len(LIKELIHOODS[code].parameters)
    params = [parameter(code, i, shape(kinds[i], columns)).to(next(turn)) for i in range(count)]
    target = (
        torch.poisson(torch.ones(rows, columns))
        if LIKELIHOODS[code].target is Target.COUNTS
        else torch.rand(rows, columns)
    )
    target = target.to(next(turn))
    latent = [torch.randn(rows, 5).to(next(turn)) for _ in range(2)]
    latent += [torch.randn(shape(kind, 5)).to(next(turn)) for kind in prior]
    seen = None
    if mask:
        seen = torch.rand(rows, columns) < 0.7
        target[~seen] = torch.nan
        if kinds[0] == "f":
            params[0][~seen] = torch.nan
    up = [torch.randn(rows), torch.randn(rows)] if upstream else []
    weights, latent_mask = torch.rand(rows) if weight or without else None, None
    if without:
        latent_mask = torch.rand(rows, 5) < 0.7
        for operand in latent[:2]:
            operand[~latent_mask] = torch.nan
        dropped = torch.rand(rows) < 0.3
        weights[dropped] = 0.0
        for operand in (*params, target, *latent):
            if len(operand) == rows:
                operand[dropped] = torch.nan
    needs = (1 << len(params) + len(latent)) - 1
    return (
        params,
        target,
        seen,
        latent,
        weights,
        up,
        code,
        reduction,
        0.7,
        needs,
        inplace,
        latent_mask,
    )


def clone(arguments):
    return tuple([t.clone() for t in a] if isinstance(a, list) else a for a in arguments)


def assert_as_reference(got: list[Tensor], arguments, exact: list[Tensor]) -> None:
    rows, columns = arguments[1].shape[:2]
    for i, (value, wanted) in enumerate(zip(got, exact, strict=True)):
        assert value.shape == wanted.shape and value.dtype == wanted.dtype, i
        # Both are rounded to the dtype, perhaps to neighbours; float32 has the errors of free_energy/test_numerics.py.
        step = max(torch.finfo(value.dtype).eps, 2e-6)
        # A sum of n terms of mixed sign has n times one's absolute error at most.
        terms = max(rows * columns // max(value.numel(), 1), 1)
        limit = step * wanted.double().abs() + 3e-7 * terms + step
        wrong = (value.double() - wanted.double()).abs() > limit
        assert not wrong.any() and torch.equal(value.isnan(), wanted.isnan()), (i, value, wanted)


@pytest.fixture
def check(run, same_bits):
    """check(*cases): each interpreted, against the reference, and full gradients against the C++ kernels' bits."""

    def compare(*cases):
        exact = [reference.free_energy(*clone(arguments)) for arguments in cases]
        peers = [
            torch.ops.fekernels_native.free_energy(*clone(arguments)) if same_bits else None
            for arguments in cases
        ]
        results = run("free_energy", cases)
        for got, arguments, wanted, peer in zip(results, cases, exact, peers, strict=True):
            assert_as_reference(got, arguments, wanted)
            operands = [*arguments[0], *arguments[3]]
            for operand, gradient, other in zip(operands, got[3:], peer[3:] if peer else [], strict=False):
                if operand.shape[0] == arguments[1].shape[0] and operand.dim() == 2 and operand.shape[1] > 1:
                    assert bits_equal(gradient, other), arguments
        return results

    return compare


@pytest.mark.parametrize("code", CODES)
def test_every_likelihood(check, code):
    check(
        *(case(code, *shape, reduction=i % 3, upstream=i % 3 == NONE) for i, shape in enumerate(SHAPES)),
        case(code, 37, 130, "fcr", SUM, DTYPES, weight=True, prior="cs"),
        case(code, 9, 33, "csf", MEAN, DTYPES[1:], mask=True, prior="rf"),
        case(code, 40, 24, "rfc", NONE, DTYPES, weight=True, upstream=True, prior="fc"),
        case(code, 40, 24, "ffc", SUM, without=True),
        case(code, 40, 24, "frs", NONE, DTYPES, mask=True, prior="rf", without=True),
    )


def test_rows_of_several_segments(check):
    check(
        *(case(code, 2, columns, reduction=code % 3) for code, columns in ((0, 4097), (3, 8200), (7, 2049)))
    )


def test_empty_batches_and_events(check):
    for reduction in (NONE, MEAN, SUM):
        check(case(2, 0, 4, "fc", reduction, weight=True), case(2, 4, 0, "fc", reduction, prior="cc"))


def test_aligned_low_precision_rows(check):
    """Groups of eight 16-bit elements, beside groups of four float32."""
    check(
        *(case(0, 6, 2056, reduction=MEAN, dtypes=(dtype,)) for dtype in DTYPES[1:]),
        case(2, 6, 2056, "ff", SUM, DTYPES[:2], mask=True),
    )


@pytest.mark.parametrize("code", [0, 3, CATEGORICAL])
def test_inplace_writes_over_the_first_parameter(run, code):
    if code == CATEGORICAL:
        arguments = (
            [torch.randn(4, 3, 7)],
            torch.randint(0, 7, (4, 3)),
            None,
            [],
            None,
            [],
            code,
            MEAN,
            1.0,
            1,
            True,
        )
    else:
        arguments = case(code, 5, 24, reduction=MEAN, inplace=True)[:11]
    apart = run("free_energy", [(*arguments[:-1], False)])[0]
    (params, *_), got = run("free_energy_and_arguments", *arguments)
    assert params[0].data_ptr() == got[3].data_ptr()
    assert all(bits_equal(x, y) for x, y in zip(got, apart, strict=True))


def test_rows_do_not_depend_on_the_batch(run):
    whole = case(3, 37, 1100, weight=True, upstream=True)
    part = tuple(
        [t[5:6] for t in a] if isinstance(a, list) else a[5:6] if isinstance(a, Tensor) else a for a in whole
    )
    got, alone = run("free_energy", [whole, part])
    assert all(bits_equal(x[5:6], y) for x, y in zip(got, alone, strict=True))


def test_sums_are_right_to_the_last_digits(run):
    """Sums of 100,000 terms, where float32 alone would lose three digits."""
    arguments = case(0, 2, 100_003)
    got = run("free_energy", [arguments])[0]
    exact = reference.free_energy(*arguments)
    torch.testing.assert_close(got[1], exact[1], rtol=1e-7, atol=0)


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_categorical(check, reduction):
    cases = []
    for (rows, positions, classes), dtype in zip(
        ((1, 1, 1), (3, 5, 17), (2, 2, 4100), (40, 1, 16), (0, 3, 2), (4, 0, 3)), itertools.cycle(DTYPES)
    ):
        logits = torch.randn(rows, positions, classes).to(dtype)
        target = torch.randint(0, classes, (rows, positions))
        up = [torch.randn(rows), torch.randn(rows)] if reduction == NONE else []
        mask = None
        if classes == 17:
            mask = torch.rand(rows, positions) < 0.5
            logits[~mask] = torch.nan
        weight = torch.rand(rows)
        if rows > 1:
            weight[1], logits[1] = 0.0, torch.nan
        cases.append(([logits], target, mask, [], weight, up, CATEGORICAL, reduction, 1.0, 1, False))
    check(*cases)


@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan")])
def test_scale(run, factor):
    tensors = [
        torch.randn(n).to(dtype)
        for n, dtype in ((1, DTYPES[0]), (4096, DTYPES[1]), (0, DTYPES[0]), (77, DTYPES[2]))
    ]
    tensors += [torch.full((9,), torch.inf), torch.randn(3, 8)]
    got = run("scale_", tensors, torch.tensor(factor))
    for value, before in zip(got, tensors, strict=True):
        assert value.dtype == before.dtype
        assert torch.equal(
            value.nan_to_num(-3.0), (before.float() * factor).to(before.dtype).nan_to_num(-3.0)
        )


@pytest.mark.parametrize("offset", [0, 3, 2**33 + 1])
def test_reparameterize(run, same_bits, offset):
    seed, stream, step = 5, 2**32 - 2, 7
    for (rows, width), dtype, samples in (
        ((1, 1), DTYPES[0], 1),
        ((130, 20), DTYPES[1], 3),
        ((70, 9), DTYPES[0], 2),
    ):
        mean, logvar = torch.randn(rows, width).to(dtype), torch.randn(rows, width)
        grad = torch.randn(samples, rows, width).to(dtype)
        key = (seed, stream, step, offset)
        got = [
            run("reparameterize", mean, logvar, *key, samples),
            *run("reparameterize_backward", grad, logvar, *key),
        ]
        eps = torch.empty(samples, rows * width)
        for k in range(samples):
            noise.philox_normal(eps[k], seed, (stream + k) % 2**32, step, offset * width, 3)
        eps = eps.view(samples, rows, width).double()
        sd = torch.exp(logvar.double() / 2)
        exact = [mean + sd * eps, grad.double().sum(0), (grad * eps).sum(0) * sd / 2]
        # 1.5e-6 of a normal where an fma is rounded twice, and a few roundings of float32; then one to the dtype.
        size, above = 1 + eps.abs(), grad.double().abs()
        scales = [mean.abs() + sd * size, above.sum(0), (above * size).sum(0) * sd / 2]
        of = (dtype, dtype, torch.float32)
        for value, wanted, scale, kind in zip(got, exact, scales, of, strict=True):
            assert value.dtype == kind
            limit = 2e-6 * scale + torch.finfo(kind).eps / 2 * wanted.abs()
            assert ((value.double() - wanted).abs() <= limit).all()
        if same_bits:
            native = torch.ops.fekernels_native
            assert bits_equal(got[0], native.reparameterize(mean, logvar, *key, samples))
            for value, peer in zip(got[1:], native.reparameterize_backward(grad, logvar, *key), strict=True):
                assert bits_equal(value, peer)


# Machine code.


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, id=f"{name}-sm_{capability}")
        for name in aot.PARAMS
        for capability in CAPABILITIES
        if capability == 90 or name in ("mse", "bernoulli", "normal_kl", "zero_inflated_negative_binomial")
    ],
)
def test_compiled_term_keeps_to_registers_and_whole_vectors(name, capability):
    code = aot.term(name, capability)
    assert code.spills == 0 and code.local == 0
    # Reductions over the warps' totals alone go through shared memory.
    assert code.shared <= 32
    operands, gradients = aot.PARAMS[name] + ("kl" not in name), aot.PARAMS[name]
    vectors = aot.free_energy.TILE[name] // (4 * 32 * aot.free_energy.WARPS)
    assert (code.loads_128, code.stores_128) == (operands * vectors, gradients * vectors)
    assert not code.fuses and not re.search(r"\.(?:approx|full|ftz)\b", code.ptx)


@pytest.mark.parametrize(
    "name", ["finalize", "categorical", "scale", "reparameterize", "reparameterize_backward"]
)
@pytest.mark.parametrize("capability", [90])
def test_other_compiled_kernels_keep_to_registers(name, capability):
    code = aot.other(name, capability)
    assert code.spills == 0 and code.local == 0
    assert (code.loads_128, code.stores_128) == {
        "finalize": (0, 0), "categorical": (2, 2), "scale": (2, 2), "reparameterize": (2, 1),
        "reparameterize_backward": (2, 2),
    }[name]  # fmt: skip


def test_compiled_variants_keep_to_registers():
    for name, options, vectors in (
        ("mse", dict(dtype="*bf16"), (2, 1)),
        ("bernoulli", dict(dtype="*bf16"), (2, 1)),
        ("normal_kl", dict(columns=32), (2, 2)),
        ("negative_binomial", dict(shapes=(0, 1, 0, 0)), (2, 1)),
    ):
        code = aot.term(name, 90, **options)
        assert code.spills == 0 and code.local == 0, name
        assert (code.loads_128, code.stores_128) == vectors, name
