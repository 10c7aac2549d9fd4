"""Interleaved medians (A B A B), on the CPU by the clock and on a GPU by events."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fekernels.bench.optimizers import Group, Row
from fekernels.bench.timing import Contestant, Timing, interleave, machine

__all__ = [
    "Contestant",
    "DeviceTiming",
    "Groups",
    "Timing",
    "beside",
    "device_interleave",
    "interleave",
    "machine",
    "record",
]

FLUSH_BYTES = 1 << 30  # more than any cache


@dataclass(frozen=True)
class DeviceTiming:
    """Seconds a step, one value a round: of the device, of the host that hands the work over, and of both together."""

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


class Groups:
    """Groups of a suite, made when a test wants one; the one before it is let go, so that only one is in memory."""

    def __init__(self, makers: Sequence[Callable[[], Group]], rows: Sequence[int] | None = None) -> None:
        """rows: how many each group has, which tests must know before it is made; checked then."""
        self._makers, self._rows = makers, rows
        self._made: dict[int, Group] = {}

    def __getitem__(self, index: int) -> Group:
        if index not in self._made:
            self._made.clear()
            self._made[index] = self._makers[index]()
            assert self._rows is None or len(self._made[index].rows) == self._rows[index]
        return self._made[index]


def beside(benchmark: Any, ours: Contestant, peer: Contestant, rounds: int, cached: bool = True) -> float:
    """Time ours with a turn of the peer before each round. Returns the peer's median in seconds.

    cached: data that the other drove out of the cache comes back, untimed, before each turn.
    """
    peer_times: list[float] = []

    def peer_takes_its_turn() -> None:
        if cached:
            peer.run()
        started = time.perf_counter()
        peer.run()
        peer_times.append(time.perf_counter() - started)
        if cached:
            ours.run()
        if ours.prepare is not None:
            ours.prepare()

    benchmark.pedantic(ours.run, setup=peer_takes_its_turn, rounds=rounds, iterations=1, warmup_rounds=1)
    return statistics.median(peer_times[-rounds:])


def record(benchmark: Any, row: Row, peer_seconds: float) -> None:
    """Leave with pytest-benchmark how the row's times compare with its peer's median, and print that."""
    benchmark.extra_info |= {
        "case": row.case,
        "peer": row.peer,
        "peer_ms": peer_seconds * 1e3,
        "reach": row.reach,
    }
    if benchmark.stats is not None:  # --benchmark-disable leaves none
        ratio = benchmark.stats.stats.median / peer_seconds
        benchmark.extra_info |= {"ratio": ratio, "met": ratio <= row.reach}
        print(f"\n{row.case}: {ratio:.2f} of {row.peer}, to reach {row.reach}")


def random_values(
    count: int, numel: int, seed: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Standard normal tensors, made on the device; never zeros, on which some devices are faster."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(numel, generator=generator, device=device, dtype=dtype) for _ in range(count)]
