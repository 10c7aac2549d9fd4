"""Thinned snapshots of a network's weights, and prediction averaged over them."""

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
from fekernels._runtime.ranks import group_of, processes_without_group
from fekernels.posterior.batches import check_batches
from fekernels.posterior.model_calls import Pick, as_inputs, bare, call, check_pick, pick, split, tied_names
from fekernels.posterior.prediction import Activation, Average, Prediction
from fekernels.posterior.progress import bar_over
from fekernels.posterior.running_statistics import measure, tracking_norms
from fekernels.posterior.store import (
    DiskStore,
    MemoryStore,
    as_path,
    opened,
    place_of,
    read_file,
    shapes,
    write_file,
)
from fekernels.posterior.weights import check_shapes, own_tensors, unsharded, weights_of

if TYPE_CHECKING:
    from fekernels.posterior.convergence import SampleDiagnostics

__all__ = ["PosteriorSamples", "Prediction"]


class PosteriorSamples:
    """Collects weights along a sampling run and predicts with all of them.

        samples = PosteriorSamples(model, burn_in=1000, thinning=50)
        for x, y in batches:
            ...; optimizer.step(); samples.update()
        prediction = samples.predict(x_test)      # .mean, .predictive_entropy, .mutual_information

    `update()` counts its calls and keeps the weights of call number burn_in + thinning, burn_in + 2 thinning,
    ...; `collect()` keeps them now.

    A sample is every parameter and every persistent buffer. The running statistics of a batch norm belong to
    the weights they were measured with, so each sample carries and predicts with its own. They are an average
    over the weights of many past steps, not those of the sample: `refresh_statistics(loader)` measures them
    again for every sample once sampling is done. A model with such norms is warned about at construction.

    Args:
        model: the network; its weights are read by `update` and `collect`, and never written. A module from
            `torch.compile` is unwrapped, so the names are those of the original.
        burn_in: calls of `update` that come before the first one counted.
        thinning: every how many calls one sample is kept, >= 1. Neighbouring steps are nearly the same
            weights.
        max_samples: how many are kept at most; None is no limit.
        policy: what happens beyond max_samples. "fifo" drops the oldest, the least burnt in. "reservoir"
            keeps a uniformly random subset of all that were collected (Vitter 1985, algorithm R), of one long
            chain the better summary.
        directory: None keeps the samples in memory. A path keeps each as a safetensors file in it: written
            aside and then renamed, so a crash leaves the last consistent set, and the same directory given
            again resumes it. It has one writer: a second one's change raises.
        device: where samples in memory live; "cpu" costs a copy a sample and no accelerator memory. None:
            beside the model.
        seed: of the reservoir's choices.
        chains: how many chains hand in their draws in turn by `collect(state)`, one of each and then the next. 0 is
            a rank's on which `Chains` over more ranks than chains has none: it has nothing to collect. None: as many
            as the samples in ``directory`` or of `load` are of; 1 where there are none.
        optimizer: the `fe.LangevinAdam` that samples, whose gradient noise `predict` then looks at, unless it is cold.
        process_group: of replicas that share ``directory``: every rank makes this object and collects, rank 0 alone
            writes, all read. None: this process writes for itself. To make the object is a collective: all settings
            above but ``device`` are compared.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; on every rank of process_group
            where one of them was given another.

    Warns:
        UserWarning: torchrun started several processes without a process group, and they share a ``directory``.
    """

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
        if directory is not None and group is None and (count := processes_without_group()):
            warnings.warn(
                f"PosteriorSamples: torchrun started {count} processes that know nothing of each other, and each keeps "
                f"its samples in {directory}, as if they were of one run: call torch.distributed.init_process_group() "
                "and give process_group=torch.distributed.group.WORLD, or each process a directory of its own",
                stacklevel=2,
            )
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

        Warns:
            UserWarning: once, where the first ``step`` is not past those of the samples that ``directory`` held: those
                of another run, which would stay the only ones for as many steps. Without ``step`` nothing tells a new
                run from one that goes on, and its samples are added to what is there.
        """
        count = self.calls + 1 if step is None else integer("PosteriorSamples", "step", step, 0)
        if self._resumed_at is not None and step is not None:
            if count <= self._resumed_at:
                warnings.warn(
                    f"PosteriorSamples.update: nothing is kept before step {self._resumed_at + 1}, as the {len(self)} "
                    f"samples that were there already are of steps up to {self._resumed_at}; got step {count}. Right "
                    "where this goes on from an earlier checkpoint of the same run. A new run needs a new, empty "
                    "directory",
                    stacklevel=2,
                )
            self._resumed_at = None
        if count <= self.calls:
            return False
        due = self._due(count) > self._due(self.calls)
        self.calls = count
        if due:
            self.collect()
        return due

    def _due(self, calls: int) -> int:
        return max(calls - self.burn_in, 0) // self.thinning

    def collect(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Keep the present weights now, whatever burn_in and thinning say; max_samples and policy hold.

        Args:
            state: weights to keep instead of the model's, as its `state_dict` has them: of `Chains.states`, say.
                Those of a model that FSDP2 shards are gathered: a collective then, of every rank.
        """
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

    def _counts(self) -> dict[str, int]:
        return {"calls": self.calls, "seen": self.seen, "chains": self.chains}

    def collect_shards(self, own: Mapping[int, Mapping[str, Tensor]], total: int) -> None:
        """Keep `total` states, this rank's by their places among all; alone, all of them. A collective."""
        self.seen += total
        samples = {
            i: {name: state[name].detach() for name in own_tensors(self._model)} for i, state in own.items()
        }
        self._store.add_shards(samples, total, self._counts())

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

    def outputs(self, *args: Any, progress: bool = False, **kwargs: Any) -> Iterator[Any]:
        """What the model returns for these inputs, sample by sample (oldest first), in eval mode and without
        gradients.

        The model's own weights, buffers and modes stay as they are, also after an exception.
        """
        for sample in bar_over(self._store, len(self), progress):
            yield call(self._model, weights_of(self._model, sample), (args, kwargs))

    def diagnostics(self) -> SampleDiagnostics:
        """Split R-hat and effective sample size of all weights, chains apart.

        One chain is compared with itself, first half and second; several tell more (`chains=`). All samples are held
        in memory for it.

        Raises:
            ValueError: fewer than 4 draws of a chain, or a reservoir of several chains, which keeps no order.
        """
        from fekernels.posterior.convergence import LEAST, diagnose

        if len(self) < LEAST * max(self.chains, 1):
            raise ValueError(
                f"PosteriorSamples.diagnostics: there must be {LEAST} draws of each of {self.chains} chains; "
                f"got {len(self)} in all"
            )
        if self.chains > 1 and self.policy == "reservoir":
            raise ValueError(
                "PosteriorSamples.diagnostics: policy must be 'fifo' to tell several chains apart; got 'reservoir'"
            )
        return diagnose(self._in_turn(), self._parameters(), self.chains)

    def _in_turn(self) -> list[dict[str, Tensor]]:
        """From the first draw of chain 0 that is still kept."""
        first = -(self.seen - len(self)) % self.chains
        return [self._store.read(index) for index in range(first, len(self))]

    def _parameters(self) -> list[str]:
        return [name for name, _ in self._model.named_parameters()]

    def _warn_of_doubt(self) -> None:
        """Once, with the numbers."""
        if self._warned:
            return
        self._warned = True
        # Not before it is needed: who only trains does not wait for it at the import.
        from fekernels.posterior.convergence import doubts

        for doubt in doubts(self._in_turn(), self._parameters(), self.chains, self._optimizer):
            warnings.warn(f"PosteriorSamples.predict: {doubt}", stacklevel=3)

    def refresh_statistics(
        self, loader: Iterable[Any], *, device: torch.device | str | None = None, progress: bool = False
    ) -> PosteriorSamples:
        """Measure the running statistics of batch norms again, for every sample with its own weights.

        What `torch.optim.swa_utils.update_bn` does to one model: a pass over the data in training mode (dropout
        included), every batch counting the same. The model itself stays as it is. Does nothing where the model
        has no running statistics. Samples collected later need it again.

        Args:
            loader: an iterable of batches that starts anew for every sample: a DataLoader, a list. A batch is the
                model's input, or a list or tuple whose first entry is (a tuple there is several inputs); a
                mapping is keyword arguments. The training data, or a few thousand rows of it.
            device: where to move the tensors of a batch; None leaves them.
            progress: a tqdm bar over the samples.

        Returns:
            self.

        Raises:
            TypeError: loader is no iterable, or an iterator, which would be used up by the first sample.
            ValueError: it holds no batch. No sample is changed then, nor where the model raises.
        """
        check_batches("PosteriorSamples.refresh_statistics", loader)
        at = None if device is None else as_device("PosteriorSamples.refresh_statistics", "device", device)
        if not tracking_norms(self._model):
            return self
        # All are measured before the first is changed. They are small beside the weights.
        measured = [
            measure(self._model, weights_of(self._model, sample), loader, at)
            for sample in bar_over(self._store, len(self), progress)
        ]
        for index, statistics in enumerate(measured):
            self._store.amend(index, statistics)
        return self

    def predict(
        self,
        x: Tensor | tuple[Any, ...] | Mapping[str, Any],
        activation: Activation = "softmax",
        *,
        dim: int = -1,
        output: Pick = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Prediction:
        """The prediction averaged over all samples.

        Args:
            x: the model's input [B, ...], a tuple of its positional inputs, or a mapping of its keyword inputs.
            activation: "softmax" over the classes, for logits; "sigmoid", for independent binary outputs
                ([B] and [B, 1] too), each with entropies of its own; a callable from outputs to probabilities
                of the classes, which sum to 1; None for regression: mean and variance of the output as it is.
            dim: the dimension of the classes in the model's output, for "softmax" and a callable. Dimension 0 is
                the batch. -1 is right for [B, C] and [B, T, C]; images and volumes, [B, C, H, W], need dim=1.
            output: which part of a model's answer that is a dict, tuple or object: a key or the name of an
                attribute, an index, or a callable that is given the answer. None: the answer is the tensor.
            batch_size: rows of x at a time (of a tuple, of every tensor with as many rows as the first); None
                is all at once. A sample on disk is read once per call, whatever it is.
            progress: a tqdm bar over the samples.

        Averages are in float64 (float32 on MPS, which has none), and of "softmax" and "sigmoid" in the log
        domain.

        Raises:
            ValueError: no sample yet; unknown activation; batch_size < 1; dim is not a dimension of the output
                behind the batch, or has size 1 (one logit is for "sigmoid"); what a callable returns is negative or
                does not sum to 1; the answer has no such part as `output`.
            TypeError: the model's output, or the part `output` of it, is not a dense floating-point tensor; nor is
                what a callable `activation` returns; an argument of a wrong type.

        Warns:
            UserWarning: dim is -1 and the output has four dimensions or more: [B, C, H, W] would be averaged over
                the wrong one. Naming the dimension (dim=1, dim=3) is the answer. Once, with the number: the samples are
                worth fewer than 50 independent ones; the optimizer given at construction has a `gradient_noise_ratio`
                above 0.1.
        """
        if not len(self):
            raise ValueError(
                "PosteriorSamples.predict: there must be a sample; got none (update or collect first)"
            )
        self._warn_of_doubt()
        owner = "PosteriorSamples.predict"
        average = Average(owner, activation, dim)
        output = check_pick(owner, output)
        batches = [as_inputs(x)]
        if batch_size is not None:
            batches = split(batches[0], integer("PosteriorSamples", "batch_size", batch_size, 1))
        for sample in bar_over(self._store, len(self), progress):
            weights = weights_of(self._model, sample)
            outputs = [pick(owner, call(self._model, weights, batch), output) for batch in batches]
            average.add(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        return average.prediction()

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

    def load(self, path: str | Path) -> PosteriorSamples:
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
