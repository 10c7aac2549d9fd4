"""D of LangevinAdam's last step, from its group and state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["noise_and_denominator", "number_of"]


def number_of(group: dict[str, Any], name: str, device: torch.device) -> Tensor:
    """A group value as a float64 tensor: one on a GPU is not read by the host."""
    return torch.as_tensor(group[name], dtype=torch.float64).reshape(()).to(device)


def noise_and_denominator(
    group: dict[str, Any], state: dict[str, Tensor], every: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor]:
    """The mean square of the gradient, and D; ``every`` gives the elements of a state that are looked at."""
    second = every("exp_avg_sq")
    device = second.device
    correction = torch.ones((), device=device)
    if group["bias_correction"] and not group["frozen"]:
        beta2 = torch.as_tensor(group["betas"][1], dtype=torch.float64).reshape(()).to(device)
        correction = 1 - beta2 ** state["step"].to(device)
    largest = every("max_exp_avg_sq") if group["amsgrad"] else second
    root = (largest / correction).sqrt() + number_of(group, "eps", device)
    bound = number_of(group, "lr", device) * number_of(group, "prior_precision", device)
    return second / correction, torch.maximum(root, bound)
