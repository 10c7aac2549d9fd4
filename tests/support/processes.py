"""Real processes of one gloo group, on the CPU: what each returned, and what ended or hung."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fekernels._runtime import extension, host
from tests.support import fork_server

__all__ = ["Outcome", "run_outcomes", "run_processes"]

GRACE = 15.0  # seconds that the others have after one has failed, to say what they made of it


@dataclass(frozen=True)
class Outcome:
    """Of one rank: what its function returned, or the traceback of what it raised, or where it hung.

    Attributes:
        ended: seconds from the start of all; None where it hung and was killed.
        exitcode: of the process, negative for a signal.
    """

    result: Any
    failure: str
    ended: float | None
    exitcode: int | None


def run_processes(
    function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120.0
) -> list[Any]:
    """``function(*arguments)`` on ``world`` ranks of a gloo group, a thread each; the results by rank.

    Args:
        function: of a module that can be imported, as a new process looks it up there; ``dist.get_rank()`` says where
            it runs. What it returns is saved by ``torch.save``: tensors, numbers and their containers, no DTensors.
        world: how many processes.
        arguments: pickled for every process.
        timeout: seconds after which all are killed. The first start takes 5 of them.

    Raises:
        AssertionError: a rank raised, ended or hung; with the tracebacks of all in the order in which they ended.
    """
    outcomes = run_outcomes(function, world, *arguments, timeout=timeout)
    told = []
    order = sorted(range(world), key=lambda rank: (outcomes[rank].ended is None, outcomes[rank].ended))
    for rank in order:
        outcome = outcomes[rank]
        if outcome.ended is None:
            told.append(
                f"rank {rank} of {world} hung; ended after {timeout:g} s at most, in\n{outcome.failure}"
            )
        elif outcome.failure:
            told.append(f"rank {rank} of {world}, after {outcome.ended:.1f} s:\n{outcome.failure}")
        elif outcome.exitcode:
            told.append(f"rank {rank} of {world} ended with exit code {outcome.exitcode}")
    if told:
        raise AssertionError("\n".join(told))
    return [outcome.result for outcome in outcomes]


def run_outcomes(
    function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120.0
) -> list[Outcome]:
    """As ``run_processes``, of ranks that may fail: what became of each.

    Once one has ended by a failure the others have ``GRACE`` seconds to end too.
    """
    for built in (extension, host):  # here, as every process would wait for it within its time
        built.unavailable_reason()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            fork_server.process(
                _run, rank, world, folder, timeout, function, arguments, environment=os.environ
            )
            for rank in range(world)
        ]
        ended: list[float | None] = [None] * world
        started = time.monotonic()
        limit = started + timeout
        try:
            for process in processes:
                process.start()
            while None in ended and (left := limit - time.monotonic()) > 0:
                wait([p.sentinel for p, at in zip(processes, ended, strict=True) if at is None], left)
                now = time.monotonic()
                for rank, process in enumerate(processes):
                    if ended[rank] is None and process.exitcode is not None:
                        ended[rank] = now - started
                        if process.exitcode != 0:
                            limit = min(limit, now + GRACE)
        finally:
            hung = [process for process in processes if process.is_alive()]
            for process in hung:
                os.kill(process.pid, signal.SIGUSR1)
            if hung:
                time.sleep(0.5)  # for their stacks
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        return [
            Outcome(*_said(Path(folder, str(rank))), ended[rank], processes[rank].exitcode)
            for rank in range(world)
        ]


def _said(path: Path) -> tuple[Any, str]:
    if path.exists():
        said: tuple[Any, str] = torch.load(path, weights_only=False)
        return said
    stacks = path.with_suffix(".stacks")
    return None, stacks.read_text() if stacks.exists() else ""


def _run(
    rank: int,
    world: int,
    folder: str,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}/{rank}.stacks", "w"))  # noqa: SIM115
    torch.set_num_threads(1)
    said: tuple[Any, str]
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        said = (function(*arguments), "")
    except BaseException:
        said = (None, traceback.format_exc())
    # Renamed when it is whole, as the process may be killed on the way.
    torch.save(said, f"{folder}/{rank}.part")
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}")
    if said[1]:
        os._exit(1)  # not by way of the group's destructor, which would wait for the others
    dist.destroy_process_group()
