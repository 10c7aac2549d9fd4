"""fe.random: the words and numbers of the contract, the same everywhere, and random."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import fekernels as fe
from tests.support.optimizers import CASES, SEED
from tests.support.tensors import bits_equal

KINDS = ("bits", "uniform", "normal")
LARGEST = 6.77  # sqrt(-2 log 2^-33) is 6.764

# Salmon et al. 2011, known answers of Philox4x32-10: the draw whose counter and key they are, and its words.
KNOWN = {
    "zeros": (
        dict(seed=0, stream=0, step=0, offset=0, purpose=0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        dict(seed=2**64 - 1, stream=2**32 - 1, step=2**32 - 1, offset=4 * (2**48 - 1), purpose=0xFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        dict(
            seed=0x299F31D0_A4093822,
            stream=0x03707344,
            step=0x13198A2E,
            offset=4 * 0x08D3_243F6A88,
            purpose=0x85A3,
        ),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def philox(count, *, seed, stream=0, step=0, offset=0, purpose=4):
    """The contract in numpy, written for this test alone: words as uint64."""
    mask = np.uint64(0xFFFFFFFF)
    block = np.arange(offset // 4, (offset + count + 3) // 4, dtype=np.uint64)
    counter = [
        block & mask,
        block >> np.uint64(32) | np.uint64(purpose << 16),
        np.full_like(block, step),
        np.full_like(block, stream),
    ]
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            b >> np.uint64(32) ^ counter[1] ^ np.uint64(low),
            b & mask,
            a >> np.uint64(32) ^ counter[3] ^ np.uint64(high),
            a & mask,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(counter, 1).ravel()[offset % 4 :][:count]


def expected(kind, count, **key):
    """What the draw must be: exactly for words and uniforms, to within a float32 polynomial's error for normals."""
    if kind == "bits":
        return torch.from_numpy(philox(count, **key).astype(np.uint32).view(np.int32))
    begin = key.get("offset", 0) % 4
    words = philox(count + begin + 3, **{**key, "offset": key.get("offset", 0) - begin})
    words = words[: (count + begin + 3) // 4 * 4]
    # a * 2^-32 + 2^-33 is exact in float64, so that this is rounded once, like an fma.
    uniform = (words.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    if kind == "uniform":
        return torch.from_numpy(uniform[begin:][:count])
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64).reshape(-1, 2, 2)[..., 0]))
    angle = 2 * np.pi * words.reshape(-1, 2, 2)[..., 1].astype(np.float64) / 2.0**32
    return torch.from_numpy(
        np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).ravel()[begin:][:count]
    )


def check_draw(kind, drawn, **key):
    want = expected(kind, drawn.numel(), **key).view(drawn.shape)
    if kind == "normal":
        # Three units in the last place of the largest normals, between 4 and 8.
        assert (drawn.cpu().double() - want).abs().amax() < 1.5e-6 if drawn.numel() else True
    else:
        assert bits_equal(drawn, want)


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name, place):
    key, words = KNOWN[name]
    with fe.use_backend(place.backend):
        drawn = fe.random.bits(4, **key, device=place.device)
    assert [w & 0xFFFFFFFF for w in drawn.tolist()] == list(words)


@pytest.mark.parametrize("case", [case for case in CASES if case.layout == "contiguous"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_contract(kind, case, place, poisoned):
    key = dict(seed=SEED, stream=0xDEADBEEF, step=0xFEEDF00D, offset=13, purpose=0xABCD)
    with fe.use_backend(place.backend):
        drawn = getattr(fe.random, kind)(case.shape, **key, device=place.device)
    assert drawn.shape == case.shape and drawn.device.type == place.device
    assert drawn.dtype == (torch.int32 if kind == "bits" else torch.float32)
    check_draw(kind, drawn, **key)


# Odd offsets, the ends of a 64-element block, the carry of g // 4 past 2^32, and the last element there is.
OFFSETS = (0, 1, 2, 3, 5, 61, 63, 64, 4095, 2**34 - 37, 2**34 - 1, 2**34, 2**40 + 3, 2**50 - 200)


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_gives_the_bits_of_the_reference(kind, isa, poisoned):
    for offset in OFFSETS:
        for count in (1, 3, 64, 65, 200):
            key = dict(seed=SEED ^ offset, stream=offset & 0xFFFFFFFF, step=count, offset=offset, purpose=2)
            with fe.use_backend("cpp"):
                drawn = getattr(fe.random, kind)(count, **key)
            with fe.use_backend("reference"):
                assert bits_equal(drawn, getattr(fe.random, kind)(count, **key)), key


@pytest.mark.parametrize("kind", KINDS)
def test_long_draws_are_the_contract_with_the_bits_of_the_reference(kind, place, poisoned):
    key = dict(seed=11, step=3, offset=7)
    count = (1 << 20) + 5 if kind == "bits" else 200_003  # the reference works in pieces of 2^20
    with fe.use_backend(place.backend):
        drawn = getattr(fe.random, kind)(count, **key, device=place.device)
    check_draw(kind, drawn, **key)
    if place.backend != "reference":
        with fe.use_backend("reference"):
            assert bits_equal(drawn, getattr(fe.random, kind)(count, **key))


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_the_slice_of_the_whole(kind, place):
    draw = getattr(fe.random, kind)
    with fe.use_backend(place.backend):
        for start in (0, 2**34 - 100):
            whole = draw((40, 50), seed=5, stream=3, offset=start, device=place.device).flatten()
            for begin, end in (
                (0, 1),
                (1, 2),
                (3, 1999),
                (64, 128),
                (777, 778),
                (90, 110),
                (1999, 2000),
                (50, 50),
            ):
                part = draw(end - begin, seed=5, stream=3, offset=start + begin, device=place.device)
                assert bits_equal(part, whole[begin:end])


# Offsets, found by search in the draw of seed 0, of words 0 and 2^32 - 1: the ends of what a uniform can be.
WORD_OF_ZEROS, WORD_OF_ONES = 23_483_585_204, 1_119_706_938


def test_ends_of_the_range(place):
    key = dict(seed=0, device=place.device)
    with fe.use_backend(place.backend):
        assert fe.random.bits(1, offset=WORD_OF_ZEROS, **key).item() == 0
        assert fe.random.bits(1, offset=WORD_OF_ONES, **key).item() == -1
        assert fe.random.uniform(1, offset=WORD_OF_ZEROS, **key).item() == 2.0**-33
        assert fe.random.uniform(1, offset=WORD_OF_ONES, **key).item() == 1.0
        for offset, radius in ((WORD_OF_ZEROS, math.sqrt(66 * math.log(2))), (WORD_OF_ONES, 0.0)):
            pair = fe.random.normal(2, offset=offset, **key).double()
            assert offset % 2 == 0  # the first of its pair makes the radius
            assert pair.norm().item() == pytest.approx(radius, abs=2e-6)  # of each of the two, 1.5e-6 at most
            assert pair.abs().max() <= LARGEST


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
