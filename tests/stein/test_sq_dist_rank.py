"""The C++ kernel of sq_dist_rank where its ways part: a bracket from a sample, packed columns, ties, many pairs.

What every implementation must give: tests/contract/test_sq_dist_rank.py.
"""

import pytest
import torch
from torch import Tensor

from fekernels._runtime import backends
from tests.support.implementations import ISAS, Place, instruction_set, threads
from tests.support.stein_ranks import KINDS, some_ranks
from tests.support.stein_ranks import particles as of_kind
from tests.support.tensors import bits_equal


def particles(kind: str, n: int, d: int) -> Tensor:
    """[1, n, d]."""
    return of_kind(kind, n, d).unsqueeze(0)


def rank(x: Tensor, ranks: list[int]) -> Tensor:
    with backends.use_backend("cpp"):
        return torch.ops.fekernels.sq_dist_rank(x, ranks, None)


def sorted_distances(x: Tensor) -> Tensor:
    """All distances of pairs i < j as the C++ kernel computes them, [B, n (n - 1) / 2], NaN last."""
    n = x.shape[1]
    distances = torch.ops.fekernels_native.sq_dist(x)
    above = torch.triu_indices(n, n, 1)
    return distances[:, above[0], above[1]].sort(1).values


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits but for those of NaN."""
    return torch.equal(a.isnan(), b.isnan()) and bits_equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("kind", "shape"), [(kind, ((1000, 3), (1000, 37), (600, 300))[i % 3]) for i, kind in enumerate(KINDS)]
)
def test_of_a_bracket_from_a_sample(kind, shape):
    """Enough pairs that most are only counted."""
    x = particles(kind, *shape)
    everything = sorted_distances(x)
    ranks = some_ranks(everything.shape[1])
    assert same(rank(x, ranks), everything[:, ranks])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, ((2, 2048), (65, 2048), (513, 2048))[i % 3]) for i, kind in enumerate(KINDS)]
    + [("normal", (130, 40_000))],
)
def test_of_very_many_dimensions(kind, shape):
    """All but the shape of 513 particles are packed block of columns by block of columns."""
    x = particles(kind, *shape)
    everything = sorted_distances(x)
    ranks = some_ranks(everything.shape[1])
    with threads(2):
        assert same(rank(x, ranks), everything[:, ranks])


def test_more_ties_in_the_bracket_than_are_kept():
    """1.8 million zeros, and ranks just above them, where values differ."""
    x = particles("normal", 2400, 2)
    x[:, :1920] = 0.5
    everything = sorted_distances(x)
    zeros = 1920 * 1919 // 2
    assert not everything[0, zeros - 1] and everything[0, zeros] > 0
    ranks = [zeros - 1, zeros, zeros + 1, zeros + 1000]
    assert same(rank(x, ranks), everything[:, ranks])


def test_single_ranks_one_by_one(isa):
    """Each rank of a small problem, so that no step from a bin to the next is missed."""
    for n in (40, 66):
        x = particles("normal", n, 2)
        everything = sorted_distances(x)
        alone = torch.cat([rank(x, [r]) for r in range(everything.shape[1])], 1)
        assert same(alone, everything)
        assert same(rank(x, list(range(everything.shape[1]))), everything)


def test_bits_do_not_depend_on_instruction_set_threads_or_batch():
    x = torch.cat(
        [particles("normal", 700, 12), particles("clusters", 700, 12), particles("lattice", 700, 12)]
    )
    ranks = some_ranks(700 * 699 // 2)
    results = []
    for name in ISAS:
        if Place("cpp", "cpu").obstacle():
            pytest.skip("no compiled kernels")
        with instruction_set(name):
            for count in (1, 2, 5):
                with threads(count):
                    results += [rank(x, ranks), torch.cat([rank(one, ranks) for one in x.split(1)])]
    assert all(bits_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("d", [2, 16])
def test_the_order_of_particles_does_not_matter(d):
    """Integers whose mean is 0, so that no rounding depends on an order."""
    x = torch.randint(-20, 20, (1, 500, d)).float()
    x = torch.cat([x, -x], 1)
    ranks = some_ranks(1000 * 999 // 2)
    result = rank(x, ranks)
    for _ in range(3):
        assert bits_equal(rank(x[:, torch.randperm(1000)], ranks), result)


def test_ranks_beyond_2_to_31():
    """Of 2.4e9 distances of integer points: how often each difference occurs is the points' autocorrelation."""
    if Place("cpp", "cpu").obstacle():
        pytest.skip("no compiled kernels")
    n, side = 70_000, 512
    half = torch.randint(-side + 1, side, (n // 2, 2))
    points = torch.cat([half, -half])  # their mean is 0
    grid = torch.zeros(4 * side, 4 * side, dtype=torch.float64)
    grid.index_put_(
        (points[:, 0] % (4 * side), points[:, 1] % (4 * side)), torch.ones(()).double(), accumulate=True
    )
    autocorrelation = torch.fft.irfft2(torch.fft.rfft2(grid).abs().square(), s=grid.shape).round().long()
    along = torch.fft.fftfreq(4 * side, 1 / (4 * side)).round().long()
    squared = along.unsqueeze(0).square() + along.unsqueeze(1).square()
    counts = torch.zeros(int(squared.max()) + 1, dtype=torch.long)
    counts.index_put_((squared.flatten(),), autocorrelation.flatten(), accumulate=True)
    counts[0] -= n  # each point with itself; every pair has come twice
    ends = (counts // 2).cumsum(0)
    pairs = n * (n - 1) // 2
    assert ends[-1] == pairs > 2**31
    ranks = [pairs // 2, pairs // 2 + 1, 2**31 + 12_345, pairs - 1]
    exact = torch.searchsorted(ends, torch.tensor(ranks), right=True).float()
    assert torch.equal(rank(points.float().unsqueeze(0), ranks)[0], exact)
