"""``langevin_adam_``: one step of Langevin-Adam over lists of tensors, rows, or a pointer table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fekernels._catalogue.optimizers import NOISES
from fekernels._checks import number
from fekernels.ops.optimizers.step import StepOperation, StepSettings

__all__ = ["OPERATION", "LangevinAdamSettings"]


@dataclass(eq=False, repr=False)
class LangevinAdamSettings(StepSettings):
    """What one step of a parameter group needs besides its tensors; the names are those of ``fe.LangevinAdam``."""

    lr: float
    lr_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    prior_precision: float
    noise: str
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    bias_correction: bool
    stochastic_rounding: bool
    seed: int
    grad_scale: Tensor | None
    found_inf: Tensor | None
    beta1_tensor: Tensor | None = None  # for the operator, which reads it; kernels take numbers
    beta2_tensor: Tensor | None = None
    frozen: bool = False  # exp_avg_sq and its maximum are read as they stand, and not written

    NUMBERS: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "eps", "noise")

    def check(self, function: str, lists: dict[str, Any]) -> None:
        for name in ("beta1", "beta2"):
            tensor = getattr(self, f"{name}_tensor")
            if tensor is not None:
                setattr(self, name, _beta(function, f"{name}_tensor", tensor))
        if self.noise not in NOISES:
            raise ValueError(f"{function}: noise must be one of {', '.join(NOISES)}; got {self.noise!r}")


def _beta(function: str, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"{function}: {name} must have one element; got shape {tuple(tensor.shape)}")
    return number(function, name, tensor.item(), below=1.0)


OPERATION = StepOperation(
    "langevin_adam_",
    LangevinAdamSettings,
    ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "noise_unit", "anchor"),
)
