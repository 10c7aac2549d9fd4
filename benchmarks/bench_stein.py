"""The Stein direction, discrepancy and median beside their peers: ``pytest benchmarks/bench_stein.py``.

Every row of ``python -m fekernels bench --only svgd`` is one benchmark here: ours is what pytest-benchmark times, and
before each of its rounds the peer takes its turn. Nothing is asserted about times. BENCH_THREADS sets torch's threads
(default 2); BENCH_QUICK=1 takes the small sizes. Packages that are not installed are skipped (``pip install pykeops
numpyro pyro-ppl``).

``python -m benchmarks.bench_stein markdown RESULTS.json`` prints README's table from what the bench command wrote.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Groups, beside, record
from fekernels import bench
from fekernels.bench import stein as cases

SIZES = bench.SVGD_QUICK if os.environ.get("BENCH_QUICK") == "1" else bench.SVGD_FULL
MAKERS = cases.groups(SIZES)
# Of each group, as its tensors are not to be made at collection.
ROWS = (3, 2, 1, 1, 1, 3, 1, 1, 1, 3, 2, 1, 1)

ROUNDS = 9


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    yield
    torch.set_num_threads(before)


GROUP_AT = Groups(MAKERS, ROWS)


@pytest.mark.parametrize(("index", "number"), [(i, n) for i, rows in enumerate(ROWS) for n in range(rows)])
def test_row(benchmark, index: int, number: int) -> None:  # type: ignore[no-untyped-def]
    """A row of the issue's table, or of what no goal names."""
    group = GROUP_AT[index]
    row = group.rows[number]
    if row.missing:
        pytest.skip(f"{row.case}: {row.missing}")
    contestants = {contestant.name: contestant for contestant in group.contestants}
    benchmark.group, benchmark.name = row.case, f"ours: {row.case}, beside {row.peer}"
    cached = group.turn_seconds > 0
    rounds = group.rounds or (10 * ROUNDS if cached else ROUNDS)
    median = beside(benchmark, contestants[row.ours], contestants[row.peer], rounds, cached)
    if row.reach is not None:
        record(benchmark, row, median)
        return
    benchmark.extra_info |= {"case": row.case, "peer": row.peer, "peer_ms": median * 1e3}
    if benchmark.stats is not None:  # --benchmark-disable leaves none
        print(f"\n{row.case}: {benchmark.stats.stats.median / median:.2f} of {row.peer}")


def markdown(results: Path) -> None:
    """README's table: a line a case and peer, what misses its aim in bold, and then the peak memory."""
    report = json.loads(results.read_text())
    print("| case | peer | peer ms | ours ms | ratio | aim |\n|---|---|---|---|---|---|")
    for row in report["svgd"]:
        start, aim = (
            f"| {row['case'].removeprefix('direction, ')} | {row['peer']}",
            "" if row["reach"] is None else row["reach"],
        )
        if "missing" in row:
            print(f"{start} | {row['missing']} | | | {aim} |")
            continue
        ratio = f"{row['ratio']:.2g}" if row["ratio"] < 0.1 else f"{row['ratio']:.2f}"
        ratio = f"**{ratio}**" if row["met"] is False else ratio
        peer, ours = (f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}" for ms in (row["peer_ms"], row["ours_ms"]))
        print(f"{start} | {peer} | {ours} | {ratio} | {aim} |")
    print("\n| peak memory beyond the operands | by | MB | aim |\n|---|---|---|---|")
    for row in report["svgd_memory"]:
        grown = row["missing"] if "missing" in row else f"{row['growth_mb']:.0f}"
        aim = f"{row['reach_mb']:.0f}" if "reach_mb" in row else ""
        print(f"| {row['case']} | {row['contestant']} | {grown} | {aim} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["markdown"]:
        markdown(Path(sys.argv[2]))
    else:
        sys.exit(pytest.main([__file__, *sys.argv[1:]]))
