"""Second moments with and without their bias correction, for a preconditioner that is frozen or let go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime.parts import local_tensor

__all__ = ["Uncorrected", "check_scaled", "memory_weight", "scale"]


class Uncorrected:
    """Which second moments stand without bias correction, whatever a group's value ``frozen`` says.

    Whoever wraps an optimizer may copy values of its own over those of a group. A moment is known by its tensor: one
    that has replaced it, as of a checkpoint, is what its group says.
    """

    def __init__(self) -> None:
        self._moments: dict[Tensor, Tensor] = {}

    def mark(self, groups: Iterable[dict[str, Any]], states: dict[Tensor, Any]) -> None:
        """By the groups' values, which are right now."""
        frozen = [param for group in groups if group["frozen"] for param in group["params"]]
        moments = {param: states.get(param, {}).get("exp_avg_sq") for param in frozen}
        self._moments = {param: moment for param, moment in moments.items() if moment is not None}

    def has(self, param: Tensor, state: dict[str, Any]) -> bool:
        return param in self._moments and state.get("exp_avg_sq") is self._moments[param]

    def check(self, name: str, group: dict[str, Any], states: dict[Tensor, Any]) -> None:
        """ValueError where a group that is not frozen has one."""
        if group["frozen"] or not self._moments:
            return
        if any(self.has(param, states[param]) for param in group["params"] if param in states):
            raise ValueError(
                f"{name}: frozen must stay True from freeze_preconditioner() on, since when exp_avg_sq stands without "
                "bias correction; got False (let go by freeze_preconditioner(False); of an optimizer that copies "
                "groups of its own over this one's, set frozen in both)"
            )


def memory_weight(group: dict[str, Any], step: Tensor) -> Tensor:
    """1 - beta2^t, by which bias correction divides v, as a float64 where ``step`` is: a GPU's is not read.

    1 at t = 0, where v is nobody's average, and without bias correction.
    """
    t = step.detach().double()
    if not group["bias_correction"]:
        return torch.ones_like(t)
    beta2 = torch.as_tensor(group["betas"][1], dtype=torch.float64, device=t.device).reshape(t.shape)
    return torch.where(t > 0, 1 - beta2**t, 1.0)


def scale(moment: Tensor, factor: Tensor) -> None:
    """Multiply in place what lives here of a second moment; what has 16 bits is rounded once, to nearest."""
    local = local_tensor(moment)
    compute_dtype = torch.promote_types(local.dtype, torch.float32)
    factor = factor.to(local.device, compute_dtype)
    if compute_dtype == local.dtype:
        local.mul_(factor)
    else:
        local.copy_(local.to(compute_dtype).mul_(factor))


def check_scaled(function: str, name: str, moment: Tensor, factor: Tensor) -> None:
    """ValueError where ``scale`` would make an infinity; a GPU's float16 moment is read for it, and no other."""
    local = local_tensor(moment)
    if local.dtype != torch.float16 or not local.numel():
        return
    if bool(local.max().double() * factor.to(local.device) > torch.finfo(torch.float16).max):
        raise ValueError(
            f"{function}: {name} must fit float16 without its bias correction 1 - betas[1]^t, by which it is divided; "
            "got an infinity (freeze after more steps, or take state_dtype=torch.float32)"
        )
