"""What processes compute of one direction, in one process: all shares make up the whole, to the bit."""

import pytest
import torch

from fekernels._runtime.backends import compiled
from fekernels.distributed._records import (
    WIDE,
    Layout,
    Records,
    norms_of_products,
    sq_dists_of_products,
    tournament,
)
from tests.support.implementations import ISAS, instruction_set, threads
from tests.support.stein import (
    HEAVY,
    NATIVE,
    NO_BANDWIDTH,
    ORDINARY,
    REGIMES,
    TEMPERATURE,
    Case,
    Row,
    Size,
    constants,
)
from tests.support.tensors import bits_equal

SHARP = next(regime for regime in REGIMES if regime.name == "sharp")
BATCH_OF_ONE = [size for size in HEAVY if size.batch == 1] + [
    Size(1, 65, 3),
    Size(1, 70, 9),
    Size(1, 2000, 3),
]
ROWS = [
    Row(size, (ORDINARY, SHARP, NO_BANDWIDTH)[(i + j) % 3], kernel)
    for i, size in enumerate(BATCH_OF_ONE)
    for j, kernel in enumerate(NATIVE)
]


def layout_of(n, d, kernel, sharp=False):
    return Layout(compiled("svgd_layout")(torch.empty(0), n, d, kernel, sharp))


def is_sharp(layout, norms, n, h):
    return bool(layout.centred) and float(norms.double().cumsum(0)[-1]) > 64 * n * float(h)


