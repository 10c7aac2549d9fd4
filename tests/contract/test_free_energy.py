"""The free energy's kernels: every backend against float64, the bits that must agree, the memory that they touch."""

from dataclasses import replace

import pytest
import torch

from tests.support.free_energy import (
    CATEGORICAL,
    KINDS,
    LIKELIHOOD,
    MEAN,
    NAMES,
    NONE,
    SHAPES,
    SUM,
    Arguments,
    arguments,
)
from tests.support.places import ISAS, Place, instruction_set

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPP = Place("cpp", "cpu")


def without(something: bool) -> dict[str, bool]:
    """A call in which elements, latents and a row do not count, or one in which everything does."""
    return dict.fromkeys(("masked", "padded", "dropped"), something)


def assert_close(results: list[torch.Tensor], call: Arguments) -> None:
    """Within the rounding of the results' dtypes."""
    exact, scales = call.exact(), call.scales()
    assert len(results) == len(exact)
    for i, (result, wanted, scale) in enumerate(zip(results, exact, scales, strict=True)):
        assert result.shape == wanted.shape
        dtype = torch.float32 if i < 3 else call.operands[i - 3].dtype
        assert result.dtype == dtype
        if wanted.numel() == 0:
            continue
        error = (result.double().cpu() - wanted).abs().max()
        assert error <= (1e-6 + torch.finfo(dtype).eps) * scale, (i, float(error), float(scale))


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.cpu().nan_to_num(), b.cpu().nan_to_num()), i


@LIKELIHOOD
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM], ids=["none", "mean", "sum"])
def test_against_float64(likelihood, kind, reduction, place, poisoned):
    for masked in (False, True):
        call = arguments(likelihood, kind=kind, reduction=reduction, **without(masked))
        assert_close(call.run(place), call)


@LIKELIHOOD
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(likelihood, shape, place, poisoned):
    rows, columns, _ = shape
    for kind, reduction in (("full", SUM), ("column", NONE), ("row", SUM)):
        call = arguments(likelihood, shape, kind, reduction=reduction)
        assert_close(call.run(place), call)
    if rows == 0:
        values = arguments(likelihood, shape, reduction=MEAN).run(place)[:3]
        assert all(value.isnan() for value in values)
    if columns == 0:
        assert not call.run(place)[1].any()


@LIKELIHOOD
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(likelihood, dtype, place, poisoned):
    for kind in KINDS[:3]:
        call = arguments(likelihood, (66, 150, 9), kind, dtype)
        assert_close(call.run(place), call)
    mixed = replace(call, latent=[tensor.float() for tensor in call.latent])
    assert_close(mixed.run(place), mixed)


@LIKELIHOOD
def test_what_is_unobserved_is_exactly_zero(likelihood, place):
    call = arguments(likelihood, masked=True)
    gradient = call.run(place)[3].cpu()
    assert not gradient[~call.mask].any()
    assert gradient[call.mask].isfinite().all()
    nothing = replace(call, mask=torch.zeros_like(call.mask))
    results = nothing.run(place)
    assert results[1].item() == 0.0
    assert not any(result.any() for result in results[3 : 3 + len(call.params)])


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("latents", [3, 16, 40, 300, 4099])
def test_padding_is_exactly_zero(latents, prior, place):
    """In rows of every kind of loop: narrow ones together, flat ones, blocks, segments."""
    for dtype in DTYPES[:2]:
        call = arguments(0, (37, 2, latents), dtype=dtype, padded=True, prior=prior)
        results = call.run(place)
        assert_close(results, call)
        for gradient in results[4:6]:
            assert not gradient.cpu()[~call.latent_mask].any()
        nothing = replace(call, latent_mask=torch.zeros_like(call.latent_mask)).run(place)
        assert nothing[2].item() == 0.0 and not any(gradient.any() for gradient in nothing[4:])


@LIKELIHOOD
@pytest.mark.parametrize("columns", [3, 16, 40, 300, 4099])
def test_a_row_of_weight_zero_is_exactly_zero(likelihood, columns, place):
    if likelihood == CATEGORICAL and columns > 300:
        columns = 7
    for kind, reduction in (("full", SUM), ("column", MEAN), ("row", NONE)):
        call = arguments(likelihood, (37, columns, columns), kind, reduction=reduction, dropped=True)
        if reduction == NONE:
            call.upstream[0][18] = call.upstream[1][18] = (
                torch.inf
            )  # a factor from above does not bring it back
        results = call.run(place)
        finite = replace(call, upstream=[u.nan_to_num(posinf=1.0) for u in call.upstream])
        assert_close(results, finite)
        for operand, gradient in zip(call.operands, results[3:], strict=True):
            if len(operand) == 37:
                assert not gradient[18].any()
        if reduction == NONE:
            assert [value[18].item() for value in results[:3]] == [0.0] * 3


