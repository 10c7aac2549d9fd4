"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels.ops.optimizers.sgld import OPERATION
from fekernels.optim._table_optimizer import TableOptimizer

__all__ = ["SGLD"]


class SGLD(TableOptimizer):
    """Gradient descent with the noise that makes it sample: theta <- theta - h g_hat + sqrt(2 T h) xi.

    g_hat = grad + weight_decay theta + prior_precision (theta - anchor), h = ``lr``, T = ``temperature``, xi standard
    normal from ``fe.random``'s counters. The only state is the step's number: 12 bytes of traffic per float32 element.

    Args:
        params: as for every torch optimizer; float32, float64, bfloat16 or float16, one device per group.
        lr: step size h, a float or a one-element tensor. The stationary variance under U = k theta^2 / 2 is
            (T / k) / (1 - h k / 2): keep h k small.
        temperature: T. 1, the default, samples exp(-loss) and suits a loss that is a sum over the data; with
            a mean over N data points use 1/N.
        prior_precision: of a Gaussian prior around ``anchor``.
        anchor: None (zero), "init" (the parameters as they are now; in a process group of several ranks as they are at
            the first step), or a list of tensors like params.
        weight_decay: L2 penalty.
        maximize: ascend.
        stochastic_rounding: round bfloat16 parameters up or down at random, without bias: at a small lr nearly every
            step would round to nothing, and the chain stand still (a warning says so). Other dtypes are not concerned.
        fused: True offers GradScaler unscaling in the kernel, as for ``fe.LangevinAdam``; the step is the same.
        seed: 64 bits, the key of the noise; None as for ``fe.LangevinAdam``.
        backend: "reference", "cpp", "triton" or "cuda" for this optimizer; None follows ``fe.use_backend``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``fe.LangevinAdam``.

    Source: Welling & Teh 2011, equation 4 (with epsilon = 2 h and temperature T). The localised SGLD of
    local-learning-coefficient estimation (Lau et al. 2023) is h = e n beta / 2, T = 1 / (n beta),
    prior_precision = gamma / (n beta), anchor = "init".
    """

    _kind = "SGLD"
    _operation = OPERATION
    _switches = ("maximize", "stochastic_rounding")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        temperature: float | Tensor = 1.0,
        prior_precision: float = 0.0,
        anchor: str | Sequence[Tensor] | None = None,
        weight_decay: float = 0,
        maximize: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "temperature": temperature,
            "prior_precision": prior_precision,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "fused": fused,
            "backend": backend,
        }
        super().__init__(params, defaults, seed, anchor)

    def _init_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
