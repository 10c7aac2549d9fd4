"""At which temperature chains really were: the virial theorem, by the gradients that moved them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fekernels.diagnostics.chain_statistics import unjudged_statistics

__all__ = ["MeasuredTemperature", "measured_temperature"]

LEAST = 8  # positions of a chain
SURE, FLOWN = 1 / 3, 2.0
ERRORS, OF_ONE_CHAIN = 2.0, 4.0  # standard errors, of all chains and of the one that is furthest off


@dataclass(frozen=True)
class MeasuredTemperature:
    """Over the one asked for.

    Attributes:
        value: the mean over chains and weights, 1 where they are draws of the posterior; infinite where a chain is, and
            NaN of too few positions.
        error: its standard error.
        low, high: what it is at least and at most: by `ERRORS` of all chains or by `OF_ONE_CHAIN` of one that is
            further off.
    """

    value: float
    error: float
    low: float
    high: float

    def above(self, limit: float) -> bool:
        """Whether it is, and at least a third of that not by chance. Of chains that fly the error is as large."""
        return self.value > max(limit, FLOWN) or (self.value > limit and self.low > 1 + (limit - 1) * SURE)

    def below(self, limit: float) -> bool:
        """Whether it is, a limit below 1, and at least a third of that not by chance."""
        return self.value < limit and self.high < 1 - (1 - limit) * SURE


def measured_temperature(virials: Tensor) -> MeasuredTemperature:
    """Of [chains, positions] virials: (theta - c) dU/dtheta over T, the mean over the weights, c any constant.

    Its mean is 1 of draws from exp(-U / T), whatever U is, as an integration by parts shows; of a quadratic U it is how
    many times too large the variance is, the mean over all directions. A gradient of a minibatch does: it is right on
    average, and knows nothing of where the chain is.
    """
    if not bool(virials.isfinite().all()):
        return MeasuredTemperature(*(math.inf,) * 4)
    if virials.shape[1] < LEAST:
        return MeasuredTemperature(*(math.nan,) * 4)
    values = virials.double()
    sizes = torch.stack([unjudged_statistics(chain[None, :, None]).bulk for chain in values])[:, 0]
    means = values.mean(1)
    errors = (values.var(1) / sizes.clamp_min(1.0)).sqrt()
    value, error = float(means.mean()), float(errors.square().mean().div(len(means)).sqrt())
    low = max(value - ERRORS * error, float((means - OF_ONE_CHAIN * errors).max()))
    high = min(value + ERRORS * error, float((means + OF_ONE_CHAIN * errors).min()))
    return MeasuredTemperature(value, error, low, high)
