"""Checks of a target's values, for ``validate=True``: each costs a read of the data and, on a GPU, a wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["validate_target"]

COUNTS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")
UNIT_INTERVAL = ("bernoulli", "continuous_bernoulli")


def validate_target(
    function: str, likelihood: str, target: Tensor, params: Tensor | Sequence[Tensor]
) -> None:
    """ValueError, with the first offender, for a target (NaN too) outside the support.

    Args:
        function: Name of the public function, which begins the message.
        likelihood: Name of the likelihood; those on the whole line have nothing to check.
        target: What was observed, and nothing that was not.
        params: Parameters of the likelihood; the last dimension of ``categorical``'s is the number of classes.
    """
    if likelihood in COUNTS:
        good, expected = (
            (target >= 0) & (target == torch.floor(target)) & ~target.isinf(),
            "whole counts >= 0",
        )
    elif likelihood in UNIT_INTERVAL:
        good, expected = (target >= 0) & (target <= 1), "values in [0, 1]"
    elif likelihood == "categorical":
        classes = (params if isinstance(params, Tensor) else params[0]).shape[-1]
        good, expected = (target >= 0) & (target < classes), f"classes in [0, {classes})"
    else:
        return
    if not bool(good.all()):
        raise ValueError(
            f"{function}: target must hold {expected} for likelihood {likelihood!r}; got {target[~good][0].item()}"
        )
