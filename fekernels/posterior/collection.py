"""Thinned snapshots of a network's weights: which are kept, in memory or on disk, and in what order."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fekernels._checks import device as as_device
from fekernels._checks import integer, one_of
from fekernels._runtime.agreement import agree
from fekernels._runtime.ranks import group_of, has_ranks, is_first, processes_without_group, restarted
from fekernels.posterior.model_calls import bare, tied_names
from fekernels.posterior.running_statistics import tracking_norms
from fekernels.posterior.store import (
    MADE_EARLY,
    DiskStore,
    MemoryStore,
    as_path,
    opened,
    place_of,
    read_file,
    shapes,
    write_file,
)
from fekernels.posterior.weights import check_shapes, is_split, own_tensors, unsharded

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WeightCollection"]


class WeightCollection:
    """What of ``PosteriorSamples`` keeps samples; there are its arguments."""

    def __init__(
        self,
        model: nn.Module,
        *,
        burn_in: int = 0,
        thinning: int = 1,
        max_samples: int | None = None,
        policy: str = "fifo",
        directory: str | Path | None = None,
        device: torch.device | str | None = "cpu",
        seed: int = 0,
        chains: int | None = None,
        optimizer: Optimizer | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"PosteriorSamples: model must be a torch.nn.Module; got {type(model).__name__}")
        self.burn_in = integer("PosteriorSamples", "burn_in", burn_in, 0)
        self.thinning = integer("PosteriorSamples", "thinning", thinning, 1)
        self.max_samples = (
            None if max_samples is None else integer("PosteriorSamples", "max_samples", max_samples, 1)
        )
        self.policy = one_of("PosteriorSamples", "policy", policy, ("fifo", "reservoir"))
        self.seed = integer("PosteriorSamples", "seed", seed)
        if directory is not None and not isinstance(directory, (str, Path)):
            raise TypeError(
                f"PosteriorSamples: directory must be a path or None; got {type(directory).__name__}"
            )
        self._given_chains = None if chains is None else integer("PosteriorSamples", "chains", chains, 0)
        # Not by its class: the optimizers' package imports this module.
        if optimizer is not None and "frozen" not in getattr(optimizer, "defaults", {}):
            raise TypeError(
                f"PosteriorSamples: optimizer must be a LangevinAdam or None; got {type(optimizer).__name__}"
            )
        self._optimizer, self._warned = optimizer, False
        at = None if device is None else as_device("PosteriorSamples", "device", device)
        self._model = bare(model)
        self._aliases = tied_names(self._model)
        group = group_of("PosteriorSamples", process_group)
        settings = {
            "burn_in": self.burn_in, "thinning": self.thinning, "max_samples": self.max_samples, "policy": self.policy,
            "directory": place_of(directory), "seed": self.seed, "chains": self._given_chains,
        }  # fmt: skip
        agree("PosteriorSamples", settings, group)
        # Whom to warn that they are several: a trainer may initialise the group after this object is made.
        self._writes_alone = directory if group is None else None
        self._has_group, self._is_first = group is not None, is_first(group)
        self._came_early, self._looked = not has_ranks(), False
        self._store: MemoryStore | DiskStore = opened(directory, at, group)
        self.calls: int = self._store.counts["calls"]
        self.seen: int = self._store.counts["seen"]
        self.chains: int = self._chains_of(self._store.counts, len(self._store), str(directory))
        # What an update has to be past, to be of the run that goes on here; None once one was.
        self._resumed_at = self.calls if self.calls and len(self._store) else None
        if len(self._store):
            self._check_fits(self._store.shapes, len(self._store), str(directory))
        if norms := tracking_norms(self._model):
            name, norm = next(iter(norms.items()))
            warnings.warn(
                f"PosteriorSamples: model predicts with running statistics ({name or 'the model'!r}, "
                f"{type(norm).__name__}, is the first of {len(norms)} such norms), which are those of past weights "
                "and not of a sample's: call refresh_statistics(loader) after sampling and before predict",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._store)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index` (oldest first), as `model.load_state_dict` takes it. Do not write to its tensors."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"PosteriorSamples: index must be in [-{len(self)}, {len(self)}); got {index}")
        sample = self._store.read(index % len(self))
        # Entries that are no tensor ("extra state") are the model's own.
        state = {**self._model.state_dict(), **sample}
        state.update({name: state[first] for name, first in self._aliases.items() if name in state})
        return state

    def __repr__(self) -> str:
        return (
            f"PosteriorSamples({len(self)} samples, calls={self.calls}, burn_in={self.burn_in}, "
            f"thinning={self.thinning}, max_samples={self.max_samples}, policy={self.policy!r})"
        )

    def update(self, step: int | None = None) -> bool:
        """Count a call and keep the weights when one is due. Returns whether it did.

        Args:
            step: the number of steps made so far, in place of counting calls: for an update every few steps,
                and after a restart from an older checkpoint, where steps up to the last one counted are not
                collected twice.

        Raises:
            ValueError: the model is sharded over ranks and this object has no process_group.

        Warns:
            UserWarning: once, by the first rank, where the first ``step`` is not past those of the samples that
                ``directory`` held: those of another run would stay the only ones for as many steps. Not where torchrun
                has restarted the processes. Without ``step`` nothing tells a new run from one that goes on, and its
                samples are added to what is there.
        """
        count = self.calls + 1 if step is None else integer("PosteriorSamples", "step", step, 0)
        if not self._looked:  # not at a first sample that may come after thousands of steps
            self._looked = True
            self._check_gathering(self._model.named_parameters())
        if self._resumed_at is not None and step is not None:
            last, self._resumed_at = self._resumed_at, None
            if count <= last and self._is_first and not restarted():
                warnings.warn(self._told_of_resumption(count, last), stacklevel=2)
        if count <= self.calls:
            return False
        due = self._due(count) > self._due(self.calls)
        self.calls = count
        if due:
            self.collect()
        return due

    def _told_of_resumption(self, count: int, last: int) -> str:
        kept = f"the {len(self)} samples already in the directory are of steps up to {last}"
        if count > 1:  # as after a checkpoint, which is what most that come here do
            return (
                f"PosteriorSamples.update: goes on at step {count}; {kept}, which are not kept twice. (A new run needs "
                "a new, empty directory.)"
            )
        return (
            f"PosteriorSamples.update: nothing is kept before step {last + 1}, as {kept}; got step {count}. Right "
            "where this is the same run from its start. A new run needs a new, empty directory"
        )

    def _check_gathering(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """That all ranks come here where all must: of one that comes alone nobody else would ever know."""
        if self._has_group:
            return
        name = next((name for name, tensor in tensors if is_split(tensor)), None)
        if name is None:
            return
        raise ValueError(
            "PosteriorSamples: process_group must be given for a model that is sharded over ranks, whose weights are "
            f"gathered; got None and {name!r} in shards. On every rank, once there is a process group, make "
            "PosteriorSamples(..., process_group=torch.distributed.group.WORLD), and let every rank call update and "
            f"collect, not rank 0 alone{MADE_EARLY if self._came_early else ''}"
        )

    def _due(self, calls: int) -> int:
        return max(calls - self.burn_in, 0) // self.thinning

    def collect(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Keep the present weights now, whatever burn_in and thinning say; max_samples and policy hold.

        Args:
            state: weights to keep instead of the model's, as its `state_dict` has them: of `Chains.states`, say.
                Those of a model that FSDP2 shards are gathered: a collective then, of every rank.

        Raises:
            ValueError: state lacks a tensor or has another shape; the model is sharded over ranks and this object has
                no process_group; a rank without chains.
            RuntimeError: another process or object has written to ``directory``.
        """
        self._warn_of_strangers()
        if self.chains == 0:
            raise ValueError("PosteriorSamples.collect: chains must be at least 1 to keep a sample; got 0")
        sample = own_tensors(self._model)
        if state is not None:
            missing = [name for name in sample if name not in state]
            if missing:
                raise ValueError(
                    f"PosteriorSamples.collect: state must hold {missing[0]!r}; got {sorted(state)}"
                )
            sample = {name: state[name].detach() for name in sample}
            check_shapes(self._model, shapes(sample), "state")
        if form := self._store.shapes:
            check_shapes(self._model, form, "the samples so far")
        self._check_gathering(sample.items())
        sample = {name: unsharded(value) for name, value in sample.items()}
        self.seen += 1
        drop: int | None = None
        if self.max_samples is not None and len(self) >= self.max_samples:
            drop = 0
            if self.policy == "reservoir":
                # A generator from (seed, seen) has no state of its own, so a resumed run makes the same
                # choices.
                drop = random.Random(f"{self.seed}/{self.seen}").randrange(self.seen)
                if drop >= self.max_samples:
                    self._store.note(self._counts())
                    return
        self._store.add(sample, drop, self._counts())

    def _warn_of_strangers(self) -> None:
        """Once, before the first is written."""
        directory, self._writes_alone = self._writes_alone, None
        if directory is not None and (count := processes_without_group()):
            warnings.warn(
                f"PosteriorSamples: torchrun started {count} processes that know nothing of each other, and each keeps "
                f"its samples in {directory}, as if they were of one run: call torch.distributed.init_process_group() "
                "and give process_group=torch.distributed.group.WORLD, or each process a directory of its own",
                stacklevel=3,
            )

    def _counts(self) -> dict[str, int]:
        return {"calls": self.calls, "seen": self.seen, "chains": self.chains}

    def collect_shards(
        self, own: Mapping[int, Mapping[str, Tensor]], total: int, run: dict[str, Any] | None = None
    ) -> None:
        """Keep `total` states and no others, this rank's by their indices among all; alone, all of them. A collective.

        Args:
            run: what these are the samples of, which is kept with them until others are added.
        """
        self._warn_of_strangers()
        self.calls, self.seen = 0, total
        samples = {
            i: {name: state[name].detach() for name in own_tensors(self._model)} for i, state in own.items()
        }
        self._store.replace_by_shards(samples, total, self._counts(), run)

    @property
    def run(self) -> dict[str, Any] | None:
        """What the samples here are of, as `collect_shards` was told it."""
        return self._store.run

    def _check_fits(self, came: dict[str, list[int]], count: int, where: str) -> None:
        check_shapes(self._model, came, f"the samples in {where}")
        if self.max_samples is not None and count > self.max_samples:
            raise ValueError(
                f"PosteriorSamples: max_samples must be at least {count}, the samples in {where}; "
                f"got {self.max_samples}"
            )

    def _chains_of(self, counts: Mapping[str, int], samples: int, where: str) -> int:
        stored, given = counts.get("chains"), self._given_chains
        if given is None:
            return 1 if stored is None else stored
        if samples and stored not in (None, given):
            raise ValueError(
                f"PosteriorSamples: chains must be {stored}, of which the samples in {where} are, or None; got {given}"
            )
        return given

    def save(self, path: str | Path) -> None:
        """Write all samples and counts to one safetensors file (needs the memory of all of them at once).

        Raises:
            TypeError: path is no path. ValueError: it is a directory, or its directory does not exist.
        """
        path = as_path("PosteriorSamples.save", path)
        if path.is_dir() or not path.parent.is_dir():
            wrong = "a directory" if path.is_dir() else f"{path}, whose directory does not exist"
            raise ValueError(
                f"PosteriorSamples.save: path must be a file's in a directory that exists; got {wrong}"
            )
        samples = [self._store.read(index) for index in range(len(self))]
        write_file(path, samples, self._counts())

    def load(self, path: str | Path) -> Self:
        """Replace what is here by a file from `save`, and return self. The settings stay this object's, but
        for `chains` where none was given.

        Raises:
            TypeError: path is no path. ValueError: there is no such file there, or it does not suit this object.
        """
        samples, counts = read_file(as_path("PosteriorSamples.load", path))
        if samples:
            self._check_fits(shapes(samples[0]), len(samples), str(path))
        chains = self._chains_of(counts, len(samples), str(path))
        self._store.replace(samples, {**counts, "chains": chains})
        self.calls, self.seen, self.chains = counts["calls"], counts["seen"], chains
        return self
