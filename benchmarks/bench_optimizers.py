"""The optimizers beside their peers: ``pytest benchmarks/bench_optimizers.py``.

Every row of ``python -m fekernels bench`` is one benchmark here: ours is what pytest-benchmark times, and before each
of its rounds the peer takes its turn, so the two are interleaved; ``extra_info`` has the peer, the ratio and the goal.
No goal is asserted, as a busy machine would fail it: the tables are to be read. BENCH_THREADS sets torch's threads
(default 2); BENCH_QUICK=1 takes the small sizes.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Groups, record
from fekernels import bench
from fekernels.bench import optimizers as cases
from fekernels.bench.timing import Contestant

SIZES = bench.QUICK if os.environ.get("BENCH_QUICK") == "1" else bench.FULL
MAKERS = cases.groups(SIZES)
# What there is to time, by position, as the groups' tensors are not to be made at collection: group, rows, peers.
GROUPS = (
    (f"{cases.short(SIZES.large)} float32", 7, [peers.ADAM, peers.ADAM_WITH_NOISE]),
    (f"{cases.short(SIZES.cached)} float32", 2, [peers.ADAM]),
    *((f"{SIZES.tensors} tensors of {numel:,}", 2, [peers.ADAM]) for numel in SIZES.small),
    (f"{cases.short(SIZES.large)} float32, SGLD", 1, [peers.PLAIN_SGLD]),
    (f"{cases.short(SIZES.large)} bfloat16", 1, ["LangevinAdam, float32, T = 0"]),
)

ROUNDS = 15

pytestmark = pytest.mark.filterwarnings("ignore:.*temperature > 0 with prior_precision = 0")


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    yield
    torch.set_num_threads(before)


GROUP_AT = Groups(MAKERS)


@pytest.mark.parametrize(
    ("index", "peer"), [(i, peer) for i, group in enumerate(GROUPS) for peer in group[2]]
)
def test_peer(benchmark, index: int, peer: str) -> None:  # type: ignore[no-untyped-def]
    """The peers alone, to stand beside ours in the tables."""
    group = GROUP_AT[index]
    contestant = _of(group, peer)
    benchmark.group, benchmark.name = GROUPS[index][0], peer
    _prepare(contestant)
    benchmark.pedantic(contestant.run, rounds=_rounds(group), iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("number", range(2))
def test_other_peer(benchmark, number: int) -> None:  # type: ignore[no-untyped-def]
    """Peers that no goal names, for scale."""
    start, grads = cases.values(1, SIZES.large, 0), cases.values(1, SIZES.large, 1)
    contestant = peers.others(cases.parameters(start, grads))[number]
    benchmark.group, benchmark.name = GROUPS[0][0], contestant.name
    benchmark.pedantic(contestant.run, rounds=ROUNDS, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize(
    ("index", "number"), [(i, n) for i, group in enumerate(GROUPS) for n in range(group[1])]
)
def test_row(benchmark, index: int, number: int) -> None:  # type: ignore[no-untyped-def]
    """Ours, with a turn of the peer before each round."""
    group = GROUP_AT[index]
    row = group.rows[number]
    if row.missing:
        pytest.skip(f"{row.case}: {row.missing}")
    ours, peer = _of(group, row.ours), _of(group, row.peer)
    peer_times: list[float] = []

    def peer_takes_its_turn() -> None:
        _finish(ours)
        _prepare(peer)
        peer.run()
        started = time.perf_counter()
        peer.run()
        peer_times.append(time.perf_counter() - started)
        _finish(peer)
        _prepare(ours)
        ours.run()

    benchmark.group, benchmark.name = GROUPS[index][0], f"ours: {row.case}, beside {row.peer}"
    rounds = _rounds(group)
    _prepare(ours)
    try:
        benchmark.pedantic(ours.run, setup=peer_takes_its_turn, rounds=rounds, iterations=1, warmup_rounds=1)
    finally:
        _finish(ours)
    peer_median = statistics.median(peer_times[-rounds:])
    record(benchmark, row, peer_median)


def _rounds(group: cases.Group) -> int:
    return 10 * ROUNDS if group.turn_seconds > 0 else ROUNDS


def _of(group: cases.Group, name: str) -> Contestant:
    return next(contestant for contestant in group.contestants if contestant.name == name)


def _prepare(contestant: Contestant) -> None:
    if contestant.prepare is not None:
        contestant.prepare()


def _finish(contestant: Contestant) -> None:
    if contestant.restore is not None:
        contestant.restore()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
