"""Platt's scale and shift for logits that are known up to a distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fekernels.models.relevance_score import Calibration

__all__ = ["fitted"]


def fitted(owner: str, logits: Tensor, weights: Tensor, relevant: Tensor) -> Calibration:
    """The scale > 0 and shift under which E[sigmoid(scale l + shift)] has the highest likelihood of the answers.

    Args:
        logits: [K, B], samples or nodes of every pair's logit. weights: [K], sum 1. relevant: bool [B].

    Raises:
        ValueError: no relevant pair, or none that is not.
    """
    positives = int(relevant.sum())
    negatives = len(relevant) - positives
    if not positives or not negatives:
        raise ValueError(
            f"{owner}: relevant must hold pairs of both kinds; got {positives} relevant and {negatives} that are not"
        )
    # Platt's targets: as if one more pair of the other kind had been seen, or separable pairs would have no optimum.
    high, low = (positives + 1) / (positives + 2), 1 / (negatives + 2)
    target = torch.where(relevant, high, low).double()
    logits, log_weights = logits.detach().double(), weights.detach().double().log()[:, None]
    # A logit of the base rate is the start, so that the first step is no leap.
    free = torch.tensor([0.0, 0.0], dtype=torch.float64, device=logits.device, requires_grad=True)
    search = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        search.zero_grad()
        with torch.enable_grad():
            x = free[0].exp() * logits + free[1]
            yes = torch.logsumexp(logsigmoid(x) + log_weights, 0)
            no = torch.logsumexp(logsigmoid(-x) + log_weights, 0)
            value = -(target * yes + (1 - target) * no).mean()
            value.backward()
        return value

    search.step(cost)
    scale, shift = free.detach().tolist()
    return Calibration(float(torch.tensor(scale).exp()), shift)
