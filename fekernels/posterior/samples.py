"""What thinned snapshots of a network's weights predict together, and how far they can be believed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fekernels._checks import device as as_device
from fekernels._checks import integer
from fekernels._loader_batches import check_batches
from fekernels.posterior.collection import WeightCollection
from fekernels.posterior.model_average import Activation, Average, Prediction
from fekernels.posterior.model_calls import Pick, as_inputs, call, check_pick, pick, split
from fekernels.posterior.progress import bar_over
from fekernels.posterior.running_statistics import measure, tracking_norms
from fekernels.posterior.weights import weights_of

if TYPE_CHECKING:
    from fekernels.posterior.convergence import SampleDiagnostics

__all__ = ["PosteriorSamples", "Prediction"]


class PosteriorSamples(WeightCollection):
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
        UserWarning: at the first sample, torchrun started several processes, there is no process group by then, and
            they share a ``directory``.
    """

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

        Warns:
            UserWarning: two chains got the same noise (``together`` of the result).
        """
        from fekernels.posterior.convergence import LEAST, diagnose

        if len(self) < LEAST * max(self.chains, 1):
            raise ValueError(
                f"PosteriorSamples.diagnostics: samples must hold {LEAST} draws of each of {self.chains} chains; "
                f"got {len(self)} in all"
            )
        if self.chains > 1 and self.policy == "reservoir":
            raise ValueError(
                "PosteriorSamples.diagnostics: policy must be 'fifo' to tell several chains apart; got 'reservoir'"
            )
        found = diagnose(self._in_turn(), self._parameters(), self.chains)
        if found.together is not None:
            warnings.warn(f"PosteriorSamples.diagnostics: {found.together}", stacklevel=2)
        return found

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
                the wrong one. Naming the dimension (dim=1, dim=3) is the answer. Once, with the number: samples have
                weights that are not finite; they are worth fewer than 50 independent ones; the optimizer given at
                construction has a `gradient_noise_ratio` above 0.1.
        """
        if not len(self):
            raise ValueError(
                "PosteriorSamples.predict: samples must hold at least one; got none (update or collect first)"
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
