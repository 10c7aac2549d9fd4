"""What to ask of a sampler and of the predictions it makes: calibration, uncertainty, detection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fekernels._checks import integer

__all__ = ["Calibration", "auroc", "brier_score", "calibration", "mutual_information", "predictive_entropy"]


@dataclass(frozen=True)
class Calibration:
    """A reliability table: predictions in equal bins of confidence. float64, on the CPU; M bins.

    Attributes:
        error: expected calibration error, sum over the bins of count/n * |accuracy - confidence|.
        maximum_error: the largest |accuracy - confidence| of a bin that is not empty.
        edges: [M + 1] borders of the bins; bin m holds confidences in (edges[m], edges[m + 1]].
        confidence: [M] its mean in each bin; NaN where the bin is empty.
        accuracy: [M] share of right answers in each bin; NaN likewise.
        count: [M] predictions in each bin, int64.
    """

    error: float
    maximum_error: float
    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def _floats(owner: str, name: str, value: Any, least_dims: int) -> Tensor:
    tensor = torch.as_tensor(value).detach().cpu()
    if not tensor.is_floating_point():
        raise TypeError(f"{owner}: {name} must be floating point; got {tensor.dtype}")
    if tensor.ndim < least_dims:
        raise ValueError(f"{owner}: {name} must have at least {least_dims} dimensions; got {tensor.ndim}")
    return tensor.double()


def _check_distributions(owner: str, p: Tensor) -> None:
    """Of probabilities [..., C] in float64. NaN is let through, which no comparison here is true of."""
    if bool(((p < 0) | (p > 1 + 1e-6)).any()):
        numbers = p[~p.isnan()]
        raise ValueError(
            f"{owner}: probabilities must be in [0, 1]; got {float(numbers.min())} to {float(numbers.max())}"
        )
    # As predict checks them: sums of probabilities in bfloat16 are off by 2^-9 at most.
    sums = p.sum(-1).flatten()
    off = (sums - 1).abs() > 1e-2
    if bool(off.any()):
        worst = int((sums - 1).abs().nan_to_num(0.0).argmax())
        raise ValueError(
            f"{owner}: probabilities must sum to 1 in every row; got a sum of {float(sums[worst]):.3g} in row {worst} "
            "(independent sigmoids are no distribution over classes)"
        )


def _checked(owner: str, probabilities: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Probabilities [n, C] in float64 and labels [n] in int64."""
    p = _floats(owner, "probabilities", probabilities, 2)
    target = torch.as_tensor(labels).detach().cpu()
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"{owner}: labels must be integers; got {target.dtype}")
    if p.ndim != 2 or not p.numel():
        raise ValueError(f"{owner}: probabilities must have shape (n, C), n >= 1; got {tuple(p.shape)}")
    if target.shape != p.shape[:1]:
        raise ValueError(f"{owner}: labels must have shape ({len(p)},); got {tuple(target.shape)}")
    if int(target.min()) < 0 or int(target.max()) >= p.shape[1]:
        raise ValueError(
            f"{owner}: labels must be in [0, {p.shape[1]}); got {int(target.min())} to {int(target.max())}"
        )
    if bool(p.isnan().any()):
        raise ValueError(f"{owner}: probabilities must be in [0, 1]; got nan")
    _check_distributions(owner, p)
    return p, target.long()


def calibration(probabilities: Any, labels: Any, bins: int = 15) -> Calibration:
    """Expected calibration error and reliability bins (Guo et al. 2017, arXiv:1706.04599).

    The estimate is biased upwards by about the noise of a bin's accuracy: even a perfectly calibrated
    predictor shows 0.01 or so on 1000 points. Compare predictors on the same points and bins only.

    Args:
        probabilities: [n, C] class probabilities, a tensor or an array.
        labels: [n] integer classes.
        bins: M, equally wide on [0, 1]. 15 is the usual choice.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes that do not fit, no point at all, labels outside [0, C),
            probabilities outside [0, 1], a row that does not sum to 1.
    """
    p, target = _checked("calibration", probabilities, labels)
    bins = integer("calibration", "bins", bins, 1)
    confidence, predicted = p.max(dim=1)
    right = (predicted == target).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    which = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    count = torch.bincount(which, minlength=bins)
    mean_confidence = torch.bincount(which, confidence, bins) / count
    accuracy = torch.bincount(which, right, bins) / count
    gap = torch.where(count > 0, (accuracy - mean_confidence).abs(), 0.0)
    error = float((gap * count).sum() / len(p))
    return Calibration(error, float(gap.max()), edges, mean_confidence, accuracy, count)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def predictive_entropy(probabilities: Any) -> Tensor:
    """Entropy in nats over the last dimension, float64: [..., C] -> [...]. A probability of 0 adds 0, NaN gives NaN.

    Raises:
        TypeError, ValueError: not floating point, no dimension, probabilities outside [0, 1] (logits, say), a row that
            does not sum to 1.
    """
    p = _floats("predictive_entropy", "probabilities", probabilities, 1)
    _check_distributions("predictive_entropy", p)
    return _entropy(p)


def brier_score(probabilities: Any, labels: Any) -> float:
    """Mean squared distance of class probabilities from the truth (Brier 1950): 0 is certain and right, 2 is wrong.

    A proper score: it rewards accuracy and calibration together. For two classes it is twice the one-column form.

    Args:
        probabilities: [n, C]. labels: [n] integer classes.

    Raises:
        TypeError, ValueError: as :func:`calibration`.
    """
    p, target = _checked("brier_score", probabilities, labels)
    return float((p - torch.nn.functional.one_hot(target, p.shape[1])).square().sum(1).mean())


def mutual_information(probabilities: Any) -> Tensor:
    """How far predictors disagree: [S, ..., C] -> [...], float64, in nats, >= 0.

    The entropy of the mean over the first dimension less the mean of the entropies (Houlsby et al. 2011,
    arXiv:1112.5745). S predictors share at most log S. NaN where a probability is.

    Raises:
        TypeError, ValueError: as :func:`predictive_entropy`; fewer than two dimensions, no predictor.
    """
    p = _floats("mutual_information", "probabilities", probabilities, 2)
    if not len(p):
        raise ValueError(
            f"mutual_information: probabilities must hold a predictor; got shape {tuple(p.shape)}"
        )
    _check_distributions("mutual_information", p)
    return (_entropy(p.mean(0)) - _entropy(p).mean(0)).clamp_min(0.0)


def auroc(negative: Any, positive: Any) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    Args:
        negative, positive: scores of the two classes, of any shape; say, the entropies on clean and on
            shifted inputs. 0.5 is no detection at all.

    Raises:
        TypeError: scores that are not floating point. ValueError: an empty class, or NaN.
    """
    low = _floats("auroc", "negative", negative, 0).flatten()
    high = _floats("auroc", "positive", positive, 0).flatten()
    for name, scores in (("negative", low), ("positive", high)):
        if not len(scores) or bool(scores.isnan().any()):
            raise ValueError(f"auroc: {name} must hold scores that are not NaN; got {len(scores)} scores")
    low = low.sort().values
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean() / (2 * len(low)))
