"""Second moments with and without their bias correction, for a preconditioner that is frozen or let go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fekernels._runtime.parts import local_tensor

__all__ = ["exceeds_float16", "memory_weight", "scale"]


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
    wide = torch.promote_types(local.dtype, torch.float32)
    factor = factor.to(local.device, wide)
    if wide == local.dtype:
        local.mul_(factor)
    else:
        local.copy_(local.to(wide).mul_(factor))


def exceeds_float16(moment: Tensor, factor: Tensor) -> bool:
    """Whether ``scale`` would make an infinity; a GPU's float16 moment is read for it, and no other."""
    local = local_tensor(moment)
    if local.dtype != torch.float16 or not local.numel():
        return False
    return bool(local.max().double() * factor.to(local.device) > torch.finfo(torch.float16).max)
