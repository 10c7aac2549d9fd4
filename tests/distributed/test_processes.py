"""The tests' own processes: results by rank, a failure's traceback, and who hung."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import run_processes


def of_all(offset):
    mine = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(mine)
    return dist.get_rank(), mine, torch.get_num_threads()


def one_fails_and_one_sleeps():
    if dist.get_rank() == 1:
        raise ZeroDivisionError("of rank 1 alone")
    time.sleep(600)


def test_results_come_by_rank():
    assert run_processes(of_all, 2, 10) == [(rank, torch.tensor([21]), 1) for rank in range(2)]


def test_a_failure_has_its_traceback_and_tells_who_hung(monkeypatch):
    monkeypatch.setattr("tests.support.processes.GRACE", 0.5)
    with pytest.raises(AssertionError) as failed:
        run_processes(one_fails_and_one_sleeps, 2)
    told = str(failed.value)
    assert told.index("ZeroDivisionError: of rank 1 alone") < told.index("rank 0 of 2 hung")
    assert told.count("in one_fails_and_one_sleeps") == 2
