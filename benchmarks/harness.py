"""Interleaved medians (A B A B): the registry's rows under pytest-benchmark, and any contestants on a GPU by events."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fekernels.bench import floors
from fekernels.bench.case import Case, Row
from fekernels.bench.registry import FAMILIES
from fekernels.bench.runner import Made, make, result
from fekernels.bench.timing import Contestant, Timing, interleave, machine, take_turn

__all__ = [
    "Contestant",
    "DeviceTiming",
    "Timing",
    "device_interleave",
    "interleave",
    "machine",
    "main",
    "random_values",
    "rows",
]

FLUSH_BYTES = 1 << 30  # more than any cache


@dataclass(frozen=True)
class DeviceTiming:
    """Seconds per step, one value per round: of the device, of the host that hands the work over, and of both."""

    device: tuple[float, ...]
    host: tuple[float, ...]
    called: tuple[float, ...]

    @property
    def device_median(self) -> float:
        """Time on the device with its queue kept full: the kernels alone."""
        return statistics.median(self.device)

    @property
    def host_median(self) -> float:
        """Time until the call returns, while the device is busy with other things."""
        return statistics.median(self.host)

    @property
    def called_median(self) -> float:
        """Time a step of a loop of steps, from an idle device until it is idle again."""
        return statistics.median(self.called)

    def milliseconds(self) -> dict[str, Any]:
        """The columns of a table of times."""
        return {
            "device_ms": self.device_median * 1e3,
            "host_ms": self.host_median * 1e3,
            "called_ms": self.called_median * 1e3,
            "device_ms_rounds": [t * 1e3 for t in self.device],
        }


class _Device:
    """Times runs on one device. On a CPU all three times are the same, which is good enough to try the code out."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        size = FLUSH_BYTES if self.cuda else 1 << 20
        self._spacer = torch.empty(size, dtype=torch.uint8, device=device)
        self._spacer_seconds = self._time_spacer() if self.cuda else 0.0

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _time_spacer(self) -> float:
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self._spacer.zero_()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return statistics.median(times)

    def occupy(self, seconds: float) -> None:
        """Give the device work for so long, which also drives everything out of its cache."""
        for _ in range(max(1, math.ceil(seconds / self._spacer_seconds)) if self.cuda else 1):
            self._spacer.zero_()

    def turn(self, contestant: Contestant, repeats: int, host_guess: float) -> tuple[float, float, float]:
        """(device, host, called) of one turn, a step each."""
        steps = repeats * contestant.steps
        if contestant.prepare is not None:
            contestant.prepare()
        try:
            contestant.run()
            self.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                contestant.run()
            self.synchronize()
            called = (time.perf_counter() - started) / steps
            if not self.cuda:
                return called, called, called

            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # The device must still be occupied when the last of these launches arrives, or its time has gaps in it.
            self.occupy(2 * host_guess * steps + 1e-4)
            start.record()
            started = time.perf_counter()
            for _ in range(repeats):
                contestant.run()
            host = (time.perf_counter() - started) / steps
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / steps, host, called
        finally:
            if contestant.restore is not None:
                contestant.restore()


