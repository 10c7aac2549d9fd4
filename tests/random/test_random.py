"""fe.random: the words and numbers of the contract, the same everywhere, and random."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import fekernels as fe
from tests.support.random import KINDS, LARGEST, assert_drawn
from tests.support.tensors import bits_equal


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (13,), (4, 5, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_shape_and_the_device_that_was_asked_for(kind, shape, place, poisoned):
    key = dict(seed=2**63 + 5, stream=0xDEADBEEF, step=0xFEEDF00D, offset=13, purpose=0xABCD)
    with fe.use_backend(place.backend):
        drawn = getattr(fe.random, kind)(shape, **key, device=place.device)
    assert drawn.shape == shape and drawn.device.type == place.device and drawn.dtype == KINDS[kind]
    assert_drawn(kind, drawn, **key)


@pytest.mark.parametrize("kind", KINDS)
def test_long_draws_are_the_contract(kind, place, poisoned):
    key = dict(seed=11, step=3, offset=7)
    count = (1 << 20) + 5 if kind == "bits" else 200_003  # the reference works in pieces of 2^20
    with fe.use_backend(place.backend):
        drawn = getattr(fe.random, kind)(count, **key, device=place.device)
    assert_drawn(kind, drawn, **key)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_the_slice_of_the_whole(kind, place):
    draw = getattr(fe.random, kind)
    with fe.use_backend(place.backend):
        whole = draw((40, 50), seed=5, stream=3, offset=2**34 - 100, device=place.device).flatten()
        for begin, end in ((0, 1), (1, 2), (3, 1999), (64, 128), (90, 110), (1999, 2000), (50, 50)):
            part = draw(end - begin, seed=5, stream=3, offset=2**34 - 100 + begin, device=place.device)
            assert bits_equal(part, whole[begin:end])


# Arguments.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(seed=2**64), ValueError, r"seed must be in \[-9223372036854775808, 18446744073709551616\)"),
        (dict(seed=1.0), TypeError, "seed must be an int; got float"),
        (dict(seed=True), TypeError, "seed must be an int; got bool"),
        (dict(stream=2**32), ValueError, r"stream must be in \[0, 4294967296\); got 4294967296"),
        (dict(stream=-1), ValueError, "stream must be in .* got -1"),
        (dict(step=2**32), ValueError, "step must be in"),
        (dict(step="1"), TypeError, "step must be an int; got str"),
        (dict(purpose=2**16), ValueError, r"purpose must be in \[0, 65536\); got 65536"),
        (dict(offset=-1), ValueError, "offset must be in .* got -1"),
        (dict(offset=2**50 - 3), ValueError, "offset must be in"),
        (dict(shape=-1), ValueError, "shape must be in .* got -1"),
        (dict(shape=(2, 1.5)), TypeError, r"shape\[1\] must be an int; got float"),
        (dict(shape=(2, -1)), ValueError, r"shape\[1\] must be in .* got -1"),
        (dict(shape=None), TypeError, "shape must be an int or a sequence of ints; got NoneType"),
        (dict(shape=2.5), TypeError, "shape must be an int or a sequence of ints; got float"),
        (dict(shape={2: 3}), TypeError, "shape must be an int or a sequence of ints; got dict"),
        (dict(shape=b"\x02"), TypeError, "shape must be an int or a sequence of ints; got bytes"),
        (dict(shape=(2**30, 2**30)), ValueError, r"shape must have at most 2\^50 elements; got \(1073741824"),
        (dict(seed=torch.tensor(1)), TypeError, "seed must be an int; got Tensor"),
        (dict(device="nonsense"), ValueError, "device must be a device; got 'nonsense'"),
        (dict(device=1.5), TypeError, "device must be a device or its name; got float"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(kind, change, error, message):
    with pytest.raises(error, match=f"random.{kind}: {message}"):
        getattr(fe.random, kind)(**{"shape": 4, "seed": 0, **change})


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_numbers(kind):
    draw = getattr(fe.random, kind)
    got = draw(
        (np.int64(2), 3), seed=np.uint64(2**63), stream=np.uint32(2), step=np.array(5), offset=np.int16(3)
    )
    assert bits_equal(got, draw((2, 3), seed=2**63, stream=2, step=5, offset=3))
    assert draw(np.int64(4), seed=0).shape == (4,) and draw(torch.Size([2, 2]), seed=0).shape == (2, 2)


def test_a_negative_seed_is_its_twos_complement():
    for negative in (-1, -(2**63)):
        assert bits_equal(fe.random.bits(8, seed=negative), fe.random.bits(8, seed=2**64 + negative))


def test_defaults_and_torch_seed():
    torch.manual_seed(1)
    first = fe.random.bits(4, seed=0)
    torch.manual_seed(2)
    assert bits_equal(first, fe.random.bits((2, 2), seed=0, stream=0, step=0, offset=0, purpose=4).flatten())


# Randomness. n draws; bounds are 5 standard errors.

N = 2_000_000


@pytest.fixture(scope="module")
def normals():
    return fe.random.normal(N, seed=2024, purpose=0, step=1).double()


def within(value, mean, standard_error):
    assert abs(float(value) - mean) < 5 * standard_error, (float(value) - mean) / standard_error


def test_moments_of_normals(normals):
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        within(normals.pow(power).mean(), mean, math.sqrt(variance / N))


def test_moments_of_uniforms():
    u = fe.random.uniform(N, seed=2024).double()
    assert 0 < u.min() and u.max() <= 1
    for power in (1, 2, 3, 4):
        mean = 1 / (power + 1)
        within(u.pow(power).mean(), mean, math.sqrt((1 / (2 * power + 1) - mean**2) / N))


def test_distribution_of_normals(normals):
    assert normals.abs().max() <= LARGEST
    assert stats.kstest(normals.numpy(), "norm").pvalue > 5.7e-7  # 5 standard deviations, two-sided
    for z in (3.0, 4.0, 4.5):
        tail = 2 * stats.norm.sf(z)
        within((normals.abs() > z).double().mean(), tail, math.sqrt(tail / N))


def test_distribution_of_words():
    words = fe.random.bits(N, seed=7).numpy().view(np.uint32)
    for shift in (0, 8, 16, 24):
        counts = np.bincount(words >> shift & 0xFF, minlength=256)
        assert stats.chisquare(counts).pvalue > 5.7e-7
    for bit in range(32):
        within((words >> bit & 1).mean(), 0.5, 0.5 / math.sqrt(N))


def test_elements_of_a_draw_are_independent(normals):
    for lag in (1, 2, 3, 4, 8, 64):
        a, b = normals[:-lag], normals[lag:]
        within((a * b).mean(), 0, 1 / math.sqrt(N))
        within(((a * a - 1) * (b * b - 1)).mean(), 0, 2 / math.sqrt(N))
    a, b = normals.view(-1, 2).T  # the two of a Box-Muller pair share a radius
    within(((a * a - 1) * (b * b - 1)).mean(), 0, 2 / math.sqrt(N / 2))


@pytest.mark.parametrize(
    "other",
    [
        dict(stream=1),
        dict(stream=2**31),
        dict(step=2),
        dict(step=2**31 + 1),
        dict(purpose=1),
        dict(purpose=4),
        dict(seed=2025),
        dict(seed=2024 + 2**32),
        dict(offset=4 * 2**32),
    ],
    ids=str,
)
def test_other_draws_are_other_and_uncorrelated(other, normals):
    drawn = fe.random.normal(N, **{"seed": 2024, "purpose": 0, "step": 1, **other}).double()
    assert (drawn == normals).double().mean() < 1e-5
    within((drawn * normals).mean(), 0, 1 / math.sqrt(N))
    within(((drawn * drawn - 1) * (normals * normals - 1)).mean(), 0, 2 / math.sqrt(N))
