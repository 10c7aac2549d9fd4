"""Whether what chains have drawn can be believed, and why not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fekernels.diagnostics.chain_statistics import unjudged_statistics
from fekernels.diagnostics.common_noise import moving_together
from fekernels.posterior.chain_sampler import BETA1, ChainSampler, Plan
from fekernels.posterior.measured_temperature import MeasuredTemperature
from fekernels.posterior.plan import INFORMED, MOST_NOISE, WORST_NOISE
from fekernels.posterior.report import PosteriorReport

__all__ = ["INFLATION", "NEEDED", "RHAT", "Drawn", "verdict"]

NEEDED = 100  # effective draws of each chain, and
RHAT = 1.02  # the largest R-hat, of what is believed (Vehtari et al. 2021: 1.01, of four chains of 1,000)
INFLATION = 1.15  # of the variance, and of the temperature that chains are measured to have
TEMPERATURE_ERROR = 0.25  # up to which that is known


@dataclass(frozen=True)
class Drawn:
    """What a walk brought.

    Attributes:
        kept: the states of this rank's chains, sample by sample.
        losses: [chains, samples], theirs. size: the smallest effective sample size of a weight, of these alone.
        trace: [chains, positions, weights], the course.
        temperature: of the course.
        time: autocorrelation time, burnt: steps of the burn-in, apart: steps between samples.
    """

    kept: list[list[dict[str, Tensor]]]
    losses: Tensor
    size: float
    trace: Tensor
    temperature: MeasuredTemperature
    time: float
    burnt: int
    apart: int


def verdict(
    walk: ChainSampler,
    plan: Plan,
    fisher: list[Tensor],
    drawn: Drawn,
    settings: dict[str, Any],
    notes: list[str],
    as_said: bool,
) -> PosteriorReport:
    """``as_said``: whether loss, data and weights are what the arguments say."""
    course, losses, temperature = drawn.trace, drawn.losses, drawn.temperature
    infinite = [k for k in range(walk.n) if not bool(course[k].isfinite().all())]
    finite = not infinite and temperature.value != math.inf
    found = unjudged_statistics(course)
    rhat = float(found.rhat.nan_to_num(0.0).max()) if finite else math.inf
    size = float(found.size.min()) if finite else 0.0
    of_loss = float(unjudged_statistics(losses).rhat.nan_to_num(math.inf))
    weights, predictions = _inflation(walk, plan, fisher, course) if finite else (math.inf, math.inf)
    if not finite:
        where = f"chain {', '.join(map(str, infinite))}" if infinite else "a chain"
        notes.append(f"{where} became infinite at lr = {plan.lr:.3g}: take a smaller one")
    if rhat >= RHAT:
        agree = ", though their losses agree" if of_loss < RHAT else ""
        notes.append(
            f"chains disagree{agree}: R-hat is {_up(rhat)}, to be below {RHAT}. They are in different modes, or the "
            "run was too short for its autocorrelation"
        )
    together = moving_together(course) if finite else None
    if together is not None:
        notes.append(str(together))
    if size < NEEDED * walk.n:
        notes.append(
            f"the chains are worth {min(round(size), NEEDED * walk.n - 1)} independent draws, fewer than "
            f"{NEEDED * walk.n}: sample longer"
        )
    if plan.ratio > MOST_NOISE * 1.001 or max(weights, predictions) > INFLATION:
        notes.append(
            f"the gradient's noise (r = {plan.ratio:.2f}) and the step make the variance of weights {weights:.2f} "
            f"times the posterior's, and that of predictions {predictions:.2f} times: take a smaller lr, larger "
            "batches or control variates"
        )
    hot = temperature.above(INFLATION)
    # Without a prior, directions that nothing holds have no temperature.
    cold = temperature.below(1 / INFLATION) and walk.prior > 0
    if finite and (hot or cold):
        notes.append(
            f"the chains were {temperature.value:.2f} (+- {temperature.error:.2f}) times as hot as the posterior is: "
            + (
                "the step is too large for where they went, or the gradient has noise besides that of batches, as a "
                "random loss has"
                if hot
                else "they have not spread yet, or their weights are held"
            )
        )
    unclear = not temperature.error <= TEMPERATURE_ERROR
    if finite and unclear and not hot and not cold:
        notes.append(
            f"at which temperature the chains were is not known: {temperature.value:.2f} (+- {temperature.error:.2f}) "
            f"times the posterior's, to be known to {TEMPERATURE_ERROR}: sample longer"
        )
    quiet = plan.worst <= WORST_NOISE * 1.001
    if not quiet:
        notes.append(
            f"the gradient's noise of some weights is r = {plan.worst:.2f} or more, so that their variance is "
            f"{1 + plan.worst:.2f} times the posterior's: take a smaller lr, or batches that are alike"
        )
    still = int((course.amax(1) == course.amin(1)).any(0).sum()) if finite else 0
    if still:
        notes.append(
            f"{still} of the {course.shape[2]} weights looked at never moved in a chain: their steps are lost in "
            "rounding. Take float64, or a model whose weights are not so much larger than their posterior is wide"
        )
    if not plan.frozen:
        notes.append(
            "the preconditioner adapts: the variance is right only where it averages over more than a relaxation"
        )
    as_hot = not hot and not cold and not unclear
    right = max(weights, predictions) <= INFLATION and as_hot and quiet and not still and together is None
    converged = as_said and finite and rhat < RHAT and size >= NEEDED * walk.n and right
    return PosteriorReport(
        converged, rhat, size, of_loss, plan.ratio, weights, predictions, settings, tuple(notes), course, losses,
        walk.names(), temperature.value, temperature.error,
        drawn.size,
    )  # fmt: skip


def _up(rhat: float) -> str:
    """Three digits, none of which says that it is below a limit that it is above."""
    return f"{math.ceil(rhat * 1000) / 1000:.3f}" if math.isfinite(rhat) else str(rhat)


def _inflation(walk: ChainSampler, plan: Plan, fisher: list[Tensor], course: Tensor) -> tuple[float, float]:
    """How many times too large the variance is: of weights, the median, and of predictions, the mean over the data.

    With gradients of covariance S = s H / k for every weight's s and k, the stationary covariance P is T H^-1 to first
    order in h, and N = h s / (2 D k) besides. Momentum b makes of it V = P / (1 - E / P) + N with E = h T (1 - b) /
    (2 (1 + b) D), exact for one weight and every h, which is solved for P. Correlated weights vary along flat
    directions, to which E and N add little; predictions vary along all, and their mean over the data is that of the
    diagonals.
    """
    denominator, noise, point = (
        walk.ranks.gather(walk.of_tracked(each)).double().mean(0)
        for each in (plan.denominators, plan.noise, fisher)
    )
    curvature = point + walk.prior
    of_noise = (plan.lr * noise / (2 * denominator * curvature)).where(noise > 0, 0.0)
    of_step = plan.lr * walk.temperature * (1 - BETA1) / (2 * (1 + BETA1) * denominator)
    variance = course.double().flatten(0, 1).var(0)
    quiet = variance - of_noise
    own = (quiet + (quiet.square() - 4 * variance * of_step).clamp_min(0).sqrt()) / 2
    ratio = plan.lr * noise / (2 * walk.temperature * denominator)
    # Of a step so large that nothing solves it, twice the variance; never more than r allows for what is uncorrelated.
    own = torch.maximum(own, variance / (2 + ratio))
    momentum = of_step * curvature / walk.temperature
    inflation, share = (variance / own).nan_to_num(1.0), point / curvature
    if bool((share > INFORMED).any()):  # of predictions the others have no part
        inflation, momentum = inflation[share > INFORMED], momentum[share > INFORMED]
    return float(inflation.median()), 1 + plan.ratio + float(momentum.mean())
