"""Particles on several ranks against one process, to the bit: directions, medians, samplers, ensembles, errors."""

import functools
import re
import tempfile

import pytest
import torch
import torch.distributed as dist

import fekernels as fe
from fekernels.distributed._tournament import Tournament
from tests.support import distributed_svgd as worker
from tests.support.processes import run_processes
from tests.support.stein import KERNELS, NATIVE, NO_BANDWIDTH, ORDINARY, Regime, Row, Size
from tests.support.tensors import bits_equal

SHARP = Regime("sharp", h=1e-6)
# Each algorithm: rows in lanes; differences; tiles of one, of several and of many groups; columns in two segments and
# in more than there are ranks. One particle, and fewer than ranks. MANY: so many groups that borders move between four
# ranks too, by either exchange (the numbers of its rows are odd and even), and with sums of both widths.
SIZES = [
    (1, 3), (3, 2), (20, 6), (70, 3), (200, 5), (131, 37), (330, 64), (900, 12), (40, 2100), (70, 5011)
]  # fmt: skip
MANY = Size(1, 3100, 4)
ROWS = [
    Row(Size(1, *size), regime, kernel)
    for i, size in enumerate(SIZES)
    for j, kernel in enumerate(NATIVE)
    for regime in [(ORDINARY, SHARP, NO_BANDWIDTH)[(i + j) % 3]]
] + [Row(Size(1, 60, 7), ORDINARY, "linear")]  # fmt: skip
ROWS += [Row(MANY, ORDINARY, kernel) for kernel in ("rbf", "rbf", "imq", "imq")]


@functools.cache
def problems():
    torch.manual_seed(0)
    found = []
    for i, row in enumerate(ROWS):
        problem = row.case.make()
        kind = "median" if i % 2 and row.regime == ORDINARY else "number"
        found.append((row, problem, kind, ("all_gather", "ring")[i % 2], torch.float32))
        if row.size[1] in (131, 40, 200):
            dtype = torch.bfloat16 if row.kernel in ("rbf", "matern32") else torch.float64
            found.append((row, problem, kind, ("ring", "all_gather")[i % 2], dtype))
    return found


@functools.cache
def points():
    """Particles for medians: as above, with ties, with most of them one point, and with a NaN and an infinity."""
    torch.manual_seed(1)
    found = [torch.randn(*size) for size in ((2, 3), (65, 3), (131, 37), (500, 20), (40, 2100))]
    found += [
        torch.randint(3, (300, 4)).float(),
        torch.randn(200, 3).double(),
        torch.randn(150, 20).bfloat16(),
    ]
    together = torch.randn(150, 9)
    together[:120] = together[0]
    broken = torch.randn(150, 9)
    broken[3, 2], broken[140, 5] = torch.nan, torch.inf
    return [(x, exchange) for x in [*found, together, broken] for exchange in ("all_gather", "ring")]


@functools.cache
def results(world):
    saved = results(4)[0]["saved"] if world in (1, 2) else None
    arguments = problems(), points(), saved
    if world > 1:
        return run_processes(worker.everything, world, *arguments, timeout=300)
    # A group of one needs no process of its own.
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            return [worker.everything(*arguments)]
        finally:
            dist.destroy_process_group()


@functools.cache
def alone(i):
    row, problem, kind, _, dtype = problems()[i]
    h = "median" if kind == "median" else problem.h
    x, s = (t[0].to(dtype) for t in (problem.x, problem.s))
    return fe.svgd_direction(
        x, s, kernel=KERNELS[row.kernel], bandwidth=h if kind == "median" else h[0], temperature=0.7
    )


WORLDS = (1, 2, 3, 4)


@pytest.mark.parametrize("world", WORLDS)
def test_directions(world):
    every = results(world)
    for i, (row, _, kind, exchange, dtype) in enumerate(problems()):
        phi = torch.cat([each["directions"][i] for each in every])
        assert bits_equal(phi, alone(i)), (str(row), kind, exchange, dtype)
    with fe.use_backend("reference"):
        for i in range(2):
            alone.cache_clear()
            assert bits_equal(torch.cat([each["reference"][i] for each in every]), alone(i))
    alone.cache_clear()


