"""Averages of a model's outputs over weight samples: `Prediction` and the sums it is made from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fekernels._checks import floating, integer

Activation = Literal["softmax", "sigmoid"] | Callable[[Tensor], Tensor] | None


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a set of weight samples predicts; float64, on the device of the model.

    Batch B; C is the dimension of the classes in the model's output, wherever `dim` says it is; the other dimensions
    stay where they are.

    Attributes:
        mean: [B, C] mean over the samples of the probabilities (activation=None: of the output itself).
        variance: [B, C] variance over the samples, divided by their number: that of the mixture whose mean is
            `mean`, and 0 for one sample. For a regression it is the epistemic part; observation noise comes
            on top.
        count: how many samples.
        log_mean: [B, C] log of `mean`, right also where `mean` underflows. None for activation=None, as all
            that follow.
        predictive_entropy: [B] entropy of `mean` in nats, the whole uncertainty; [B, C] for "sigmoid".
        expected_entropy: the same shape, the mean of the samples' own entropies: what more data would not
            remove.
    """

    mean: Tensor
    variance: Tensor
    count: int
    log_mean: Tensor | None = None
    predictive_entropy: Tensor | None = None
    expected_entropy: Tensor | None = None

    @property
    def std(self) -> Tensor:
        """[B, C] square root of `variance`."""
        return self.variance.sqrt()

    @property
    def mutual_information(self) -> Tensor | None:
        """Predictive less expected entropy, >= 0: the disagreement of the samples (BALD, arXiv:1112.5745)."""
        if self.predictive_entropy is None or self.expected_entropy is None:
            return None
        return (self.predictive_entropy - self.expected_entropy).clamp_min(0.0)


class Average:
    """Running sums over samples, one output at a time, so that memory does not grow with their number."""

    def __init__(self, owner: str, activation: Activation, dim: int) -> None:
        expected = f"{owner}: activation must be 'softmax', 'sigmoid', None or a callable; got"
        if isinstance(activation, str):
            if activation not in ("softmax", "sigmoid"):
                raise ValueError(f"{expected} {activation!r}")
        elif activation is not None and not callable(activation):
            raise TypeError(f"{expected} {type(activation).__name__}")
        self._owner = owner
        self._activation = activation
        self._dim = integer(owner, "dim", dim)
        self._count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None
        self._entropy: Tensor | None = None
        self._log_sums: list[Tensor] = []

    def add(self, output: Tensor) -> None:
        values = output.to(torch.float32 if output.device.type == "mps" else torch.float64)
        logs: list[Tensor] = []
        value, entropy = values, None
        if self._activation == "softmax":
            self._check_classes(values, "the model's output")
            logs = [F.log_softmax(values, self._dim)]
            value = logs[0].exp()
            entropy = torch.special.entr(value).sum(self._dim)
        elif self._activation == "sigmoid":
            # The log of 1 - p is kept beside the log of p: 1 - exp(log p) would be 0 from p = 1 - 1e-16 on.
            logs = [F.logsigmoid(values), F.logsigmoid(-values)]
            value = logs[0].exp()
            entropy = torch.special.entr(value) + torch.special.entr(logs[1].exp())
        elif callable(self._activation):
            what = "what activation returns"
            value = floating(self._owner, what, self._activation(output))
            if value.is_meta:
                raise ValueError(f"{self._owner}: {what} must hold values; got a tensor on the meta device")
            value = value.to(values.dtype)
            self._check_classes(value, what)
            self._check_probabilities(value)
            entropy = torch.special.entr(value).sum(self._dim)
        self._accumulate(value, entropy, logs)

    def _check_classes(self, value: Tensor, what: str) -> None:
        count, dim = value.ndim, self._dim
        if count < 2 or not -count < dim < count or dim == 0:
            raise ValueError(
                f"{self._owner}: dim must be a dimension of {what} behind the batch; got dim={dim} for "
                f"{what} of shape {tuple(value.shape)}. One logit per row is for activation='sigmoid'"
            )
        if value.shape[dim] == 1:
            raise ValueError(
                f"{self._owner}: {what} must have more than one class in dim; got dim={dim} of size 1 in "
                f"shape {tuple(value.shape)}, where every probability is 1. One logit per row is for "
                "activation='sigmoid'"
            )
        if count > 3 and dim == -1 and self._count == 0:
            warnings.warn(
                f"{self._owner}: {what} of shape {tuple(value.shape)} is taken to have its classes in the "
                f"last dimension; images and volumes have them in dim=1. Give dim={count - 1} if the last is meant",
                stacklevel=4,
            )

    def _check_probabilities(self, value: Tensor) -> None:
        if bool((value < 0).any()):
            raise ValueError(
                f"{self._owner}: activation must return probabilities; got a negative one "
                "(activation=None takes outputs as they are)"
            )
        # Sums of probabilities in bfloat16 are off by 2^-9 at most. NaN stays NaN.
        sums = value.sum(self._dim)
        if bool(((sums - 1).abs() > 1e-2).any()):
            raise ValueError(
                f"{self._owner}: activation must return probabilities that sum to 1 over dim={self._dim}; "
                f"got sums from {sums.min():.3g} to {sums.max():.3g} ('sigmoid' is for independent outputs)"
            )

    def _accumulate(self, value: Tensor, entropy: Tensor | None, logs: list[Tensor]) -> None:
        self._count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = value.clone(), torch.zeros_like(value)
            self._entropy, self._log_sums = entropy, logs
            return
        # Welford's update: a variance from a difference of large sums would lose its digits.
        delta = value - self._mean
        self._mean = self._mean + delta / self._count
        self._squares = self._squares + delta * (value - self._mean)
        if entropy is not None and self._entropy is not None:
            self._entropy = self._entropy + entropy
        self._log_sums = [
            torch.logaddexp(total, log) for total, log in zip(self._log_sums, logs, strict=True)
        ]

    def prediction(self) -> Prediction:
        if self._mean is None or self._squares is None:
            raise ValueError("Average.prediction: outputs must hold at least one; got none")
        variance = self._squares / self._count
        if self._entropy is None:
            return Prediction(self._mean, variance, self._count)
        if not self._log_sums:
            mean, log_mean = self._mean, self._mean.log()
            entropy = torch.special.entr(mean).sum(self._dim)
        else:
            log_means = [total - math.log(self._count) for total in self._log_sums]
            log_mean, mean = log_means[0], log_means[0].exp()
            entropy = torch.special.entr(mean)
            entropy = (
                entropy.sum(self._dim)
                if len(log_means) == 1
                else entropy + torch.special.entr(log_means[1].exp())
            )
        return Prediction(mean, variance, self._count, log_mean, entropy, self._entropy / self._count)
