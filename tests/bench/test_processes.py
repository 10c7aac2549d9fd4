"""Contestants of several processes: whose turn it is on which rank, how long it took, and what a failure says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from fekernels.bench import processes
from fekernels.bench.case import Shape
from fekernels.bench.timing import Contestant, interleave, take_turn


def sleepers(shape: Shape) -> Sequence[Contestant]:
    """On rank 1 twice as slow; what rank 0 does alone; what collects from both; what fails on one."""
    rank, seconds = torch.distributed.get_rank(), shape[0] / 1000

    def fail() -> None:
        raise ZeroDivisionError("of rank 1")

    contestants = [
        Contestant("both", partial(time.sleep, seconds * (1 + rank)), steps=4),
        Contestant("collects", lambda: torch.distributed.all_reduce(torch.ones(3))),
        Contestant("one fails", fail if rank else lambda: None),
    ]
    return [*contestants, Contestant("alone", partial(time.sleep, seconds))] if rank == 0 else contestants


def test_a_turn_is_that_of_the_slowest_rank_and_a_failure_is_told() -> None:
    processes.close()
    group = processes.group(2, sleepers, (), (40,))
    both, collects, fails, alone = group.contestants
    assert [each.name for each in group.contestants] == ["both", "collects", "one fails", "alone"]
    times = interleave([both, collects, alone], rounds=2)
    # Rank 1 sleeps 0.08 s, in what are four steps; a busy machine makes it longer, and no other rank shorter.
    assert min(times["both"].rounds) >= 0.02 and both.steps == 4
    assert min(times["alone"].rounds) >= 0.04 and min(times["collects"].rounds) > 0
    assert take_turn(alone, 3, True) >= 0.04
    again = processes.group(2, sleepers, (), (1,))  # of the same processes
    del both, collects, alone, group
    assert take_turn(again.contestants[0], 1, False) >= 0.0005
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed:.*ZeroDivisionError: of rank 1"):
        fails.run()
    with pytest.raises(RuntimeError, match="the processes of these contestants have ended"):
        again.contestants[0].run()


def test_without_torch_distributed_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    group = processes.group(2, sleepers, ("both", "alone"), (1,))
    assert not group.contestants
    assert group.missing == dict.fromkeys(("both", "alone"), "this torch has no torch.distributed")