def device_interleave(
    contestants: Sequence[Contestant], device: torch.device, *, rounds: int = 15, turn_seconds: float = 2e-3
) -> dict[str, DeviceTiming]:
    """Time every contestant in every round, in the order given, on ``device``.

    Args:
        contestants: their names must differ. Their tensors should be larger than the device's cache, or ``run`` should
            go through several sets of them: within a turn nothing is flushed.
        device: a CUDA device, or the CPU to try the code out.
        rounds: of which the medians are taken.
        turn_seconds: a turn repeats ``run`` until it lasts about so long.
    """
    clock = _Device(device)
    repeats: dict[str, int] = {}
    hosts: dict[str, float] = {}
    for contestant in contestants:
        clock.turn(contestant, 1, 1e-3)  # compiles what is compiled at first use
        _, host, called = clock.turn(contestant, 3, 1e-3)
        repeats[contestant.name] = min(50, max(1, math.ceil(turn_seconds / (called * contestant.steps))))
        hosts[contestant.name] = host
    turns: dict[str, list[tuple[float, float, float]]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            name = contestant.name
            turns[name].append(clock.turn(contestant, repeats[name], hosts[name]))
    return {
        name: DeviceTiming(*(tuple(column) for column in zip(*values, strict=True)))
        for name, values in turns.items()
    }


SIZE = "quick" if os.environ.get("BENCH_QUICK") == "1" else "full"
THREADS = int(os.environ.get("BENCH_THREADS", "2"))

_made: dict[str, Made] = {}


def _make(case: Case) -> Made:
    """The case of the test that runs, kept for its next row; the one before it is let go, so that one is in memory."""
    if case.name not in _made:
        _made.clear()
        _made[case.name] = make(case, SIZE)
    return _made[case.name]


def rows(family: str) -> Callable[..., None]:
    """The test of every row of a family: pytest-benchmark times ours, the peer has a turn before each of its rounds.

    No aim is asserted, as a busy machine would miss it: the tables are to be read.
    """
    cases = [(case, row) for case in FAMILIES[family].cases for row in case.rows]

    @pytest.mark.filterwarnings("ignore:.*temperature > 0 with prior_precision = 0")
    @pytest.mark.parametrize(
        ("case", "row"), cases, ids=[f"{case.name}-{row.ours}-{row.peer}" for case, row in cases]
    )
    def test_row(benchmark: Any, case: Case, row: Row) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            _time(benchmark, _make(case), row)
        finally:
            torch.set_num_threads(threads)

    return test_row


def _time(benchmark: Any, made: Made, row: Row) -> None:
    """``extra_info`` has the peer, the ratio, the aim and the floor, as the JSON of the bench command has them."""
    label = made.case.row_label(row, made.size)
    if why := made.why_missing(row):
        pytest.skip(f"{label}: {why}")
    cost = made.costs.get(row.ours)
    names = {row.ours, row.peer} | (set() if cost is None else {*floors.MOVERS, *cost.operations})
    others = [each for each in made.contestants if each.name in names - {row.ours}]
    ours = next(each for each in made.contestants if each.name == row.ours)
    warm = made.case.cached
    times: dict[str, list[float]] = {each.name: [] for each in others}

    def the_others_take_their_turns() -> None:
        _call(ours.restore)
        for other in others:
            times[other.name].append(take_turn(other, 1, warm))
        _call(ours.prepare)
        if warm and ours.turn is None:
            ours.run()
            # What it overwrites has to be restored.
            _call(ours.prepare)

    effort = made.case.effort(made.size)
    rounds = 10 * effort.rounds if warm else effort.rounds
    elsewhere: list[float] = []  # of turns that other processes take and time
    benchmark.group, benchmark.name = label, f"{label}: {row.ours}, beside {row.peer}"
    _call(ours.prepare)
    try:
        benchmark.pedantic(
            ours.run if ours.turn is None else lambda: elsewhere.append(take_turn(ours, 1, warm)),
            setup=the_others_take_their_turns,
            rounds=rounds,
            iterations=1,
            warmup_rounds=1,
        )
    finally:
        _call(ours.restore)
    if benchmark.stats is None:  # --benchmark-disable leaves none
        return
    timed = {name: Timing(tuple(seconds[-rounds:]), 1) for name, seconds in times.items()}
    timed[row.ours] = Timing(tuple(elsewhere[-rounds:] or benchmark.stats.stats.data), 1)
    found = result(made, row, timed)
    benchmark.extra_info |= found
    aim = "" if row.aim is None else f", to reach {row.aim}"
    floor = f", {found['of_floor']:.2f} of the floor ({found['floor']})" if "floor" in found else ""
    print(f"\n{label}: {found['ratio']:.2f} of {row.peer}{aim}{floor}")


def _call(function: Callable[[], object] | None) -> None:
    if function is not None:
        function()


def main(file: str) -> None:
    """Run the benchmarks of a file with the options of the command line."""
    sys.exit(pytest.main([file, *sys.argv[1:]]))


def random_values(
    count: int, numel: int, seed: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Standard normal tensors, made on the device; never zeros, on which some devices are faster."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(numel, generator=generator, device=device, dtype=dtype) for _ in range(count)]
