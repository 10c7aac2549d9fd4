"""The noise: its speed beside other generators, and its statistics on 10^8 draws.

``pytest benchmarks/bench_random.py``. Seeds are fixed, so that a test here passes or fails for good. Bounds are 5
standard errors unless a comment gives another; moments and distributions are those of Box and Muller's exact map from
uniforms, whose tail beyond |z| = 6.77 is missing (1.3e-11 of the normal, nothing that 10^8 draws could show).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import harness

DRAWS = 100_000_000
CHUNK = 10_000_000
SEED = 20260

# Speed: every row of `python -m fekernels bench --only random`.

test_speed = harness.rows("random")

# Statistics.


def normals(**key: int) -> Iterator[Tensor]:
    """DRAWS normals, CHUNK at a time, in one buffer."""
    out = torch.empty(CHUNK)
    values = {"seed": SEED, "stream": 0, "step": 1, "purpose": 0} | key
    for offset in range(0, DRAWS, CHUNK):
        torch.ops.fekernels.philox_normal(
            out, values["seed"], values["stream"], values["step"], offset, values["purpose"]
        )
        yield out


def words(**key: int) -> Iterator[Tensor]:
    """DRAWS words as int64 in 0 .. 2^32 - 1, CHUNK at a time."""
    out = torch.empty(CHUNK, dtype=torch.int32)
    values = {"seed": SEED, "stream": 0, "step": 1, "purpose": 0} | key
    for offset in range(0, DRAWS, CHUNK):
        torch.ops.fekernels.philox_bits(
            out, values["seed"], values["stream"], values["step"], offset, values["purpose"]
        )
        yield out.long() & 0xFFFFFFFF


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(np.asarray(x, dtype=np.float64))).numpy()


def assert_chi_square(counts: np.ndarray, expected: np.ndarray, what: str) -> None:
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    z = (statistic - freedom) / math.sqrt(2 * freedom)
    assert abs(z) < 5, (
        f"{what}: chi-square {statistic:.0f} with {freedom} degrees of freedom, {z:+.1f} standard errors"
    )


@pytest.mark.slow
def test_moments() -> None:
    sums = np.zeros(7)
    for z in normals():
        z = z.double()
        power = torch.ones_like(z)
        for k in range(1, 7):
            power *= z
            sums[k] += float(power.sum())
    # E z^k is (k - 1)!! for even k and 0 for odd k, and Var z^k = E z^2k - (E z^k)^2.
    double_factorial = [1, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0, 10395]
    for k in range(1, 7):
        mean, exact = sums[k] / DRAWS, double_factorial[k]
        error = math.sqrt((double_factorial[2 * k] - exact**2) / DRAWS)
        assert abs(mean - exact) < 5 * error, f"moment {k}: {mean:.6f}, not {exact} +- {error:.6f}"


@pytest.mark.slow
def test_tails() -> None:
    thresholds = [1.0, 2.0, 3.0, 4.0, 4.5, 5.0, 5.5, 6.0]
    edges = np.array([-np.inf, *(-t for t in reversed(thresholds)), *thresholds, np.inf])
    above, below = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    largest = 0.0
    for z in normals():
        largest = max(largest, float(z.abs().max()))
        inside = np.histogram(z[z.abs() > 1].numpy(), bins=edges)[0]
        above += np.cumsum(inside[::-1])[: len(thresholds)][::-1]
        below += np.cumsum(inside)[: len(thresholds)][::-1]
    assert largest <= 6.77
    for counts, side in ((above, "above"), (below, "below -")):
        for threshold, count in zip(thresholds, counts, strict=True):
            expected = DRAWS * 0.5 * math.erfc(threshold / math.sqrt(2))
            # Of a Poisson number with mean 0.1 (z > 6), 4 or fewer are certain to 1e-7; 5 deviations do for large ones.
            spread = 5 * math.sqrt(expected) + 4
            assert abs(count - expected) < spread, f"{side}{threshold}: {count:.0f} draws, not {expected:.1f}"


@pytest.mark.slow
def test_tail_is_the_exact_map_of_its_words() -> None:
    """Draws beyond 6 are too few to count, so those of small words (radius above 4) are held against the exact map."""
    checked = 0
    for z, word in zip(normals(), words(), strict=True):
        found = torch.nonzero(word[0::2] < 1 << 20).squeeze(1)
        radius = (-2 * ((word[0::2][found].double() + 0.5) / 2.0**32).log()).sqrt()
        angle = word[1::2][found].double() * (2 * math.pi / 2.0**32)
        for values, exact in ((z[0::2][found], radius * angle.cos()), (z[1::2][found], radius * angle.sin())):
            error = float((values.double() - exact).abs().max())
            assert error < 2e-6, f"a normal of a small word is off by {error:.1e}"
        checked += len(found)
    expected = DRAWS / 2 * 2.0**-12
    assert abs(checked - expected) < 5 * math.sqrt(expected), (
        f"{checked} words below 2^20, not {expected:.0f}"
    )


@pytest.mark.slow
def test_draws_beyond_six() -> None:
    """10^8 draws hold 0.2 of them on average; a hundred times as many hold 20."""
    draws, size = 100 * DRAWS, 1 << 20  # a buffer that stays in the cache
    out = torch.empty(size)
    beyond = 0
    for offset in range(0, draws, size):
        torch.ops.fekernels.philox_normal(out, SEED, 7, 1, offset, 0)
        lowest, highest = torch.aminmax(out)
        if lowest < -6 or highest > 6:
            beyond += int((out.abs() > 6).sum())
    expected = draws * math.erfc(6 / math.sqrt(2))
    # Of a Poisson number with mean 19.7, 0 has probability 3e-9, and 5 deviations above the mean are 42.
    assert 0 < beyond < expected + 5 * math.sqrt(expected), f"{beyond} draws beyond 6, not {expected:.1f}"


@pytest.mark.slow
def test_distribution() -> None:
    inner = np.linspace(-4.5, 4.5, 201)
    edges = np.concatenate(([-np.inf], inner, [np.inf]))
    counts = np.zeros(len(edges) - 1)
    for z in normals():
        counts[1:-1] += np.histogram(z.numpy(), bins=inner)[0]
        counts[0] += int((z < -4.5).sum())
        counts[-1] += int((z > 4.5).sum())
    assert counts.sum() == DRAWS
    assert_chi_square(counts, np.diff(normal_cdf(edges)) * DRAWS, "normals in 202 bins")


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 16])
def test_words_are_uniform(shift: int) -> None:
    counts = np.zeros(1 << 16)
    for word in words():
        counts += np.bincount((word >> shift & 0xFFFF).numpy(), minlength=1 << 16)
    assert_chi_square(counts, np.full(1 << 16, DRAWS / (1 << 16)), f"16 bits from bit {shift}")


@pytest.mark.slow
def test_neighbouring_words_are_independent() -> None:
    """Every two of the four words of a block, and its last with the first of the next one, by their top 8 bits."""
    pairs = [*itertools.combinations(range(4), 2), (3, 4)]
    counts = {pair: np.zeros(1 << 16) for pair in pairs}
    for word in words():
        top = (word >> 24).view(-1, 4)
        for first, second in pairs:
            a, b = (top[:, first], top[:, second]) if second < 4 else (top[:-1, 3], top[1:, 0])
            counts[first, second] += np.bincount((a << 8 | b).numpy(), minlength=1 << 16)
    for pair, count in counts.items():
        assert_chi_square(count, np.full(1 << 16, count.sum() / (1 << 16)), f"words {pair}")


OTHER_DRAWS = {
    "next stream": {"stream": 1},
    "rounding's second stream": {"stream": 1 << 31},
    "last stream": {"stream": (1 << 32) - 1},
    "next step": {"step": 2},
    "step and stream exchanged": {"step": 0, "stream": 1},
    "a far step": {"step": 1 << 23},
    "next purpose": {"purpose": 1},
    "next seed": {"seed": SEED + 1},
    "seed's upper half": {"seed": SEED + (1 << 32)},
}


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHER_DRAWS.values(), ids=OTHER_DRAWS.keys())
def test_streams_and_steps_are_independent(other: dict[str, int]) -> None:
    """Correlations of z with another draw's z, and of their squares, which show what the first ones cannot."""
    product = squares = 0.0
    second = torch.empty(CHUNK)
    for first, z in zip(normals(), normals(**other), strict=True):
        torch.mul(first, z, out=second)
        product += float(second.sum(dtype=torch.float64))
        squares += float(((first * first - 1) * (z * z - 1)).sum(dtype=torch.float64))
    assert abs(product) < 5 * math.sqrt(DRAWS), f"correlation {product / DRAWS:.1e}"
    assert abs(squares) < 5 * 2 * math.sqrt(DRAWS), f"correlation of squares {squares / 2 / DRAWS:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 64, 1024, 4096])
def test_draws_are_independent_along_a_stream(lag: int) -> None:
    product = squares = 0.0
    count = 0
    for z in normals():
        a, b = z[:-lag], z[lag:]
        count += len(a)
        product += float((a * b).sum(dtype=torch.float64))
        squares += float(((a * a - 1) * (b * b - 1)).sum(dtype=torch.float64))
    assert abs(product) < 5 * math.sqrt(count), f"lag {lag}: correlation {product / count:.1e}"
    assert abs(squares) < 5 * 2 * math.sqrt(count), (
        f"lag {lag}: correlation of squares {squares / 2 / count:.1e}"
    )


if __name__ == "__main__":
    harness.main(__file__)
