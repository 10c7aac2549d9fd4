"""An estimate of the local learning coefficient: the numbers, their errors, and what speaks against it."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fekernels.diagnostics.chain_statistics import unjudged_statistics
from fekernels.posterior.localized import Localized
from fekernels.posterior.pilot import flat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LearningCoefficient", "LearningCoefficientDiagnostics", "estimate_of"]

RHAT = 1.1  # of losses, of a few hundred draws with long memory; their error is told besides
DRIFT = 0.1  # of the estimate, by which the halves may differ, and
STANDARD_ERRORS = 3  # of the chains' own differences, by which they may besides
HELD_ERRORS = 2  # a covariance of few draws is known less well than a mean
MOST = 1.2  # d/2, with what noise and step may add
MOST_NOISE = 0.1  # r
ROUNDINGS = 4  # of the loss, which its spread must be more than
MOST_BIAS = 0.1  # of the estimate
BIAS_ERRORS = 2  # of the mean: a bias below is not seen


@dataclass(frozen=True)
class LearningCoefficientDiagnostics:
    """Whether an estimate of `local_learning_coefficient` can be believed; ``str`` is its text.

    Attributes:
        rhat: split R-hat of the losses over the chains.
        ess: effective sample size of the losses of all chains together.
        error: standard error of the mean, from ess: what more draws would change.
        drift: the estimate of the second half of the draws less that of the first.
        noise_ratio: r = h s2 / (2 T D), the median over the weights that moved: what the noise of minibatch gradients
            adds to a variance, in units of what the temperature asks for (docs/langevin_adam.md).
        noise_bias: what that noise adds to the estimate, in all: the sum of r / 2 over the weights. Exact for a loss
            that is quadratic, and an upper bound where the localisation is stronger than the curvature.
        step_bias: what the finite step adds to the estimate, likewise.
        localization_bias: what the localization takes from the estimate, at least: how fast the estimate falls with the
            logarithm of the localization, which is the covariance of n_beta L and localization / 2 |w - w0|^2. For
            curvature k it is c g / (2 (c + g)^2), c = n_beta k and g the localization, of the g / (2 (c + g)) that are
            missing. Directions without curvature have no part in it.
        settings: n_beta, localization, lr (epsilon) and how it was chosen, and the rest.
        warnings: what speaks against the estimate, in sentences.
    """

    rhat: float
    ess: float
    error: float
    drift: float
    noise_ratio: float
    noise_bias: float
    step_bias: float
    localization_bias: float
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"standard error {self.error:.3g}, R-hat {self.rhat:.3f}, effective sample size {self.ess:.0f}; drift "
            f"{self.drift:.3g}; of the estimate {self.noise_bias:.3g} are gradient noise (r = {self.noise_ratio:.3f}) "
            f"and {self.step_bias:.3g} the finite step",
            ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in self.settings.items()
            ),
            *(f"* {warning}" for warning in self.warnings),
        ]
        return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)


@dataclass(frozen=True)
class LearningCoefficient:
    """An estimate of the local learning coefficient.

    Attributes:
        mean: over the chains. NaN where a chain diverged.
        std: over the chains, with n - 1; NaN for one chain.
        per_chain: [chains], float64.
        trace: [chains, draws], the loss at each draw, float64 on the CPU: of the draw's batch, less that batch's at the
            model's weights, plus init_loss.
        init_loss: at the model's weights, of the whole loader.
        diagnostics: whether to believe it. ``diagnostics.warnings`` are empty where nothing speaks against it.
    """

    mean: float
    std: float
    per_chain: Tensor
    trace: Tensor = field(repr=False)
    init_loss: float
    diagnostics: LearningCoefficientDiagnostics = field(repr=False)

    def __str__(self) -> str:
        error, bias = self.diagnostics.error, self.diagnostics.step_bias
        return (
            f"local learning coefficient {self.mean:.4g} +- {error:.2g}, of which the finite step makes up to "
            f"{bias:.3g}: {self.mean - bias:.4g} without it; std {self.std:.2g} over chains\n{self.diagnostics}"
        )

    def plot(self) -> Figure:
        """Each chain's losses with that of the model's weights, and its estimate from the draws so far."""
        from fekernels.plots import learning_coefficient

        return learning_coefficient(
            self.trace, self.init_loss, self.diagnostics.settings["n_beta"], self.mean
        )


def estimate_of(
    walk: Localized,
    rises: Tensor,
    held: Tensor,
    h: float,
    length: float,
    noise: list[Tensor],
    settings: dict[str, Any],
    notes: list[str],
) -> LearningCoefficient:
    """Of the draws' losses above that of the start, times n_beta, [chains, draws]."""
    chains, draws = rises.shape
    per_chain = rises.mean(1)
    mean, std = float(per_chain.mean()), float(per_chain.std()) if chains > 1 else math.nan
    if float(rises.max()) == float(rises.min()):
        rhat, ess, error = 1.0, float(rises.numel()), 0.0
    else:
        statistics = unjudged_statistics(rises)
        rhat, ess = float(statistics.rhat), float(statistics.bulk)
        error = float(rises.std()) / math.sqrt(ess) if ess > 0 else math.nan
    differences = rises[:, -(draws // 2) :].mean(1) - rises[:, : draws // 2].mean(1)
    ratios = (flat(noise) / flat(walk.denominators()))[:, walk.moving] * (h / (2 * walk.temperature))
    noise_bias = float(ratios.double().sum(1).mean()) / 2
    # E[(w - w0) . dU] = T d + h/2 E[g^2 / D] of every stationary chain (from its second moment), and (w - w0) . dU is
    # twice U where U is quadratic: what U has above T d / 2 is h/4 E[g^2 / D], of noise and finite step together.
    step_bias = max(0.0, h / (4 * walk.temperature) * length - noise_bias)
    late = draws if settings["burn_in"] else draws // 2  # on the way out both grow
    taken, taken_error = _taken(rises[:, -late:], held[:, -late:])
    found = LearningCoefficientDiagnostics(
        rhat, ess, error, float(differences.mean()), float(ratios.median()), noise_bias, step_bias, taken, settings, ()
    )  # fmt: skip
    told = (*notes, *_doubts(found, per_chain, mean, differences, rises, walk, taken_error))
    diagnostics = LearningCoefficientDiagnostics(**{**vars(found), "warnings": told})
    trace = rises / settings["n_beta"] + walk.initial
    return LearningCoefficient(mean, std, per_chain, trace, walk.initial, diagnostics)


def _taken(rises: Tensor, held: Tensor) -> tuple[float, float]:
    """localization_bias and its standard error."""
    product = (rises - rises.mean()) * (held - held.mean())
    if (
        product.shape[1] < 4
        or not bool(product.isfinite().all())
        or float(product.max()) == float(product.min())
    ):
        return 0.0, 0.0
    size = float(unjudged_statistics(product).bulk)
    return float(product.mean()), float(product.std()) / math.sqrt(size) if size > 0 else math.inf


def _doubts(
    found: LearningCoefficientDiagnostics,
    per_chain: Tensor,
    mean: float,
    differences: Tensor,
    rises: Tensor,
    walk: Localized,
    taken_error: float,
) -> list[str]:
    """What speaks against the estimate, with the numbers."""
    told = []
    if not walk.data.fits:
        told.append(
            f"the loader holds {walk.data.points:,} points, data_size says {walk.data.data_size:,}: which the estimate "
            "is of"
        )
    finite = rises.isfinite()
    if not bool(finite.all()):
        lost = [k for k, each in enumerate(finite.all(1).tolist()) if not each]
        first = int(finite.all(0).int().argmin())
        return [
            *told,
            f"chains {lost} diverged (first at draw {first}): there is no estimate; take a smaller lr than "
            f"{found.settings['lr']:.3g}, or a larger localization",
        ]
    if float(per_chain.min()) < 0:
        told.append(
            f"negative estimates, down to {float(per_chain.min()):.3g}: chains found a lower loss than the model's, "
            "which is not at a minimum of this loss. Train it further, or take a larger localization"
        )
    most = walk.weights / 2
    if mean > MOST * most + STANDARD_ERRORS * found.error:
        told.append(
            f"the estimate is above d/2 = {most:g}, the most that a minimum can have: chains left the well, or the "
            "step or the noise is too large"
        )
    loss = rises.double().std() / found.settings["n_beta"]
    if float(loss) < ROUNDINGS * torch.finfo(walk.parameters[0].dtype).eps * abs(walk.initial):
        told.append(
            f"the losses of the draws differ by their rounding alone ({float(loss):.1e} of {walk.initial:.3g}): take a "
            "larger lr, or float64"
        )
    if found.rhat > RHAT:
        told.append(f"chains disagree: R-hat is {found.rhat:.2f}, to be below {RHAT}. Draw more, or burn in")
    limit = (
        STANDARD_ERRORS * float(differences.std()) / math.sqrt(len(differences))
        if len(differences) > 1
        else 0
    )
    if abs(found.drift) > max(DRIFT * abs(mean), limit):
        told.append(
            f"the loss still drifts: the second half of the draws gives {found.drift:+.3g} over the first. Take a "
            "longer burn_in and more draws"
        )
    if found.noise_ratio > MOST_NOISE or found.noise_bias > MOST_BIAS * abs(mean):
        told.append(
            f"minibatch noise (r = {found.noise_ratio:.2f}) makes up to {found.noise_bias:.3g} of the estimate: take a "
            "smaller lr or larger batches"
        )
    if found.localization_bias > MOST_BIAS * abs(mean) + HELD_ERRORS * taken_error:
        told.append(
            f"the localization ({found.settings['localization']:.3g}) holds weights that the loss holds too: the "
            f"estimate is too small by {found.localization_bias:.2g} or more. Take a smaller localization"
        )
    if found.step_bias > MOST_BIAS * abs(mean):
        told.append(
            f"the step is coarse, and makes up to {found.step_bias:.3g} of the estimate: take a smaller lr"
        )
    elif found.step_bias > BIAS_ERRORS * found.error > 0:
        told.append(
            f"the finite step makes up to {found.step_bias:.3g} of the estimate, {found.step_bias / found.error:.1f} "
            f"of its standard errors ({found.error:.2g}): it is {mean - found.step_bias:.4g} without; take a smaller "
            f"lr than {found.settings['lr']:.3g}"
        )
    return told
