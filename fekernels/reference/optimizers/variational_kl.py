"""The KL of a mean-field Gaussian to the prior in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["variational_kl"]


def variational_kl(
    mean: Tensor, spread: Tensor, ess: float, weight_decay: float, temperature: float, deviations: bool
) -> Tensor:
    """[KL, sum log r] in float64, r = std^2 ess weight_decay being the ratio of the variances.

    An element's KL is (ess weight_decay mean^2 + r - 1 - log r) / 2.
    """
    m, spread = mean.double(), spread.double()
    if deviations:
        excess = spread * spread * (ess * weight_decay) - 1
    else:
        excess = ((temperature - 1) * weight_decay - spread) / (spread + weight_decay)
    log_ratio = excess.log1p()
    kl = 0.5 * (ess * weight_decay * m * m + (excess - log_ratio)).sum()
    return torch.stack([kl, log_ratio.sum()])