@pytest.mark.parametrize("world", WORLDS)
def test_medians(world):
    every = results(world)
    at = 0
    for i, (x, exchange) in enumerate(points()):
        for kind in worker.medians_of(i, world):
            bare = isinstance(kind, bool)
            wanted = fe.pairwise_sq_dist_median(x, kind) if bare else fe.median_bandwidth(x, kind)
            for each in every:
                assert bits_equal(each["medians"][at], wanted), (tuple(x.shape), x.dtype, exchange, kind)
            at += 1
    assert all(len(each["medians"]) == at for each in every)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", worker.SAMPLERS)
def test_samplers(name, world):
    one = worker.run(worker.sampler(name, lambda x: x))
    for exchange in ("all_gather", "ring") if name == "plain" else ("auto",):
        for each in results(world):
            got = each[f"{name} {exchange}"]
            assert got.keys() == one.keys()
            for key, value in one.items():
                assert bits_equal(got[key], value), (name, exchange, key)


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_is_told_on_every_rank(world):
    (said,) = worker.flight(lambda x: x)
    assert "run away" in said
    assert all(each["flight"] == [said] for each in results(world))


@pytest.mark.parametrize("world", WORLDS)
def test_ensembles(world):
    one = worker.trained(worker.ensemble(3))
    for each in results(world):
        for key, value in one.items():
            assert bits_equal(each["ensemble"][key], value), key


@pytest.mark.parametrize("world", (1, 2))
def test_a_run_saved_by_four_ranks_goes_on_with_fewer(world):
    one = worker.sampler("noise", lambda x: x, anneal=None, anneal_steps=None)
    one.run(4, progress=False)
    for each in results(world):
        for key, value in worker.whole(one).items():
            assert bits_equal(each["gone on"][key], value), key


def test_ranks_agree_on_a_seed_that_nobody_gave():
    torch.manual_seed(100)
    drawn = int(torch.randint(0, (1 << 63) - 1, ()))
    assert [each["seeds"] for each in results(3)] == [[drawn]] * 3


ERRORS = {
    "nan": "ValueError: SVGD:.*scores must be finite; got nan for particle 69 at step 1",
    "raises": "(KeyError: 'no such thing'|RuntimeError: SVGD: rank 2 has raised KeyError: 'no such thing')",
    "by matrices": r"ValueError: SVGD: optimizer must work element by element .*got Adafactor, whose state \w+ has",
    "loads matrices": r"ValueError: SVGD.load_state_dict: optimizer must work element by element .*whose state \w+ has",
    "d": "ValueError: SVGD: d must be the same on every rank; got . on rank 0 and . on rank .",
    "dtype": "ValueError: SVGD: the particles' dtype must be the same on every rank; got torch.float(32|64) on rank .",
    "seed": "ValueError: SVGD: seed must be the same on every rank; got . on rank .",
    "kernel": "ValueError: SVGD: kernel must be the same",
    "argument": "(TypeError|RuntimeError: SVGD: rank 2 has raised TypeError): SVGD: lr must be a number",
    "noise": "ValueError: SVGD: noise='kernel' must have all particles in one process",
    "lr": "ValueError: SVGD: optimizer must be the same on every rank; got .Adam of .*'lr', 0.[12]",
    "rate": "ValueError: SVGD: optimizer must be the same on every rank; got .Adam of .*'lr', 0.[12]",
    "state": "ValueError: SVGD: particles must be the same on every rank",
    "schedule": "ValueError: SVGD: bandwidth must be the same on every rank; got [12].0 on rank .",
    "batch": r"ValueError: SVGD: batch \(of all the data.*\) must be the same .*; got another on rank 2 than on 0",
    "rows": "ValueError: SVGD: batch .* got another on rank 1 than on 0",
    "direction": "ValueError: distributed.svgd_direction: temperature must be the same on every rank; got (1.0|0.5)",
    "scores": "ValueError: distributed.svgd_direction: .*scores must have shape",
    "convention": "ValueError: distributed.median_bandwidth: the kind of median must be the same on every rank",
    "exchange": "ValueError: distributed.median_bandwidth: exchange must be one of",
}


