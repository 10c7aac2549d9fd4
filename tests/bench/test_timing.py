"""The benchmarks' clock: contestants in turn, times of one step, medians."""

from __future__ import annotations

import pytest

from fekernels.bench import timing
from fekernels.bench.timing import Contestant, Timing, interleave


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str) -> Contestant:
        return Contestant(
            name,
            lambda: order.append(name),
            prepare=lambda: order.append(f"+{name}"),
            restore=lambda: order.append(f"-{name}"),
        )

    times = interleave([contestant("a"), contestant("b")], rounds=3)
    assert order[-18:] == ["+a", "a", "-a", "+b", "b", "-b"] * 3
    assert [len(timing.rounds) for timing in times.values()] == [3, 3]


def test_times_are_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def run_for(seconds: float) -> None:
        clock[0] += seconds

    contestants = [
        Contestant("quick", lambda: run_for(0.125)),
        Contestant("slow", lambda: run_for(0.5), prepare=lambda: run_for(64.0)),
        Contestant("of four steps", lambda: run_for(1.0), steps=4),
    ]
    times = interleave(contestants, rounds=3, turn_seconds=1.0)
    assert {name: timing.median for name, timing in times.items()} == {
        "quick": 0.125,
        "slow": 0.5,
        "of four steps": 0.25,
    }
    assert {name: timing.steps_per_round for name, timing in times.items()} == {
        "quick": 8,
        "slow": 2,
        "of four steps": 4,
    }
    assert len(interleave(contestants[:1], rounds=3, seconds=10.0)["quick"].rounds) == 80


def test_median_and_quartiles() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0), 1)
    assert timing.median == 3.0
    assert timing.quartiles() == (1.5, 52.0)
    assert Timing((7.0,), 1).quartiles() == (7.0, 7.0)
    assert timing.scaled(2.0).rounds == (8.0, 2.0, 4.0, 6.0, 200.0)


def test_restore_follows_a_failure() -> None:
    restored: list[int] = []

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave([Contestant("a", fail, restore=lambda: restored.append(1))])
    assert restored == [1]
