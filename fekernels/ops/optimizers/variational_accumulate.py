"""``variational_accumulate_``: sums over draws of a gradient, and of its product with the draw's normal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fekernels.ops.optimizers.step import StepOperation, StepSettings

__all__ = ["OPERATION", "VariationalAccumulateSettings"]


@dataclass(eq=False, repr=False)
class VariationalAccumulateSettings(StepSettings):
    """What the sums need besides their tensors.

    Attributes:
        samples: how many draws are in the sums already; at 0 they are overwritten.
    """

    samples: float
    seed: int
    found_inf: Tensor | None

    lr: ClassVar[float] = 1.0  # type: ignore[misc]  # no sum depends on it, or on those below
    lr_tensor: ClassVar[None] = None  # type: ignore[misc]
    temperature: ClassVar[float] = 1.0  # type: ignore[misc]
    temperature_tensor: ClassVar[None] = None  # type: ignore[misc]
    weight_decay: ClassVar[float] = 0.0  # type: ignore[misc]
    prior_precision: ClassVar[float] = 0.0  # type: ignore[misc]
    stochastic_rounding: ClassVar[bool] = False  # type: ignore[misc]
    grad_scale: ClassVar[None] = None  # type: ignore[misc]

    NUMBERS: ClassVar[tuple[str, ...]] = ("samples",)


# noise_unit: the number of the draw that the gradient is of.
OPERATION = StepOperation(
    "variational_accumulate_",
    VariationalAccumulateSettings,
    ("param", "grad", "exp_avg", "exp_avg_sq", "step", "noise_unit"),
    {"exp_avg": "grad_sum", "exp_avg_sq": "product_sum", "noise_unit": "draw"},
    only_read=("param", "grad", "step", "noise_unit"),
)
