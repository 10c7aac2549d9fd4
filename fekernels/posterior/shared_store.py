"""A directory of samples that the ranks of a process group share: one keeps the index, all read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fekernels._runtime.ranks import gathered_numbers
from fekernels.posterior.store import Counts, DiskStore, Run, Sample, shapes

OWNER = "PosteriorSamples"
WAIT = 60.0  # seconds for a file of a few megabytes to be written, and seen through a network's file system
LOOK = 0.02


class SharedDiskStore(DiskStore):
    """``DiskStore`` of which every rank does the same, and rank 0 alone what changes the directory.

    The others count what rank 0 is to have written, and when they read wait until the index says so. To open it is a
    collective, to change and to read is none, so that rank 0 may read alone.
    """

    def __init__(self, directory: Path, group: Any) -> None:
        self._group, self._leads = group, dist.get_rank(group) == 0
        self._directory = directory
        problem: Exception | None = None
        if self._leads:
            try:
                super().__init__(directory)
            except Exception as error:
                problem = error
        told = [0, 0, 0, 0]
        if self._leads and problem is None:
            told = [1, self._serial, self.counts["calls"], self.counts["seen"]]
        opened, serial, calls, seen = gathered_numbers(OWNER, told, group)[0]
        if problem is not None:
            raise problem
        if not opened:
            raise ValueError(
                f"{OWNER}: directory must be one that rank 0 can open; it could not open {directory}"
            )
        self._due = serial  # of the index, before which a rank that follows may not read
        if not self._leads:
            if not directory.is_dir():
                raise ValueError(
                    f"{OWNER}: directory must be one that all ranks see; rank 0 opened {directory}, and here is none"
                )
            super().__init__(directory)
            self.counts = {**self.counts, "calls": calls, "seen": seen}  # not what rank 0 has counted since

    def _remove_temporaries(self) -> None:
        if self._leads:
            super()._remove_temporaries()

    def _look(self) -> None:
        """The index as it is, once it says what is due."""
        if self._leads:
            return
        limit = time.monotonic() + WAIT
        while True:
            if (stamp := self._stamp()) is not None and stamp != self._known:
                self._read_index()
            if self._serial >= self._due:
                return
            if time.monotonic() > limit:
                raise RuntimeError(
                    f"{OWNER}: rank 0 must have written sample number {self._due} to {self._directory} by now, and has "
                    f"not within {WAIT:g} s: it has ended or hangs, does not collect what this rank does, or writes to "
                    "another file system"
                )
            time.sleep(LOOK)

    def __len__(self) -> int:
        self._look()
        return super().__len__()

    def __iter__(self) -> Iterator[Sample]:
        self._look()
        return super().__iter__()

    def read(self, index: int) -> Sample:
        self._look()
        return super().read(index)

    def add(self, sample: Sample, drop: int | None, counts: Counts) -> None:
        if self._leads:
            super().add(sample, drop, counts)
        self._due += 1

    def note(self, counts: Counts) -> None:
        if self._leads:
            super().note(counts)

    def amend(self, index: int, changes: Sample) -> None:
        if self._leads:
            super().amend(index, changes)
        self._due += 1

    def replace(self, samples: list[Sample], counts: Counts) -> None:
        if self._leads:
            super().replace(samples, counts)
        self._due += len(samples)

    def replace_by_shards(self, own: dict[int, Sample], total: int, counts: Counts, run: Run) -> None:
        """Every rank writes its files, and rank 0 the index once all have: a collective."""
        problem: Exception | None = None
        names: list[str] = []
        try:
            if self._leads:
                with self._alone():
                    self._begin()
        except Exception as error:
            problem = error
        # No rank writes before what others left there is gone, none is read before all are whole.
        self._together(problem, "tidy")
        try:
            for index, sample in own.items():
                self._write(index, sample)
        except Exception as error:
            problem = error
        self._together(problem, "write its samples to")
        try:
            if self._leads:
                names = [f"sample-{self._serial + index:08d}.safetensors" for index in range(total)]
                form = shapes(next(iter(own.values()))) if own else self.shapes
                with self._alone():
                    before = set(self._files)
                    self._write_index(names, self._serial + total, form, counts, run)
                    self._remove(before)
        except Exception as error:
            problem = error
        self._together(problem, "write the index of")
        self._due += total

    def _together(self, problem: Exception | None, what: str) -> None:
        failed = [
            rank
            for rank, (bad,) in enumerate(gathered_numbers(OWNER, [int(problem is not None)], self._group))
            if bad
        ]
        if problem is not None:
            raise problem
        if failed:
            raise RuntimeError(f"{OWNER}: rank {failed[0]} could not {what} {self._directory}")
