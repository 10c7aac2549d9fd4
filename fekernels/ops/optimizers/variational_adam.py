"""``variational_adam_``: one natural-gradient step of the weights' mean-field Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fekernels._checks import number
from fekernels.ops.optimizers.step import StepOperation, StepSettings

__all__ = ["OPERATION", "VariationalAdamSettings"]


@dataclass(eq=False, repr=False)
class VariationalAdamSettings(StepSettings):
    """What one step of a parameter group needs besides its tensors; the names are those of ``fe.VariationalAdam``.

    Attributes:
        temperature: at 0 no draw left the mean, and the curvature is not updated.
        lr_scale: of lr: hess_init + weight_decay, or 1.
        samples: 0 where ``grads`` are those of one draw. Otherwise ``grads`` and ``product_sums`` are what
            ``variational_accumulate_`` made of so many, of which each parameter is stepped as it is: ``draws`` and
            ``means`` are not looked at.
    """

    lr: float
    lr_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    weight_decay: float
    ess: float
    beta1: float
    beta2: float
    clip_radius: float
    lr_scale: float
    samples: float
    seed: int
    grad_scale: Tensor | None
    found_inf: Tensor | None

    prior_precision: ClassVar[float] = 0.0  # type: ignore[misc]
    stochastic_rounding: ClassVar[bool] = False  # type: ignore[misc]

    NUMBERS: ClassVar[tuple[str, ...]] = ("ess", "beta1", "beta2", "clip_radius", "lr_scale", "samples")

    def check(self, function: str, lists: dict[str, Any]) -> None:
        number(function, "ess", self.ess, above=0.0)
        for name in ("beta1", "beta2"):
            number(function, name, getattr(self, name), below=1.0)
        narrow = any(param.element_size() == 2 for param in lists["params"])
        for needed in ("product_sums",) if self.samples else ("draws", "means") if narrow else ("draws",):
            if not lists[needed]:
                kind = "16-bit parameters" if needed == "means" else f"samples={self.samples:g}"
                raise ValueError(
                    f"{function}: {needed} must hold one tensor per parameter with {kind}; got none"
                )


# max_exp_avg_sq: the mean, of which a 16-bit parameter is the rounding; others are the mean.
OPERATION = StepOperation(
    "variational_adam_",
    VariationalAdamSettings,
    ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "noise_unit", "anchor"),
    {"exp_avg_sq": "hessian", "max_exp_avg_sq": "mean", "noise_unit": "draw", "anchor": "product_sum"},
    only_read=("grad", "noise_unit", "anchor"),
)
