"""The free energy's CUDA sources, run on the CPU, give the C++ kernels' bits: values and gradients, in every case.

The sums have one order on all devices, so what one gives the other must give without a tolerance.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from fekernels._catalogue.free_energy import MEAN, NONE, SUM
from tests.support.cuda_on_cpu import INVALID_VALUE, SUCCESS
from tests.support.cuda_on_cpu.free_energy import CATEGORICAL, FreeEnergyKernels
from tests.support.cuda_on_cpu.terms import (
    LIKELIHOODS,
    assert_bits_of_the_cpu,
    assert_same,
    make_latent,
    make_params,
    make_target,
    strided,
)
from tests.support.optimizers import BF16, F16, F32

SHAPES = [(1, 1), (3, 17), (5, 128), (2, 4097), (3, 8192), (130, 20), (0, 7), (4, 0)]


@pytest.fixture
def library(cuda_free_energy: ctypes.CDLL) -> ctypes.CDLL:
    return cuda_free_energy


@pytest.fixture
def kernels(library: ctypes.CDLL) -> FreeEnergyKernels:
    return FreeEnergyKernels(library)


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def both_orders(request: pytest.FixtureRequest, library: ctypes.CDLL):
    library.cuda_on_cpu_backwards(ctypes.c_bool(request.param))
    yield
    library.cuda_on_cpu_backwards(ctypes.c_bool(False))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_gives_the_cpu_kernels_bits(kernels, native, name, shape, both_orders):
    rows, columns = shape
    params, target = make_params(name, rows, columns), make_target(name, rows, columns)
    results = assert_bits_of_the_cpu(
        kernels, native, LIKELIHOODS[name][0], params, target, make_latent(rows, 20)
    )
    if rows and columns:
        assert all(r.isfinite().all() and r.count_nonzero() for r in results)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_extreme_values(kernels, native, name):
    """Every branch of the formulas; also infinities and NaN, which need not be sensible, only the same."""
    inf = float("inf")
    sizes = torch.tensor(
        [0.0, 1e-40, 1e-30, 1e-4, 0.4, 1.0, 2.5, 40.0, 800.0, 1e6, 1e15, 1e30, inf, float("nan")]
    )
    signed = torch.cat([sizes, -sizes])
    rows, columns = 60, 128

    def draw() -> Tensor:
        return signed[torch.randint(len(signed), (rows, columns))]

    params = [draw() for _ in range(LIKELIHOODS[name][1])]
    assert_bits_of_the_cpu(
        kernels, native, LIKELIHOODS[name][0], params, draw(), [draw(), draw()], reduction=NONE, needs=0
    )
    upstream = [torch.ones(rows)] * 2
    results = assert_bits_of_the_cpu(
        kernels, native, LIKELIHOODS[name][0], params, draw().abs(), [draw() for _ in range(4)],
        reduction=NONE, upstream=upstream,
    )  # fmt: skip
    assert all(0.1 < r.isfinite().float().mean() for r in results[3:])


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("rows, columns, latents", [(130, 20, 6), (9, 384, 260), (0, 5, 3), (3, 0, 0)])
def test_reductions_weights_and_upstream(kernels, native, reduction, rows, columns, latents, both_orders):
    params = make_params("gaussian_learned", rows, columns, ("full", "column"))
    given = {"weight": torch.randn(rows), "reduction": reduction}
    if reduction == NONE:
        given["upstream"] = [torch.randn(rows), torch.randn(rows)]
    latent = make_latent(rows, latents, ("column", "row"))
    weighted = assert_bits_of_the_cpu(
        kernels, native, 2, params, make_target("mse", rows, columns), latent, **given
    )
    assert weighted[0].shape == ((rows,) if reduction == NONE else ())
    assert_bits_of_the_cpu(
        kernels, native, 2, params, make_target("mse", rows, columns), latent, reduction=reduction, beta=0.0
    )


@pytest.mark.parametrize("reduction", [NONE, SUM])
@pytest.mark.parametrize("name", ["mse", "gaussian_learned", "student_t", "zero_inflated_negative_binomial"])
def test_padding_and_rows_of_weight_zero(kernels, native, name, reduction, both_orders):
    """Kernels with and without a mask; what does not count holds NaN."""
    for rows, columns in ((70, 132), (70, 20), (9, 131)):
        for kinds in ((), ("full", "column", "row")):
            params, target = make_params(name, rows, columns, kinds), make_target(name, rows, columns)
            latent, weight = (
                make_latent(rows, columns, ("row", "scalar")[: 2 * bool(kinds)]),
                torch.rand(rows),
            )
            for dropped in (0, rows - 2):
                weight[dropped] = 0.0
                for operand in (*params, *latent, target):
                    if len(operand) == rows:
                        operand[dropped] = float("nan")
            mask, there = torch.rand(rows, columns) < 0.5, torch.rand(1, columns).expand(rows, columns) < 0.5
            upstream = [torch.randn(rows), torch.randn(rows)] if reduction == NONE else []
            for padding in (None, mask, there):
                padded = [operand.clone() for operand in latent]
                for operand in padded[:2] if padding is not None else []:
                    operand[~padding] = float("nan")
                results = assert_bits_of_the_cpu(
                    kernels, native, LIKELIHOODS[name][0], params, target, padded, weight=weight,
                    upstream=upstream, reduction=reduction, latent_mask=padding,
                )  # fmt: skip
                assert all(r.isfinite().all() and r.count_nonzero() for r in results)


KINDS = ("full", "column", "row", "scalar")


@pytest.mark.parametrize("shape", [(130, 20), (70, 260), (65, 3), (1, 17), (6, 1), (1, 1), (0, 5)], ids=str)
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_operands_broadcast(kernels, native, first, second, shape, both_orders):
    rows, columns = shape
    weight = torch.randn(rows)
    for name, kinds in (
        ("laplace", (first, second)),
        ("student_t", (second, first, "column")),
        ("negative_binomial", (first, second)),
    ):
        params = make_params(name, rows, columns, kinds)
        target = make_target(name, rows, columns)
        assert_bits_of_the_cpu(kernels, native, LIKELIHOODS[name][0], params, target, weight=weight)
    assert_bits_of_the_cpu(
        kernels, native, 0, [], None, make_latent(rows, columns, (first, second)), weight=weight
    )


@pytest.mark.parametrize("target_type", [F32, BF16, F16])
@pytest.mark.parametrize("types", [(BF16, BF16), (F16, F16), (F32, BF16), (F16, F32)], ids=str)
@pytest.mark.parametrize("kinds", [("full", "full"), ("full", "column"), ("row", "full"), ("scalar", "row")])
def test_dtypes_mix(kernels, native, kinds, types, target_type):
    for rows, columns in ((70, 132), (5, 131)):
        params = make_params("gaussian_learned", rows, columns, kinds, types)
        target = make_target("mse", rows, columns, target_type)
        latent = [t.to(dtype) for t, dtype in zip(make_latent(rows, 36), types, strict=True)]
        results = assert_bits_of_the_cpu(kernels, native, 2, params, target, latent)
        assert tuple(r.dtype for r in results[3:]) == types * 2


@pytest.mark.parametrize("name", ["bernoulli", "gaussian_learned", "zero_inflated_negative_binomial"])
@pytest.mark.parametrize("gap, shift", [(0, 0), (4, 0), (3, 0), (4, 1), (8, 4)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_lie_anywhere(library, native, name, gap, shift, dtype):
    rows, columns = 7, 264
    count = LIKELIHOODS[name][1]
    params = [strided(p, gap, shift) for p in make_params(name, rows, columns, (), [dtype] * count)]
    target = make_target(name, rows, columns)
    for misaligned in (False, True):
        kernels = FreeEnergyKernels(library, misaligned)
        assert_bits_of_the_cpu(
            kernels, native, LIKELIHOODS[name][0], params, strided(target, gap), make_latent(rows, 8)
        )
        assert_bits_of_the_cpu(kernels, native, LIKELIHOODS[name][0], params, strided(target, gap, shift))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_masked_elements_are_out_even_where_they_hold_nan(kernels, native, name, both_orders):
    rows, columns = 70, 140
    for kinds in (("full",) * 3, ("column", "row", "column")):
        params = make_params(name, rows, columns, kinds)
        target = make_target(name, rows, columns)
        mask = torch.rand(rows, columns) > 0.3
        if kinds[0] == "full":
            mask = strided(mask, 3)
        mask[3] = False
        target[~mask] = float("nan")
        if kinds[0] == "full":
            params[0][~mask] = float("nan")
        for reduction in (NONE, SUM):
            upstream = [torch.randn(rows), torch.randn(rows)] if reduction == NONE else []
            results = assert_bits_of_the_cpu(
                kernels, native, LIKELIHOODS[name][0], params, target, mask=mask, upstream=upstream,
                reduction=reduction,
            )  # fmt: skip
            assert all(r.isfinite().all() for r in results)
            assert kinds[0] != "full" or (results[3][~mask] == 0).all()


@pytest.mark.parametrize("needs", range(8))
def test_only_the_wanted_gradients(kernels, native, needs):
    for kinds in (("full",) * 3, ("column",) * 3, ("scalar", "column", "row")):
        params = make_params("student_t", 66, 30, kinds)
        assert_bits_of_the_cpu(kernels, native, 7, params, make_target("mse", 66, 30), needs=needs)


@pytest.mark.parametrize("needs", [0, 1, 2, 5, 8, 12, 15])
def test_only_the_wanted_gradients_of_the_kl(kernels, native, needs):
    for prior in (("column", "column"), ("full", "full"), ("scalar", "row")):
        assert_bits_of_the_cpu(kernels, native, 0, [], None, make_latent(66, 12, prior), needs=needs)


@pytest.mark.parametrize("columns", [132, 131])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["mse", "bernoulli", "negative_binomial"])
def test_the_gradient_may_overwrite_the_prediction(kernels, native, name, dtype, columns, both_orders):
    count = LIKELIHOODS[name][1]
    params = make_params(name, 40, columns, ("full", "column")[:count], [dtype] * count)
    target = make_target(name, 40, columns)
    assert_bits_of_the_cpu(
        kernels, native, LIKELIHOODS[name][0], params, target, make_latent(40, 4), inplace=True
    )


def test_energy_alone_and_kl_alone(kernels, native):
    target = make_target("mse", 33, 40)
    results = assert_bits_of_the_cpu(kernels, native, 0, make_params("mse", 33, 40), target, reduction=NONE)
    assert torch.equal(results[0], results[1]) and not results[2].any()
    results = assert_bits_of_the_cpu(kernels, native, 0, [], None, make_latent(33, 40), reduction=NONE)
    assert not results[1].any()
    # beta times the KL: both are rounded to float32 once, from the same float64
    torch.testing.assert_close(results[0].double(), 1.7 * results[2].double(), rtol=2.01 * 2.0**-24, atol=0)


def test_many_rows(kernels, native, both_orders):
    """More rows than the last kernel has warps, and more than 256 to add up."""
    rows = 8300
    params = make_params("laplace", rows, 3, ("full", "scalar"))
    assert_bits_of_the_cpu(
        kernels, native, 6, params, make_target("mse", rows, 3), make_latent(rows, 2, ("column", "scalar"))
    )


def test_counts_that_are_nan_stay_nan(kernels, native):
    params, target = make_params("negative_binomial", 4, 12), make_target("negative_binomial", 4, 12)
    target[2, 5] = float("nan")
    results = assert_bits_of_the_cpu(kernels, native, 9, params, target, reduction=NONE, needs=0)
    assert results[0].isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("classes", [1, 3, 10, 128, 129, 300, 700, 1100, 4096, 4100, 9000])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_categorical(kernels, native, dtype, classes, both_orders):
    rows, positions = (2, 3) if classes > 1000 else (9, 5)
    logits = (torch.randn(rows, positions, classes) * 4.0).to(dtype)
    target = torch.randint(classes, (rows, positions))
    weight, mask = torch.randn(rows), torch.rand(rows, positions) > 0.3
    latent = make_latent(rows, 4)
    assert_bits_of_the_cpu(kernels, native, CATEGORICAL, [logits], target, latent, weight=weight)
    logits[~mask] = float("nan")
    for inplace in (False, True):
        results = assert_bits_of_the_cpu(
            kernels, native, CATEGORICAL, [logits], target, latent, mask=mask, reduction=SUM, inplace=inplace
        )
        assert results[3].isfinite().all() and (results[3][~mask] == 0).all()
    assert_bits_of_the_cpu(
        kernels, native, CATEGORICAL, [logits], target, mask=mask, reduction=NONE, needs=0, weight=weight
    )
    weight[1], logits[1] = 0.0, float("nan")
    results = assert_bits_of_the_cpu(
        kernels, native, CATEGORICAL, [logits], target, latent, mask=mask, weight=weight
    )
    assert results[3].isfinite().all() and not results[3][1].any()


def test_a_class_that_does_not_exist_makes_nan(kernels, native):
    logits, target = torch.randn(4, 1, 5), torch.tensor([[0], [5], [-1], [4]])
    results = assert_bits_of_the_cpu(
        kernels, native, CATEGORICAL, [logits], target, reduction=NONE, upstream=[torch.ones(4)] * 2
    )
    assert results[1].isnan().tolist() == [False, True, True, False]
    assert results[3].isnan().any(2).view(-1).tolist() == [False, True, True, False]


def test_infinite_logits(kernels, native):
    logits = torch.randn(4, 1, 6)
    logits[0, 0, 2], logits[1, 0, 3], logits[2] = float("-inf"), float("inf"), float("-inf")
    results = assert_bits_of_the_cpu(
        kernels, native, CATEGORICAL, [logits], torch.zeros(4, 1, dtype=torch.int64), reduction=NONE,
        upstream=[torch.ones(4)] * 2,
    )  # fmt: skip
    assert results[1].isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("offset", [0, 3, 2**33 + 1])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (F16, F32), (F32, BF16)], ids=str)
def test_reparameterize(library, native, types, samples, offset, both_orders):
    for rows, latents in ((7, 20), (1, 1), (5, 3), (300, 8), (0, 4), (3, 0)):
        mean, logvar = torch.randn(rows, latents).to(types[0]), torch.randn(rows, latents).to(types[1])
        grad = torch.randn(samples, rows, latents).to(types[0])
        key = (-0x123456789ABCDEF, 2**32 - 2, 17, offset)
        for misaligned in (False, True):
            kernels = FreeEnergyKernels(library, misaligned)
            z = kernels.reparameterize(mean, logvar, *key, samples)
            assert_same([z], [native.reparameterize(mean, logvar, *key, samples)])
            assert_same(
                kernels.reparameterize_backward(grad, logvar, *key),
                native.reparameterize_backward(grad, logvar, *key),
            )


def test_reparameterize_loops_over_its_blocks(kernels, native):
    mean, logvar = torch.randn(4500, 500), torch.zeros(4500, 500)
    key = (5, 0, 1, 0)
    assert_same(
        [kernels.reparameterize(mean, logvar, *key, 1)], [native.reparameterize(mean, logvar, *key, 1)]
    )
    assert_same(
        kernels.reparameterize_backward(mean[None], logvar, *key),
        native.reparameterize_backward(mean[None], logvar, *key),
    )


@pytest.mark.parametrize("factor", [1.0, 0.37, 0.0])
def test_scale(kernels, factor, both_orders):
    shapes = [
        ((3, 5), F32, 0),
        ((70, 130), F32, 0),
        ((70, 130), BF16, 0),
        ((33, 9), F16, 1),
        ((0,), F32, 0),
        ((41,), F32, 3),
    ]
    buffers, tensors = [], []
    for shape, dtype, shift in shapes:
        count = torch.Size(shape).numel()
        buffers.append(torch.randn(count + 64).to(dtype))
        tensors.append(buffers[-1][32 + shift : 32 + shift + count])
    tensors[1][5] = float("inf")
    expected = [b.clone() for b in buffers]
    for (_, dtype, shift), buffer, tensor in zip(shapes, expected, tensors, strict=True):
        part = buffer[32 + shift : 32 + shift + tensor.numel()]
        part.copy_((part.float() * factor).to(dtype))
    assert kernels.scale_(tensors, torch.tensor(factor)) == SUCCESS
    assert_same(buffers, expected)


def test_scaling_by_one_reads_and_writes_nothing(kernels):
    class Elsewhere:
        dtype = F32

        def data_ptr(self) -> int:
            return 64

        def numel(self) -> int:
            return 1000

    assert kernels.scale_([Elsewhere()], torch.tensor(1.0)) == SUCCESS  # type: ignore[list-item]
    assert kernels.scale_([Elsewhere()], torch.tensor(2.0)) != SUCCESS  # type: ignore[list-item]


def test_too_many_tensors_to_scale_are_refused_with_nothing_changed(kernels):
    tensors = [torch.ones(3) for _ in range(9)]
    assert kernels.scale_(tensors, torch.tensor(2.0)) == INVALID_VALUE
    assert all((tensor == 1).all() for tensor in tensors)
