"""Platt's scale and shift for logits that are known up to a distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fekernels.models.relevance_score import Calibration

__all__ = ["fitted"]

BLOCK = 1 << 18  # logits at a time, in float64


def fitted(owner: str, logits: Tensor, weights: Tensor, relevant: Tensor) -> Calibration:
    """The scale > 0 and shift under which E[sigmoid(scale l + shift)] has the highest likelihood of the answers.

    And the sharpness, by the likelihood of the choice in rows with one relevant context; 1 where there is none.

    Args:
        logits: [K, Q, C], samples or nodes of every pair's logit. weights: [K], sum 1. relevant: bool [Q, C].

    Raises:
        ValueError: no relevant pair, or none that is not; logits, or a calibration of them, that are not finite.
    """
    _check_finite(owner, logits)
    positives = int(relevant.sum())
    negatives = relevant.numel() - positives
    if not positives or not negatives:
        raise ValueError(
            f"{owner}: relevant must hold pairs of both kinds; got {positives} relevant and {negatives} that are not"
        )
    # Platt's targets: as if one more pair of the other kind had been seen, or separable pairs would have no optimum.
    high, low = (positives + 1) / (positives + 2), 1 / (negatives + 2)
    target = torch.where(relevant, high, low).double()
    weights = weights.detach().double()
    log_weights = weights.log()[:, None, None]
    start = logits.new_zeros(2, dtype=torch.float64)
    rows = max(1, BLOCK // max(1, len(logits) * relevant.shape[1]))

    def of_answers(at: Tensor) -> Iterator[Tensor]:
        for these, aims in zip(logits.detach().split(rows, 1), target.split(rows), strict=True):
            x = at[0].exp() * these.double() + at[1]
            yes = torch.logsumexp(logsigmoid(x) + log_weights, 0)
            no = torch.logsumexp(logsigmoid(-x) + log_weights, 0)
            yield -(aims * yes + (1 - aims) * no).sum() / relevant.numel()

    log_scale, shift = _least(of_answers, start)
    if not (math.isfinite(shift) and abs(log_scale) < 700):
        raise ValueError(
            f"{owner}: logits must have a finite scale and shift that fit the answers; got log scale {log_scale:.3g}, "
            f"shift {shift:.3g}, of logits from {float(logits.min()):.3g} to {float(logits.max()):.3g}"
        )
    single = relevant.sum(1) == 1
    if relevant.shape[1] < 2 or not bool(single.any()):
        return Calibration(math.exp(log_scale), shift)
    means = torch.tensordot(weights.to(logits.dtype), logits.detach(), 1)[single].double()
    right = relevant[single].int().argmax(1)
    return Calibration(math.exp(log_scale), shift, _scale_of_choices(means, right) / math.exp(log_scale))


def _check_finite(owner: str, logits: Tensor) -> None:
    pairs = logits.isfinite().all(0)
    wrong = (~pairs).nonzero().tolist()
    if not wrong:
        return
    query, context = wrong[0]
    values = logits[:, query, context]
    came = float(values[~values.isfinite()][0])
    whole = [
        f"every pair of {side} {place}"
        for side, place, other in (("query", query, pairs[query]), ("context", context, pairs[:, context]))
        if not bool(other.any())
    ]
    raise ValueError(
        f"{owner}: the logits of all pairs must be finite; got {came} for query {query} and context {context}, and "
        f"{len(wrong)} such pairs of {pairs.numel()}"
        + (f", {' and '.join(whole)} among them" if whole else "")
    )


def _scale_of_choices(means: Tensor, right: Tensor) -> float:
    """The s under which softmax(s means), [N, C], has the highest likelihood of the choices ``right`` [N].

    As if one choice in N + 2 had been at random: were all of them the largest, there would be no optimum.
    """
    random = 1 / (len(right) + 2)
    aim = ((1 - random) * means.gather(1, right[:, None])[:, 0] + random * means.mean(1)).mean()
    # The likelihood is concave in s: halving finds where its derivative, which falls, is 0.
    low, high = -10.0, 10.0
    for _ in range(40):
        log_s = (low + high) / 2
        expected = (torch.softmax(math.exp(log_s) * means, 1) * means).sum(1).mean()
        low, high = (log_s, high) if bool(expected < aim) else (low, log_s)
    return math.exp((low + high) / 2)


def _least(costs: Callable[[Tensor], Iterator[Tensor]], start: Tensor) -> list[float]:
    """Where a smooth function of a few numbers, the sum of ``costs``, is least."""
    at = start.clone().requires_grad_()
    search = torch.optim.LBFGS([at], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        total = start.new_zeros(())
        with torch.enable_grad():
            for part in costs(at):  # one at a time, so that only one is in memory
                part.backward()
                total += part.detach()
        return total

    search.step(closure)
    return at.detach().tolist()
