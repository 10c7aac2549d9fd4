"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels import ops
from fekernels._table import PointerTable, Row
from fekernels.ops.sgld import SgldArguments
from fekernels.optim._base import TableOptimizer
from fekernels.optim._shards import local_tensor, shard_geometry

__all__ = ["SGLD"]


class SGLD(TableOptimizer):
    """Gradient descent with the noise that makes it sample: theta <- theta - h g_hat + sqrt(2 T h) xi.

    g_hat = grad + weight_decay theta + prior_precision (theta - anchor), h = ``lr``, T = ``temperature``, xi standard
    normal from ``fe.random``'s counters. The only state is the step's number: 12 bytes of traffic a float32 parameter.

    Args:
        params: as for every torch optimizer; float32, float64, bfloat16 or float16, one device a group.
        lr: step size h, a float or a one-element tensor. The stationary variance under U = k theta^2 / 2 is
            (T / k) / (1 - h k / 2): keep h k small.
        temperature: T. 1, the default, samples exp(-loss) and suits a loss that is a sum over the data; with
            a mean over N data points use 1/N.
        prior_precision: of a Gaussian prior around ``anchor``.
        anchor: None (zero), "init" (the parameters as they are now), or a list of tensors like params.
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

    def _row(self, group: dict[str, Any], row: dict[str, Any], state: dict[str, Any]) -> Row:
        return Row(**row)

    def _arguments(self, group: dict[str, Any]) -> SgldArguments:
        lr, lr_tensor = self._scalar(group, "lr")
        temperature, temperature_tensor = self._scalar(group, "temperature")
        grad_scale, found_inf = self._amp(group)
        return SgldArguments(
            lr=lr,
            lr_tensor=lr_tensor,
            temperature=temperature,
            temperature_tensor=temperature_tensor,
            weight_decay=float(group["weight_decay"]),
            prior_precision=float(group["prior_precision"]),
            maximize=bool(group["maximize"]),
            stochastic_rounding=bool(group["stochastic_rounding"]),
            seed=group["seed"],
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _step_tables(self, group: dict[str, Any], tables: list[PointerTable], backend: str) -> None:
        ops.sgld.step_tables(tables, self._arguments(group), backend)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        anchors: list[Tensor],
        streams: list[int],
        shards: list[int],
        seed: list[int],
    ) -> None:
        """Fill the lists with what has a gradient. The name and the list arguments are what torch.compile looks for."""
        self._traced_seed(group, seed)
        if len(group["streams"]) != len(group["params"]):
            self._add_streams(group)
        self._check_gradients(group)
        self._warn_of_lost_steps(group, {param.dtype for param in group["params"]})
        for i, (param, stream) in enumerate(zip(group["params"], group["streams"], strict=True)):
            if param.grad is None:
                continue
            state = self._state_of(group, param, i)
            params.append(local_tensor(param))
            grads.append(local_tensor(param.grad))
            steps.append(state["step"])
            anchor = self._anchor_of(group, i, state)
            if anchor is not None:
                anchors.append(anchor)
            streams.append(stream)
            numel = param.numel()
            shards.extend(shard_geometry(self._name, param) or (0, max(numel, 1), max(numel, 1)))

    def _step_lists(self, group: dict[str, Any]) -> None:
        """The step as one call of the list operator: what torch.compile traces, and what runs the reference."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        steps: list[Tensor] = []
        anchors: list[Tensor] = []
        streams: list[int] = []
        shards: list[int] = []
        seed: list[int] = []
        self._init_group(group, params, grads, steps, anchors, streams, shards, seed)
        args = self._arguments(group)
        self._operator(torch.ops.fekernels.sgld_, ops.sgld.step_lists)(
            params, grads, steps, anchors, streams, shards, args.lr, args.lr_tensor, args.temperature,
            args.temperature_tensor, args.weight_decay, args.prior_precision, args.maximize, args.stochastic_rounding,
            seed[0] if seed else args.seed, args.grad_scale, args.found_inf, group["backend"],
        )  # fmt: skip