def test_what_fails_on_one_rank_raises_on_all():
    for rank, each in enumerate(results(3)):
        told = each["errors"]
        assert told.keys() == ERRORS.keys(), rank
        for name, pattern in ERRORS.items():
            assert re.match(pattern, told[name]), (rank, name, told[name])


@pytest.mark.parametrize("longest", (1, 2, 6))
@pytest.mark.parametrize("ranks", range(1, 6))
@pytest.mark.parametrize("groups", (1, 2, 3, 8, 13, 40, 63))
def test_a_tournament_lets_each_pair_meet_once_where_both_are(groups, ranks, longest):
    games = Tournament(groups, ranks, longest)
    at = [set(games.at(0, rank)) for rank in range(ranks)]
    assert sorted(group for there in at for group in there) == list(range(groups))
    plans, met = [games.plan(rank) for rank in range(ranks)], []
    for number in range(-(-games.rounds // games.stride)):
        stages = {rank: plan[number] for rank, plan in enumerate(plans) if plan}
        for rank, each in stages.items():
            coming, leaving = ({move.group for move in moves} for moves in (each.coming, each.leaving))
            # Nobody sends what it waits for: all ranks of a row would wait for the one at its end.
            assert not leaving & (coming | {one for part in each.late for pair in part for one in pair})
            assert len(at[rank]) + len(coming) <= games.most(rank)
            for parts, there in (
                (each.early, at[rank]),
                (each.free, at[rank]),
                (each.late, at[rank] | coming),
            ):
                for pairing in (pairing for part in parts for pairing in part):
                    assert set(pairing) <= there and pairing[0] < pairing[1]
                    met.append(pairing)
            if games.stride > 1:
                assert all(len({move.rank for move in moves}) <= 1 for moves in (each.leaving, each.coming))
        for rank, each in stages.items():
            for move in each.leaving:
                at[rank].remove(move.group)
                assert rank in [back.rank for back in stages[move.rank].coming if back.group == move.group]
        for rank, each in stages.items():
            at[rank] |= {move.group for move in each.coming}
        assert sorted(group for there in at for group in there) == list(range(groups))
    assert sorted(met) == [(low, high) for low in range(groups) for high in range(low + 1, groups)]
    handed = [sum(len(stage.leaving) for stage in plan) for plan in plans]
    assert games.busiest() == (max(handed), max(map(games.most, range(games.playing))))


@pytest.mark.parametrize(("groups", "ranks"), [(79, 2), (79, 3), (79, 7), (64, 2), (64, 5), (101, 4)])
def test_a_tournament_gives_all_ranks_as_much_work(groups, ranks):
    """Within 1.5%, though borders are between tables, of which a rank here has 5 to 20."""
    for longest in (1, 6, 8):
        plans = [Tournament(groups, ranks, longest).plan(rank) for rank in range(ranks)]
        work = [
            sum(
                len(part)
                for stage in plan
                for parts in (stage.early, stage.free, stage.late)
                for part in parts
            )
            for plan in plans
        ]
        assert max(work) <= 1.015 * sum(work) / ranks, (longest, work)


@pytest.mark.parametrize("longest", (1, 6))
def test_each_group_meets_others_in_the_order_of_one_process(longest):
    """On its way over ranks; that of `csrc/cpu/stein/block_rounds.h`: in round r those meet whose sum is 2 r."""
    groups, ranks = 40, 2
    games = Tournament(groups, ranks, longest)
    met = {group: [] for group in range(groups)}
    plans = [games.plan(rank) for rank in range(ranks)]
    for stages in zip(*plans, strict=True):
        for parts in ("early", "free", "late"):
            for stage in stages:
                for low, high in (pairing for part in getattr(stage, parts) for pairing in part):
                    met[low].append(high)
                    met[high].append(low)
    cycle = groups - 1
    for group in range(cycle):
        others = [(2 * round - group) % cycle for round in range(cycle)]
        assert met[group] == [cycle if other == group else other for other in others]