def by_tiles(x, s, h, kernel, numbers):
    """As two ranks deal the tables, one after the other."""
    (n, d), arguments = x.shape, (len(x), kernel, numbers)
    layout, sums = layout_of(n, d, kernel), torch.zeros(d, dtype=torch.float64)
    compiled("svgd_add_columns")(sums, x[: n // 3])
    compiled("svgd_add_columns")(sums, x[n // 3 :])
    means = (sums / n).float()
    games = tournament(n, layout, 2, rings=False)
    records = Records(n, layout, range(games.groups))
    norms = records.prepare(x, s, means, h, *arguments, False)
    sharp = is_sharp(layout, norms, n, h)
    if sharp:
        records = Records(n, layout_of(n, d, kernel, True), range(games.groups))
        records.prepare(x, s, means, h, *arguments, True)
    settings = n, d, kernel, numbers, sharp
    for rank in range(2):
        records.meet([[(group, group) for group in games.at(0, rank)]], h, settings)
    for stages in zip(*(games.plan(rank) for rank in range(games.playing)), strict=True):
        for part in ("early", "free", "late"):
            for stage in stages:
                records.meet(getattr(stage, part), h, settings)
    totals = records.totals(range(games.groups), h, settings)
    return torch.cat([
        compiled("svgd_complete")(totals[part], x[part], s[part], h, *arguments)
        for part in (slice(n // 3), slice(n // 3, n))
    ])  # fmt: skip


def by_columns(x, s, h, kernel, numbers):
    (n, d), layout = x.shape, layout_of(*x.shape, kernel)
    cut = (d // layout.segment + 1) // 2 * layout.segment
    parts = [(t[:, :cut].contiguous(), t[:, cut:].contiguous()) for t in (x, s)]

    def products(differences):
        own = torch.cat([compiled("svgd_wide_products")(part, d, differences) for part in parts[0]])
        return sum(own.double().unbind()).float()

    inner = products(False)
    sharp = is_sharp(layout, norms_of_products(inner, n), n, h)
    found = inner if layout.centred and not sharp else products(True)
    phi = [
        compiled("svgd_wide_share")(x_part, s_part, found, h, d, kernel, numbers, sharp)
        for x_part, s_part in zip(*parts, strict=True)
    ]
    above = torch.triu_indices(n, n, 1)
    distances = compiled("sq_dist")(x.unsqueeze(0))[0][above[0], above[1]].sort().values
    assert bits_equal(sq_dists_of_products(inner, n), distances)
    return torch.cat(phi, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_shares_are_the_whole(row, isa, poisoned):
    problem = row.case.make()
    x, s, h = problem.x[0], problem.s[0], problem.h
    kernel, beta, c = constants(row.kernel)
    with instruction_set(isa):
        whole = compiled("svgd_direction")(problem.x, problem.s, h, kernel, beta, c, TEMPERATURE, 0)[0]
        wide = layout_of(*x.shape, kernel).algorithm == WIDE
        got = (by_columns if wide else by_tiles)(x, s, h, kernel, [beta, c, TEMPERATURE])
    assert bits_equal(got, whole)


def test_shares_do_not_depend_on_threads(poisoned):
    problem = Case(700, 20, (1,)).make()
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(by_tiles(problem.x[0], problem.s[0], problem.h, 0, [-0.5, 1.0, 1.0]))
    assert bits_equal(*results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(65, 3), (200, 37), (500, 9)], ids=str)
def test_scans_count_each_pair_once(size, isa, poisoned):
    """Shares of the tiles of one set, and of two with the tiles between them, hold all distances."""
    x = torch.randn(*size)
    scan, tiles = compiled("sq_dist_scan"), compiled("sq_dist_tiles")
    sums = torch.zeros(size[1], dtype=torch.float64)
    cut = size[0] // 3
    with instruction_set(isa):
        above = torch.triu_indices(len(x), len(x), 1)
        wanted = compiled("sq_dist")(x.unsqueeze(0))[0][above[0], above[1]].sort().values
        compiled("svgd_add_columns")(sums, x)
        means = (sums / len(x)).float()
        low, high = (int(wanted[int(q * len(wanted))].view(torch.int32)) for q in (0.3, 0.8))
        count, room = tiles(means, len(x), -1), len(wanted)
        halves = [
            scan(x, None, means, low, high, begin, end, room)
            for begin, end in ((0, count // 2), (count // 2, count))
        ]
        first, second = x[:cut], x[cut:]
        parts = [
            scan(a, b, means, low, high, 0, tiles(means, len(a), -1 if b is None else len(b)), room)
            for a, b in ((first, None), (second, None), (first, second))
        ]
        too_many = scan(x, None, means, low, high, 0, count, 10)
    bits = wanted.view(torch.int32)
    inside = bits[(bits >= low) & (bits <= high)]
    for found in (halves, parts, [too_many]):
        assert sum(int(counts[0]) for counts, _ in found) == int((bits < low).sum())
        assert sum(int(counts[1:].sum()) for counts, _ in found) == len(inside)
    for found in (halves, parts):
        kept = torch.cat([distances[: int(counts[1:].sum())] for counts, distances in found]).sort().values
        assert torch.equal(kept.view(torch.int32), inside)


def test_what_does_not_fit_is_refused():
    x, h, numbers = torch.randn(200, 9), torch.ones(1), [-0.5, 1.0, 1.0]
    layout = layout_of(200, 9, 0)
    records = Records(200, layout, range(4))
    means = torch.zeros(9)
    prepare = lambda *a, blocks=(0, 0, 0): compiled("svgd_prepare")(*a, list(blocks), 200, 0, numbers, False)  # noqa: E731
    operands = x, x, means, h, records.fixed, records.sums
    prepare(*operands)
    for blocks, change in (
        ((4, 0, 0), {}), ((0, 4, 0), {}), ((0, 0, 150), {}), ((0, -1, 0), {}), ((0, 0), {}), ((0, 0, 0), {1: x[:9]}),
        ((0, 0, 0), {2: means[:3]}), ((0, 0, 0), {4: records.fixed[:, :9]}), ((3, 0, 0), {4: records.fixed[:3]}),
        ((0, 0, 0), {0: x.double()}), ((0, 0, 0), {3: torch.ones(2)}),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            prepare(*(change.get(i, operand) for i, operand in enumerate(operands)), blocks=blocks)
    for pairing in ([0, 4, 0, 0], [1, 0, 1, 0], [0, 1, 0, 4], [0, 1, 0], [-1, 1, 0, 1]):
        with pytest.raises(RuntimeError):
            compiled("svgd_meet")(h, records.fixed, records.sums, pairing, 200, 9, 0, numbers, False)
    for rows, low, high, begin, end in (
        (x, 5, 4, 0, 1),
        (x, -1, 4, 0, 1),
        (x, 0, 1, 0, 99),
        (x.double(), 0, 1, 0, 1),
    ):
        with pytest.raises(RuntimeError):
            compiled("sq_dist_scan")(rows, None, means, low, high, begin, end, 8)
    for kernel in (-1, len(NATIVE)):
        with pytest.raises(RuntimeError, match=rf"kernel must be one of 0 \(rbf\), .*; got {kernel}"):
            compiled("svgd_layout")(h, 200, 9, kernel, False)
