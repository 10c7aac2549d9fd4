"""Thinned snapshots of a network's weights, and prediction averaged over them."""

from __future__ import annotations

import numbers
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fekernels.optim._prediction import Activation, Average, Prediction
from fekernels.optim._sample_store import DiskStore, MemoryStore, read_file, shapes, write_file

__all__ = ["PosteriorSamples", "Prediction"]


def _whole(name: str, value: Any, least: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"PosteriorSamples: {name} must be an int; got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"PosteriorSamples: {name} must be at least {least}; got {value}")
    return int(value)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a tensor that the model holds under several, mapped to its first."""
    first: dict[Tensor, str] = {}
    tied: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in named:
        if first.setdefault(value, name) != name:
            tied[name] = first[value]
    return tied


def _split(inputs: tuple[Any, ...], size: int) -> list[tuple[Any, ...]]:
    first = next((value for value in inputs if isinstance(value, Tensor) and value.ndim), None)
    if first is None:
        raise ValueError(
            "PosteriorSamples.predict: x must hold a tensor with rows where batch_size is given; got none"
        )
    rows = len(first)

    def part(value: Any, start: int) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        return value[start : start + size] if whole else value

    return [tuple(part(value, start) for value in inputs) for start in range(0, max(rows, 1), size)]


def _checked(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        came = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"PosteriorSamples.predict: the model's output must be a floating-point tensor; got {came}"
        )
    return output


def _bar(samples: Iterable[Any], count: int, progress: bool) -> Iterable[Any]:
    if progress:
        from tqdm import tqdm

        return tqdm(samples, total=count, desc="samples", leave=False)
    return samples


class PosteriorSamples:
    """Collects weights along a sampling run and predicts with all of them.

        samples = PosteriorSamples(model, burn_in=1000, thinning=50)
        for x, y in batches:
            ...; optimizer.step(); samples.update()
        prediction = samples.predict(x_test)      # .mean, .predictive_entropy, .mutual_information

    `update()` counts its calls and keeps the weights of call number burn_in + thinning, burn_in + 2 thinning,
    ...; `collect()` keeps them now.

    A sample is every parameter and every persistent buffer. The running statistics of a batch norm belong to
    the weights they were measured with, so each sample carries and predicts with its own. They lag behind by
    the norm's momentum: keep lr small while sampling, or refresh them before `collect()`.

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
        directory: None keeps the samples in memory. A path keeps each as a safetensors file there: written
            aside and then renamed, so a crash leaves the last consistent set, and the same directory given
            again resumes it.
        device: where samples in memory live; "cpu" costs a copy a sample and no accelerator memory. None:
            beside the model.
        seed: of the reservoir's choices.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"PosteriorSamples: model must be a torch.nn.Module; got {type(model).__name__}")
        self.burn_in = _whole("burn_in", burn_in, 0)
        self.thinning = _whole("thinning", thinning, 1)
        self.max_samples = None if max_samples is None else _whole("max_samples", max_samples, 1)
        if policy not in ("fifo", "reservoir"):
            raise ValueError(f"PosteriorSamples: policy must be 'fifo' or 'reservoir'; got {policy!r}")
        self.policy = policy
        self.seed = _whole("seed", seed, None)
        if directory is not None and not isinstance(directory, (str, Path)):
            raise TypeError(
                f"PosteriorSamples: directory must be a path or None; got {type(directory).__name__}"
            )
        self._model = getattr(model, "_orig_mod", model)
        self._aliases = _tied_names(self._model)
        self._store: MemoryStore | DiskStore
        self._store = MemoryStore(device) if directory is None else DiskStore(Path(directory))
        self.calls: int = self._store.counts["calls"]
        self.seen: int = self._store.counts["seen"]
        if len(self._store):
            self._check_fits(self._store.shapes, len(self._store), str(directory))

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
        """
        count = self.calls + 1 if step is None else _whole("step", step, 0)
        if count <= self.calls:
            return False
        due = self._due(count) > self._due(self.calls)
        self.calls = count
        if due:
            self.collect()
        return due

    def _due(self, calls: int) -> int:
        return max(calls - self.burn_in, 0) // self.thinning

    def collect(self) -> None:
        """Keep the present weights now, whatever burn_in and thinning say; max_samples and policy hold."""
        sample = self._snapshot()
        if len(self):
            self._check_shapes(self._store.shapes, "the samples so far")
        self.seen += 1
        drop: int | None = None
        if self.max_samples is not None and len(self) >= self.max_samples:
            drop = 0
            if self.policy == "reservoir":
                # A generator from (seed, seen) has no state of its own, so a resumed run makes the same
                # choices.
                drop = random.Random(f"{self.seed}/{self.seen}").randrange(self.seen)
                if drop >= self.max_samples:
                    self._store.note({"calls": self.calls, "seen": self.seen})
                    return
        self._store.add(sample, drop, {"calls": self.calls, "seen": self.seen})

    def _snapshot(self) -> dict[str, Tensor]:
        saved = self._model.state_dict()
        sample = {name: value.detach() for name, value in self._model.named_parameters()}
        # state_dict leaves out the buffers that were registered as not persistent: they are no part of the
        # weights.
        sample.update({n: value.detach() for n, value in self._model.named_buffers() if n in saved})
        return sample

    def _check_fits(self, came: dict[str, list[int]], count: int, where: str) -> None:
        self._check_shapes(came, f"the samples in {where}")
        if self.max_samples is not None and count > self.max_samples:
            raise ValueError(
                f"PosteriorSamples: max_samples must be at least {count}, the samples in {where}; "
                f"got {self.max_samples}"
            )

    def _check_shapes(self, expected: dict[str, list[int]], whose: str) -> None:
        own = shapes(self._snapshot())
        differ = [name for name in {**expected, **own} if own.get(name) != expected.get(name)]
        if differ:
            name = differ[0]
            raise ValueError(
                f"PosteriorSamples: model must have tensors of the names and shapes of {whose}, {name!r} of "
                f"{expected.get(name)}; got {own.get(name)}"
            )

    def outputs(self, *args: Any, progress: bool = False, **kwargs: Any) -> Iterator[Any]:
        """What the model returns for these inputs, sample by sample (oldest first), in eval mode and without
        gradients.

        The model's own weights, buffers and modes stay as they are, also after an exception.
        """
        for sample in _bar(self._store, len(self), progress):
            yield self._call(self._weights(sample), args, kwargs)

    def _weights(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters, buffers = self._model.named_parameters(), self._model.named_buffers()
        weights = {name: sample.get(name, own).to(own.device) for name, own in parameters}
        # Copies, and of all of them: a forward that writes a buffer must reach neither the stored one nor the
        # model's.
        weights.update({name: sample.get(name, own).to(own.device, copy=True) for name, own in buffers})
        return weights

    def _call(self, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            self._model.eval()
            with torch.no_grad():
                return torch.func.functional_call(self._model, weights, args, kwargs)
        finally:
            for module, mode in modes:
                module.training = mode

    def predict(
        self,
        x: Tensor | tuple[Any, ...],
        activation: Activation = "softmax",
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Prediction:
        """The prediction averaged over all samples.

        Args:
            x: the model's input [B, ...], or a tuple of its positional inputs.
            activation: "softmax" over the last dimension, for logits; "sigmoid", for independent binary
                outputs, each with entropies of its own; a callable from outputs to probabilities over the
                last dimension; None for regression: mean and variance of the output as it is.
            batch_size: rows of x at a time (of a tuple, of every tensor with as many rows as the first); None
                is all at once. A sample on disk is read once a call, whatever it is.
            progress: a tqdm bar over the samples.

        Averages are in float64 (float32 on MPS, which has none), and of "softmax" and "sigmoid" in the log
        domain.

        Raises:
            ValueError: no sample yet; unknown activation; batch_size < 1; negative probabilities from a
                callable.
            TypeError: the model's output is not a floating-point tensor.
        """
        if not len(self):
            raise ValueError(
                "PosteriorSamples.predict: there must be a sample; got none (update or collect first)"
            )
        known = activation is None or callable(activation) or activation in ("softmax", "sigmoid")
        if not known:
            raise ValueError(
                "PosteriorSamples.predict: activation must be 'softmax', 'sigmoid', None or a callable; "
                f"got {activation!r}"
            )
        batches = [x if isinstance(x, tuple) else (x,)]
        if batch_size is not None:
            batches = _split(batches[0], _whole("batch_size", batch_size, 1))
        average = Average(activation)
        for sample in _bar(self._store, len(self), progress):
            weights = self._weights(sample)
            outputs = [_checked(self._call(weights, batch, {})) for batch in batches]
            average.add(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        return average.prediction()

    def save(self, path: str | Path) -> None:
        """Write all samples and counts to one safetensors file (needs the memory of all of them at once)."""
        samples = [self._store.read(index) for index in range(len(self))]
        write_file(Path(path), samples, {"calls": self.calls, "seen": self.seen})

    def load(self, path: str | Path) -> PosteriorSamples:
        """Replace what is here by a file from `save`, and return self. The settings stay this object's."""
        samples, counts = read_file(Path(path))
        if samples:
            self._check_fits(shapes(samples[0]), len(samples), str(path))
        self._store.replace(samples, counts)
        self.calls, self.seen = counts["calls"], counts["seen"]
        return self
