"""Interleaved timing: each round runs every contestant once, in turn, so that a slow moment slows all of them alike."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["HARMLESS", "Contestant", "Timing", "interleave", "machine", "take_turn"]

# A warning's text: that weights without a gradient would walk without a prior does not matter to a clock.
HARMLESS = ".*temperature > 0 with prior_precision = 0"


@dataclass(frozen=True)
class Contestant:
    """Something to time. ``prepare`` and ``restore`` run before and after each of its turns, untimed.

    Attributes:
        steps: optimizer steps that one call of ``run`` takes.
        turn: what takes a turn elsewhere, as in other processes (``bench.processes``), and returns its seconds: called
            with the number of runs, and whether one more goes before them untimed. None: ``run``, here.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    restore: Callable[[], object] | None = None
    steps: int = 1
    turn: Callable[[int, bool], float] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds per step, one value per round."""

    rounds: tuple[float, ...]
    steps_per_round: int

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        """Of the round that nothing disturbed: what the machine can do."""
        return min(self.rounds)

    def quartiles(self) -> tuple[float, float]:
        """First and third; both the median when there is one round."""
        if len(self.rounds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.rounds, n=4)
        return first, third

    def scaled(self, factor: float) -> Timing:
        """The times of so many times the work."""
        return Timing(tuple(seconds * factor for seconds in self.rounds), self.steps_per_round)


def interleave(
    contestants: Sequence[Contestant], *, rounds: int = 15, seconds: float = 0.0, turn_seconds: float = 0.0
) -> dict[str, Timing]:
    """Time every contestant in every round, in the order given.

    Args:
        contestants: their names must differ.
        rounds: the fewest; 15 make a median that one disturbance in seven leaves alone.
        seconds: go on with more rounds until so much time has passed.
        turn_seconds: a turn repeats a short step until it lasts about this long, after one untimed step that brings its
            data back into the cache from which the others drove it. 0: one step per turn, for data larger than that.

    Returns:
        The times by name.
    """
    repeats = {contestant.name: _repeats(contestant, turn_seconds) for contestant in contestants}
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        done = 0
        while done < rounds or time.perf_counter() - started < seconds:
            for contestant in contestants:
                times[contestant.name].append(
                    take_turn(contestant, repeats[contestant.name], turn_seconds > 0)
                )
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {c.name: Timing(tuple(times[c.name]), repeats[c.name] * c.steps) for c in contestants}


def take_turn(
    contestant: Contestant, repeats: int, warm: bool, begin: Callable[[], object] | None = None
) -> float:
    """Seconds per step of one turn.

    Args:
        contestant: whose turn it is.
        repeats: how often it runs.
        warm: whether it runs once more before, untimed.
        begin: called when it is ready, right before the clock starts.
    """
    if contestant.turn is not None:
        return contestant.turn(repeats, warm) / (repeats * contestant.steps)
    if contestant.prepare is not None:
        contestant.prepare()
    try:
        run = contestant.run
        if warm:
            run()
        if begin is not None:
            begin()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started) / (repeats * contestant.steps)
    finally:
        if contestant.restore is not None:
            contestant.restore()


def _repeats(contestant: Contestant, turn_seconds: float) -> int:
    """Warm the contestant up, and count how many of its runs make a turn."""
    take_turn(contestant, 1, False)
    if turn_seconds == 0:
        return 1
    return max(1, math.ceil(turn_seconds / (take_turn(contestant, 3, False) * contestant.steps)))


def machine() -> dict[str, Any]:
    """What the times depend on: processor, instruction set, threads, versions, and how busy the machine is."""
    import fekernels
    from fekernels._runtime import extension

    reason = extension.unavailable_reason()
    native = torch.ops.fekernels_native
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": native.isa() if reason is None else "none",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "compiled": native.build_info() if reason is None else "no",
        "fekernels": fekernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
