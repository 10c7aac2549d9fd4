"""What a posterior run says about itself: whether its samples can be believed, why not, and how they came about."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PosteriorReport"]


@dataclass(frozen=True)
class PosteriorReport:
    """Of `fe.sample_posterior`; ``str`` is its text and ``plot`` its picture.

    R-hat and effective sizes are of the chains' whole course after the burn-in, which holds more positions than the
    samples that were kept, of up to 1,024 weights evenly spread over all.

    Attributes:
        converged: whether nothing that was measured speaks against the samples: rhat_max < 1.02, ess_min of 100 for
            each chain or more, and a variance at most 1.15 times too large, of weights and of predictions; a
            temperature that is measured to be no further off than that; r at most .2 but for a hundredth of the
            weights, and none that stands still; data that are the same in every pass; and a loss that is the mean over
            its points, of which the loader holds as many as data_size says, or sequences of so many (but for a last
            batch that it drops), and weights of 16 bits no further apart than a step. Modes that no chain found are not
            measured.
        rhat_max: the largest split R-hat of a weight.
        ess_min: the smallest effective sample size of a weight, the bulk's or the tail's.
        rhat_loss: the split R-hat of the loss. Weights of a network that has symmetries (units that may change places)
            may never agree between chains; what they predict may.
        noise_ratio: the mean of r over the weights that the data inform: what the gradient's noise adds to the
            variance, in units of what the temperature asks for.
        variance_inflation: the median over those weights of the variance sampled over the posterior's, by what r and
            the finite step add; 1 is exact.
        predictive_inflation: that of predictions, on average over the data: 1 + r and what the finite step adds. Where
            weights are correlated it is more than that of single weights, which vary along flat directions.
        settings: how the chains moved.
        warnings: what was noticed, in sentences.
        trace: [chains, positions, weights], the course; float32 on the CPU.
        losses: [chains, samples], the mean loss of the samples kept.
        names: of the weights of ``trace``.
        temperature: of all weights of the chains over the posterior's, measured by the gradients that moved them
            (E[(theta - c) dU/dtheta], the virial theorem): 1 is exact, whatever the posterior's shape is. It knows of
            steps too large for where the chains went, and of noise that a random loss makes, of which
            ``predictive_inflation``, computed from curvatures, does not.
        temperature_error: its standard error.
        ess_samples: as ess_min, of the samples that were kept alone.
    """

    converged: bool
    rhat_max: float
    ess_min: float
    rhat_loss: float
    noise_ratio: float
    variance_inflation: float
    predictive_inflation: float
    settings: dict[str, Any]
    warnings: tuple[str, ...]
    trace: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    temperature: float = math.nan
    temperature_error: float = math.nan
    ess_samples: float = math.nan

    def __str__(self) -> str:
        verdict = (
            "Nothing measured speaks against these samples." if self.converged else "NOT to be believed yet."
        )
        lines = [
            verdict,
            f"R-hat up to {self.rhat_max:.3f} (of the loss {self.rhat_loss:.3f}), effective sample size from "
            f"{self.ess_min:.0f} (of the samples kept {self.ess_samples:.0f})",
            f"temperature as measured {self.temperature:.2f} (+- {self.temperature_error:.2f}) times the posterior's; "
            f"as computed from curvature and gradient noise (r = {self.noise_ratio:.3f}), variance "
            f"{self.predictive_inflation:.2f} times in predictions, {self.variance_inflation:.2f} times in weights",
            ", ".join(f"{name} {_short(value)}" for name, value in self.settings.items()),
            *(f"* {warning}" for warning in self.warnings),
        ]
        return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)

    def plot(self) -> Figure:
        """The course and the marginal densities of the weights with the largest R-hat, and the loss, chain by chain."""
        from fekernels.plots import posterior_run

        return posterior_run(self.trace, self.losses, self.names)


def _short(value: Any) -> str:
    return (
        f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
