"""``variational_draw_``: weights drawn from their mean-field Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fekernels._checks import number
from fekernels.ops.optimizers.step import StepOperation, StepSettings

__all__ = ["OPERATION", "VariationalDrawSettings"]


@dataclass(eq=False, repr=False)
class VariationalDrawSettings(StepSettings):
    """What a draw of a parameter group needs besides its tensors; the names are those of ``fe.VariationalAdam``.

    Attributes:
        temperature: scales the variance; at 0 the draw is the mean.
        ess: number of data points that the loss is the mean of.
        deviations: 1 where ``spreads`` are standard deviations, 0 where they are the loss's curvature h, of which the
            standard deviation is sqrt(temperature / (ess (h + weight_decay))).
    """

    temperature: float
    temperature_tensor: Tensor | None
    weight_decay: float
    ess: float
    deviations: float
    seed: int

    lr: ClassVar[float] = 1.0  # type: ignore[misc]  # no draw depends on it, or on those below
    lr_tensor: ClassVar[None] = None  # type: ignore[misc]
    prior_precision: ClassVar[float] = 0.0  # type: ignore[misc]
    stochastic_rounding: ClassVar[bool] = False  # type: ignore[misc]
    grad_scale: ClassVar[None] = None  # type: ignore[misc]
    found_inf: ClassVar[None] = None  # type: ignore[misc]

    NUMBERS: ClassVar[tuple[str, ...]] = ("ess", "deviations")

    def check(self, function: str, lists: dict[str, Any]) -> None:
        number(function, "ess", self.ess, above=0.0)


# Each row's step counts the draws: the number of this one, after it, is the counter of its noise.
OPERATION = StepOperation(
    "variational_draw_",
    VariationalDrawSettings,
    ("param", "exp_avg", "exp_avg_sq", "step"),
    {"exp_avg": "mean", "exp_avg_sq": "spread", "step": "draw"},
    only_read=("exp_avg_sq",),
)