@LIKELIHOOD
def test_instruction_sets_and_threads_agree(likelihood):
    if (obstacle := CPP.obstacle()) is not None:
        pytest.skip(obstacle)
    wide = (70, 5000, 3) if likelihood != CATEGORICAL else (70, 300, 3)
    for kind, dtype in (("full", torch.float32), ("column", torch.bfloat16), ("row", torch.float32)):
        call = arguments(likelihood, wide, kind, dtype, **without(True))
        torch.set_num_threads(1)
        wanted = call.run(CPP)
        torch.set_num_threads(2)
        assert_same_bits(call.run(CPP), wanted)
        for isa in ISAS:
            with instruction_set(isa):
                assert_same_bits(call.run(CPP), wanted)


@LIKELIHOOD
def test_a_row_does_not_depend_on_its_batch(likelihood, place):
    call = arguments(likelihood, (70, 513, 21), reduction=NONE, prior=False, **without(True))
    whole = call.run(place)
    assert_same_bits(call.run(place), whole)
    for begin, end in ((0, 1), (13, 30), (69, 70)):
        assert_same_bits(call.rows(begin, end).run(place), [result[begin:end] for result in whole])


def test_row_strides_are_heeded(place):
    call = arguments(NAMES.index("gaussian2"), (6, 150, 9))
    wanted = call.run(place)

    def spread(tensor):
        return torch.cat((tensor, torch.full_like(tensor, torch.nan)), dim=1)[:, : tensor.shape[1]]

    moved = call.to(place.device)  # which would pack the rows again
    laid_out = replace(
        moved,
        params=[spread(tensor) for tensor in moved.params],
        target=spread(moved.target),
        latent=[spread(tensor) for tensor in moved.latent],
    )
    assert_same_bits(laid_out.run(place), wanted)


@pytest.mark.parametrize("needs", range(1, 16))
def test_only_what_is_needed(needs, place):
    call = arguments(NAMES.index("gaussian2"), prior=False)
    everything = call.run(place)
    some = call.run(place, needs)
    assert_same_bits(some[:3], everything[:3])
    assert_same_bits(some[3:], [g for i, g in enumerate(everything[3:]) if needs >> i & 1])


@LIKELIHOOD
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_inplace_is_the_same_in_other_memory(likelihood, dtype, place):
    call = arguments(likelihood, dtype=dtype).to(place.device)
    wanted = call.run(place)
    got = replace(call, inplace=True).run(place)
    assert_same_bits(got, wanted)
    assert got[3].data_ptr() == call.params[0].data_ptr()


def test_energy_or_kl_alone(place):
    both = arguments(NAMES.index("bernoulli1"))
    energy, kl = replace(both, latent=[]), replace(both, params=[], target=None)
    wanted = both.run(place)
    assert_same_bits(energy.run(place)[1:2] + energy.run(place)[3:], wanted[1:2] + wanted[3:4])
    assert_same_bits(kl.run(place)[2:3] + kl.run(place)[3:], wanted[2:3] + wanted[4:])
    assert energy.run(place)[2].item() == 0.0 and kl.run(place)[1].item() == 0.0


def test_a_class_that_does_not_exist_is_nan(place):
    call = arguments(CATEGORICAL, reduction=NONE)
    for impossible in (-1, 5):
        call.target[2, 3] = impossible
        results = call.run(place)
        assert results[1].isnan().tolist() == [False, False, True, False, False]
        assert results[3].isnan().any(-1).nonzero().tolist() == [[2, 3]]


def test_many_classes(place):
    for classes in (1, 127, 128, 129, 5000):
        call = arguments(CATEGORICAL, (3, 4, 2))
        call = replace(
            call, params=[4 * torch.randn(3, 4, classes)], target=torch.randint(0, classes, (3, 4))
        )
        assert_close(call.run(place), call)


@pytest.mark.parametrize("likelihood", [0, 3], ids=["mse", "bernoulli"])
def test_large_results(likelihood):
    """Above 1 MB a gradient's memory is used again for the next one, above 16 MB it is written past the caches."""
    if (obstacle := CPP.obstacle()) is not None:
        pytest.skip(obstacle)
    torch.set_num_threads(2)
    call = arguments(likelihood, (1100, 4096, 2), prior=False)
    first, alive = call.run(CPP), call.run(CPP)
    assert first[3].data_ptr() != alive[3].data_ptr()
    kept = alive[3].clone()
    address = first[3].data_ptr()
    assert_same_bits(first, alive)
    del first
    other = replace(call, params=[call.params[0] + 1])
    again = other.run(CPP)
    assert again[3].data_ptr() == address
    assert_same_bits([alive[3]], [kept])
    with instruction_set("baseline"):
        assert_same_bits(other.run(CPP), again)
    assert_close(again, other)


def test_memory_outlives_its_maker():
    """A gradient stays whole when everything that it came from is gone, and while others come and go."""
    if (obstacle := CPP.obstacle()) is not None:
        pytest.skip(obstacle)
    held = []
    for value in range(20):
        params = [torch.full((600, 1000), float(value))]
        zero = torch.zeros(600, 1000)
        results = Arguments(params, zero, None, [], None, [], 0, SUM).run(CPP)
        if value % 3 == 0:
            held.append((value, results[3]))
    assert all(torch.equal(gradient, torch.full_like(gradient, 2.0 * value)) for value, gradient in held)
