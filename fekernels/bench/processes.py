"""Contestants that take their turns in several processes of one gloo group, a thread each.

The processes are started once for a world size and wait, asleep, for what they are told over a pipe. A contestant is
made in each of them, by a function that they look up by its name; one that only some ranks make is theirs, so that
what one process does is timed in one of the same. A turn begins when all have prepared it, and takes as long as the
slowest rank.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch

from fekernels.bench.case import Group, Shape
from fekernels.bench.timing import HARMLESS, Contestant, take_turn

__all__ = ["close", "group"]

# What each process makes at a shape. torch.distributed is set up when it is called, and this process one of its ranks.
Build = Callable[[Shape], Sequence[Contestant]]

LIMIT = 600.0  # seconds for one answer

_teams: dict[int, _Team] = {}


def group(world: int, build: Build, names: Collection[str], shape: Shape) -> Group:
    """What ``build`` makes at ``shape`` in ``world`` processes; ``Case.build`` is a ``partial`` of this.

    Args:
        world: how many processes, which are those of every other case with as many.
        build: a function of a module, or a ``partial`` of one.
        names: of the contestants that it makes, told as missing where torch has no torch.distributed.
        shape: of the case.

    Raises:
        RuntimeError: a process failed, with its traceback, or gave no answer within ``LIMIT``. All of them end then.
    """
    if not torch.distributed.is_available():
        return Group([], dict.fromkeys(names, "this torch has no torch.distributed"))
    team = _teams.get(world)
    if team is None:
        team = _teams[world] = _Team(world)
    made = _Made(team, build, shape)
    return Group([made.contestant(name) for name in made.names])


def close() -> None:
    """End the processes; the next ``group`` starts new ones. They end by themselves with the program."""
    for team in list(_teams.values()):
        team.close()


class _Made:
    """What a team keeps of one case, until no contestant of it is left here."""

    def __init__(self, team: _Team, build: Build, shape: Shape) -> None:
        self._team, self._key = team, next(team.keys)
        made = team.ask("make", self._key, build, shape)
        # In the order of rank 0, then what others have beside.
        self.names = list(dict.fromkeys(name for each in made for name in each))
        self._steps = {name: steps for each in made for name, steps in each.items()}
        self._drop = weakref.finalize(self, team.drop, self._key)

    def contestant(self, name: str) -> Contestant:
        turn = partial(self._turn, name)
        return Contestant(name, partial(turn, 1, False), steps=self._steps[name], turn=turn)

    def _turn(self, name: str, repeats: int, warm: bool) -> float:
        return max(self._team.ask("turn", self._key, name, repeats, warm))


class _Team:
    """As many processes, and what is said to them."""

    def __init__(self, world: int) -> None:
        self.keys = count()
        self._world, self._asking = world, False
        self._unused: list[int] = []
        self._folder = tempfile.mkdtemp()
        context = torch.multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world, f"file://{self._folder}/rendezvous"), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, *message: Any) -> list[Any]:
        """Every rank's answer, after all of them have said that they are ready for it."""
        if _teams.get(self._world) is not self:
            raise RuntimeError("bench: the processes of these contestants have ended")
        self._asking = True
        try:
            self._send(message)
            self._answers()
            self._send(("go",))
            return self._answers()
        except BaseException:
            self.close()  # half of an exchange is left in the pipes
            raise
        finally:
            self._asking = False
            while self._unused:
                self.drop(self._unused.pop())

    def _send(self, message: tuple[Any, ...]) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(message)
            except OSError:  # it has ended, and said why
                continue

    def _answers(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT):
                raise RuntimeError(f"bench: rank {rank} of {self._world} gave no answer in {LIMIT:g} s")
            try:
                failure, answer = pipe.recv()
            except EOFError:
                raise RuntimeError(f"bench: the process of rank {rank} of {self._world} has ended") from None
            if failure:
                raise RuntimeError(f"bench: rank {rank} of {self._world} failed:\n{failure}")
            answers.append(answer)
        return answers

    def drop(self, key: int) -> None:
        """Let the processes forget what they made for a case: at once, or after what they are asked now."""
        if self._asking:
            self._unused.append(key)
        else:
            self._send(("drop", key))

    def close(self) -> None:
        if _teams.get(self._world) is self:
            del _teams[self._world]
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(pipe: Connection, rank: int, world: int, rendezvous: str) -> None:
    """The life of a worker."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=HARMLESS)
    # As timing.interleave does here: a collection takes .15 s of the turn that it falls into, the same one's each time.
    gc.disable()
    made: dict[int, dict[str, Contestant]] = {}

    def ready() -> None:
        pipe.send(("", None))
        pipe.recv()

    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        while True:
            what, key, *rest = pipe.recv()
            if what == "drop":
                made.pop(key, None)
                gc.collect()
                continue
            if what == "make":
                ready()
                build, shape = rest
                made[key] = {each.name: each for each in build(shape)}
                pipe.send(("", {name: each.steps for name, each in made[key].items()}))
                continue
            name, repeats, warm = rest
            contestant = made[key].get(name)
            if contestant is None:
                ready()
                seconds = 0.0
            else:
                seconds = take_turn(contestant, repeats, warm, ready) * repeats * contestant.steps
            pipe.send(("", seconds))
    except EOFError:  # the program has ended
        return
    except Exception:
        pipe.send((traceback.format_exc(), None))
