"""sq_dist_rank: to the bit the sort of all distances that the same kernel computes; and close to float64."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fekernels._runtime import backends
from tests.support.places import ISAS, Place, instruction_set, threads
from tests.support.tensors import bits_equal

KINDS = ("normal", "offset", "lattice", "coincident", "clusters", "sorted", "nan", "inf", "huge", "tiny")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def particles(kind: str, n: int, d: int) -> Tensor:
    """[1, n, d]."""
    x = torch.randn(n, d)
    if kind == "offset":
        x += 1e4
    elif kind == "lattice":
        x = x.round()
    elif kind == "coincident":
        x[:] = 0.3
    elif kind == "clusters":  # in order, as chains one after the other are
        x = 5 * torch.randn(3, d)[torch.arange(n) * 3 // n] + 1e-4 * x
    elif kind == "sorted":
        x = x.sort(0).values
    elif kind == "nan":
        x[n // 2, 0] = math.nan
    elif kind == "inf":
        x[n // 2, 0] = math.inf
    elif kind == "huge":  # many distances overflow
        x *= 2e19 / math.sqrt(d)
    elif kind == "tiny":  # many are denormal
        x *= 1e-20
    return x.unsqueeze(0)


def rank(x: Tensor, ranks: list[int], hint: Tensor | None = None, backend: str = "cpp") -> Tensor:
    with backends.use_backend(backend):
        return torch.ops.fekernels.sq_dist_rank(x, ranks, hint)


def sorted_distances(x: Tensor) -> Tensor:
    """All distances of pairs i < j as the C++ kernel computes them, [B, n (n - 1) / 2], NaN last."""
    n = x.shape[1]
    distances = torch.ops.fekernels_native.sq_dist(x)
    above = torch.triu_indices(n, n, 1)
    return distances[:, above[0], above[1]].sort(1).values


def some_ranks(pairs: int) -> list[int]:
    """The two in the middle, the ends, and far ones; in no order, one of them twice."""
    return [(pairs - 1) // 2, pairs // 2, pairs - 1, pairs // 10, 0, pairs * 9 // 10, 0]


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits but for those of NaN."""
    return torch.equal(a.isnan(), b.isnan()) and bits_equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 8, 9, 37])
def test_is_the_sort_of_all_distances(kind, d, isa):
    for n in (2, 3, 63, 64, 65, 66, 300):
        x = particles(kind, n, d)
        everything = sorted_distances(x)
        pairs = everything.shape[1]
        ranks = some_ranks(pairs)
        assert same(rank(x, ranks), everything[:, ranks]), n
        middle = [(pairs - 1) // 2, pairs // 2]
        assert same(rank(x, middle), everything[:, middle]), n


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_bracket_from_a_sample(kind):
    """Enough pairs that most are only counted."""
    for n, d in ((1000, 3), (1000, 37), (600, 300)):
        x = particles(kind, n, d)
        everything = sorted_distances(x)
        ranks = some_ranks(everything.shape[1])
        assert same(rank(x, ranks), everything[:, ranks]), (n, d)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 2048), (65, 2048), (130, 40_000), (513, 2048)], ids=str)
def test_of_very_many_dimensions(kind, shape):
    """The first three are packed block of columns by block of columns."""
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


@pytest.mark.parametrize("kind", ["normal", "lattice", "coincident", "nan"])
@pytest.mark.parametrize("n", [64, 300, 1000])
def test_a_hint_changes_nothing(kind, n, place):
    if obstacle := backends._obstacle(place.backend, place.device, "sq_dist_rank"):
        pytest.skip(obstacle)
    x = particles(kind, n, 9).to(place.device)
    pairs = n * (n - 1) // 2
    ranks = [(pairs - 1) // 2, pairs // 2]
    plain = rank(x, ranks, None, place.backend)
    hints = [plain, plain * 1.001, plain * 3, plain.flip(1)]
    hints += [
        torch.full_like(plain, value) for value in (0.0, -1.0, 1e30, 1e-30, math.inf, -math.inf, math.nan)
    ]
    for hint in hints:
        assert same(rank(x, ranks, hint, place.backend), plain), hint


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [2, 37])
def test_dtypes(dtype, d):
    x = particles("normal", 130, d).to(dtype)
    ranks = some_ranks(130 * 129 // 2)
    result = rank(x, ranks)
    assert result.dtype == torch.float32
    assert bits_equal(result, rank(x.float(), ranks))
    assert bits_equal(result, sorted_distances(x)[:, ranks])


@pytest.mark.parametrize("kind", ["normal", "offset", "lattice", "clusters"])
@pytest.mark.parametrize(
    "shape", [(2, 2), (3, 64, 1), (2, 65, 300), (1, 1000, 2), (1, 400, 37), (2, 20, 5000)], ids=str
)
def test_against_float64(kind, shape, place):
    if obstacle := backends._obstacle(place.backend, place.device, "sq_dist_rank"):
        pytest.skip(obstacle)
    *batch, n, d = shape if len(shape) == 3 else (1, *shape)
    x = torch.cat([particles(kind, n, d) for _ in range(batch[0])])
    ranks = some_ranks(n * (n - 1) // 2)
    differences = x.double().unsqueeze(2) - x.double().unsqueeze(1)
    above = torch.triu_indices(n, n, 1)
    exact = differences.square().sum(-1)[:, above[0], above[1]].sort(1).values
    result = rank(x.to(place.device), ranks, None, place.backend).cpu()
    assert (result - exact[:, ranks]).abs().max() <= 1e-5 * exact.max()


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


MEMORY = """
import resource, sys, torch, fekernels
n = 20_000
x = torch.randn(1, n, 16)
ranks = [n * (n - 1) // 4, n * (n - 1) // 4 + 1]
torch.ops.fekernels.sq_dist_rank(x[:, :500].contiguous(), [7], None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with fekernels.use_backend("cpp"):
    torch.ops.fekernels.sq_dist_rank(x, ranks, None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_pairs():
    """The distances would fill 800 MB; points twice, a sample of them and those in the bracket fill 20 MB."""
    if Place("cpp", "cpu").obstacle():
        pytest.skip("no compiled kernels")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 1024
