"""The call of a kernel for the terms of a free energy, the same in plain PyTorch, and gradients of the latter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime import backends
from fekernels.ops.free_energy.broadcasting import whole
from fekernels.ops.free_energy.memory_order import arranged, memory_order, restored

__all__ = ["DATA", "KernelCall", "PlainKernelCall", "by_autograd"]

DATA = 4  # of a call, beside its differentiable operands: target, mask, weight, latent_mask


class KernelCall:
    """What a kernel takes beside the differentiable operands (parameters of the likelihood, then latent)."""

    __slots__ = ("backend", "beta", "inplace", "likelihood", "n_params", "needs", "reduction")

    def __init__(
        self,
        backend: str,
        likelihood: int,
        n_params: int,
        reduction: int,
        beta: float,
        needs: int,
        inplace: bool,
    ) -> None:
        self.backend, self.likelihood, self.n_params = backend, likelihood, n_params
        self.reduction, self.beta, self.needs, self.inplace = reduction, beta, needs, inplace

    def run(
        self,
        operands: Sequence[Tensor],
        data: Sequence[Tensor | None],
        upstream: list[Tensor],
        needs: int,
        inplace: bool = False,
    ) -> list[Tensor]:
        """[free_energy, energy, kl, *gradients of those operands whose bit of ``needs`` is set]."""
        target, mask, weight, latent_mask = data
        kernel = backends.implementation("free_energy", self.backend)
        return kernel(
            list(operands[: self.n_params]), target, mask, list(operands[self.n_params :]), weight, upstream,
            self.likelihood, self.reduction, self.beta, needs, inplace, latent_mask,
        )  # fmt: skip

    def values(
        self, operands: Sequence[Tensor], data: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[free_energy, energy, kl] in plain PyTorch."""
        from fekernels.reference.free_energy.free_energy import values

        target, mask, weight, latent_mask = data
        params, latent = list(operands[: self.n_params]), list(operands[self.n_params :])
        return values(
            params, target, mask, latent, weight, self.likelihood, self.reduction, self.beta, latent_mask
        )  # fmt: skip


class PlainKernelCall(KernelCall):
    """One whose operands still have their own shapes, [B, ...]: without gaps, with nothing broadcast or left out."""

    __slots__ = ()

    def run(
        self,
        operands: Sequence[Tensor],
        data: Sequence[Tensor | None],
        upstream: list[Tensor],
        needs: int,
        inplace: bool = False,
    ) -> list[Tensor]:
        results = super().run(_as_rows(operands), _as_rows(data), upstream, needs, inplace)
        wanted = [operand for i, operand in enumerate(operands) if needs >> i & 1]
        for i, operand in enumerate(wanted, 3):
            if operand.dim() != 2:
                results[i] = restored(results[i], operand, memory_order(operand))
        return results

    def values(
        self, operands: Sequence[Tensor], data: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super().values(_as_rows(operands), _as_rows(data))


def _as_rows(tensors: Sequence[Any]) -> list[Any]:
    rows: list[Any] = []
    for tensor in tensors:
        order = None if tensor is None else memory_order(tensor)
        rows.append(tensor if tensor is None else whole(tensor if order is None else arranged(tensor, order)))
    return rows


def by_autograd(
    call: KernelCall, saved: Sequence[Any], above: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients that no kernel gives: functions of operands and of ``above`` (create_graph=True), and batches."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a path from one operand to another (mean to z to the prediction) is left to the outer graph.
        operands, data = [operand.view_as(operand) for operand in saved[:-DATA]], saved[-DATA:]
        values = call.values(operands, data)
    wanted = [operand for i, operand in enumerate(operands) if call.needs >> i & 1]
    pairs = zip(values, above, strict=True)
    given = [(value, g) for value, g in pairs if g is not None and value.requires_grad]
    if not given:
        return [None] * len(operands)
    outputs, factors = zip(*given, strict=True)
    gradients = iter(torch.autograd.grad(outputs, wanted, factors, create_graph=again, allow_unused=True))
    return [next(gradients) if call.needs >> i & 1 else None for i in range(len(operands))]
