"""Checks of values, for ``validate=True``: each costs a read of the data and, on a GPU, a wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["NOT_NEGATIVE", "validate_parameters", "validate_target"]

COUNTS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")
UNIT_INTERVAL = ("bernoulli", "continuous_bernoulli")
# likelihood -> {position: name} of the parameters that are not unbounded
NOT_NEGATIVE = {
    "student_t": {2: "degrees_of_freedom"},
    "negative_binomial": {0: "mean", 1: "inverse_dispersion"},
    "zero_inflated_negative_binomial": {0: "mean", 1: "inverse_dispersion"},
}


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


def validate_parameters(
    function: str, likelihood: str, params: Sequence[Tensor], mask: Tensor | None = None
) -> None:
    """ValueError, with the parameter's name and the first offender, for one (NaN too) outside the domain.

    Zero and infinity are in it: there the energy has a limit.

    Args:
        function: Name of the public function, which begins the message.
        likelihood: Name of the likelihood.
        params: Its parameters; they broadcast against each other.
        mask: Bool, of the shape that they broadcast to: True where one counts. None where all do.
    """
    for at, name in NOT_NEGATIVE.get(likelihood, {}).items():
        bad = ~(params[at] >= 0)
        if mask is not None:
            bad = bad & mask
        if bool(bad.any()):
            value = params[at].detach().expand(bad.shape)[bad][0].item()
            raise ValueError(
                f"{function}: params[{at}] ({name}) must be >= 0 for likelihood {likelihood!r}; got {value}"
            )
