"""The free energy beside its peers, forward + backward: ``pytest benchmarks/bench_free_energy.py``.

Every row of ``python -m fekernels bench --only free_energy`` is one benchmark here: ours is what pytest-benchmark
times, and before each of its rounds the peer takes its turn. Likelihoods that no goal names stand beside eager PyTorch.
Nothing is asserted about times. BENCH_THREADS sets torch's threads (default 2); BENCH_QUICK=1 takes the small sizes.

From what the bench command wrote, ``python -m benchmarks.bench_free_energy markdown RESULTS.json`` prints README's
table, and ``plot RESULTS.json FIGURE.png`` draws the bandwidth over the width of a sample.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Groups, beside, record
from fekernels import bench
from fekernels.bench import free_energy as cases
from fekernels.bench import layouts
from fekernels.bench.timing import Contestant

SIZES = bench.FREE_ENERGY_QUICK if os.environ.get("BENCH_QUICK") == "1" else bench.FREE_ENERGY_FULL
MAKERS = [*cases.groups(SIZES), *layouts.groups(SIZES)]
ROWS = (
    5,
    4,
    2,
    2,
    2,
    2,
    2,
    2,
    *(1,) * (2 * len(SIZES.images) + 1),
)  # of each group, as the groups' tensors are not to be made at collection
OTHERS = [name for name in peers.ENERGIES if name not in cases.PEERS]

ROUNDS = 15


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    yield
    torch.set_num_threads(before)


GROUP_AT = Groups(MAKERS, ROWS)


@pytest.mark.parametrize(("index", "number"), [(i, n) for i, rows in enumerate(ROWS) for n in range(rows)])
def test_row(benchmark, index: int, number: int) -> None:  # type: ignore[no-untyped-def]
    """A row of the issue's table."""
    group = GROUP_AT[index]
    row = group.rows[number]
    if row.missing:
        pytest.skip(f"{row.case}: {row.missing}")
    contestants = {contestant.name: contestant for contestant in group.contestants}
    benchmark.group, benchmark.name = row.case, f"ours: {row.case}, beside {row.peer}"
    rounds = 10 * ROUNDS if group.turn_seconds > 0 else ROUNDS
    median = beside(benchmark, contestants[row.ours], contestants[row.peer], rounds)
    record(benchmark, row, median)


@pytest.mark.parametrize("likelihood", OTHERS)
def test_other_likelihood(benchmark, likelihood: str) -> None:  # type: ignore[no-untyped-def]
    """Likelihoods that no goal names, beside eager PyTorch."""
    batch, width, latents = SIZES.middle
    given = cases.problem(likelihood, (batch // 4, width, latents))
    ours = Contestant(cases.OURS, cases.step(given))
    peer = Contestant(cases.EAGER, cases.step(given, peers.ENERGIES[likelihood]))
    benchmark.group, benchmark.name = f"{likelihood} {batch // 4} x {width}", f"ours, beside {cases.EAGER}"
    median = beside(benchmark, ours, peer, 10 * ROUNDS)
    benchmark.extra_info |= {"peer": cases.EAGER, "peer_ms": median * 1e3}
    if benchmark.stats is not None:
        print(f"\n{likelihood}: {benchmark.stats.stats.median / median:.2f} of {cases.EAGER}")


def plot(results: Path, figure: Path) -> None:
    rows = json.loads(results.read_text())["free_energy_widths"]
    cases.sweep_figure(rows).savefig(figure, dpi=150)


def markdown(results: Path) -> None:
    """README's table: a line a case and peer, what misses its aim in bold."""
    report = json.loads(results.read_text())
    print("| case | peer | peer ms | ours ms | ratio | aim |\n|---|---|---|---|---|---|")
    for row in report["free_energy"]:
        start = f"| {row['case']} | {row['peer']}"
        if "missing" in row:
            print(f"{start} | {row['missing']} | | | {row['reach']} |")
            continue
        ratio = f"{row['ratio']:.2f}" if row["met"] else f"**{row['ratio']:.2f}**"
        print(f"{start} | {row['peer_ms']:.3g} | {row['ours_ms']:.3g} | {ratio} | {row['reach']} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["plot"]:
        plot(*(Path(argument) for argument in sys.argv[2:4]))
    elif sys.argv[1:2] == ["markdown"]:
        markdown(Path(sys.argv[2]))
    else:
        sys.exit(pytest.main([__file__, *sys.argv[1:]]))
