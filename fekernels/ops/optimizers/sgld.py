"""``sgld_``: one step of stochastic gradient Langevin dynamics over lists of tensors, rows, or a pointer table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fekernels.ops.optimizers.step import StepOperation, StepSettings

__all__ = ["OPERATION", "SgldSettings"]


@dataclass(eq=False, repr=False)
class SgldSettings(StepSettings):
    """What one step of a parameter group needs besides its tensors; the names are those of ``fe.SGLD``."""

    lr: float
    lr_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    weight_decay: float
    prior_precision: float
    maximize: bool
    stochastic_rounding: bool
    seed: int
    grad_scale: Tensor | None
    found_inf: Tensor | None


OPERATION = StepOperation("sgld_", SgldSettings, ("param", "grad", "step", "anchor"))
