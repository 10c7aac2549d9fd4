"""``variational_kl``: the KL of a parameter's mean-field Gaussian to the prior, from one read of its states."""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._checks import floating, number, same_device
from fekernels._runtime import backends
from fekernels.ops._library import define_functional
from fekernels.ops.plain_memory import check_storage, has_plain_memory

__all__ = ["variational_kl"]

NAME = "variational_kl"


def variational_kl(
    mean: Tensor,
    spread: Tensor,
    ess: float,
    weight_decay: float,
    temperature: float,
    deviations: bool,
    backend: str | None = None,
) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1 / (ess weight_decay))) and sum log(std^2 ess weight_decay), summed over all elements.

    Args:
        mean, spread: of one shape. spread: std itself with ``deviations``; else the curvature h, of which std is
            sqrt(temperature / (ess (h + weight_decay))).

    Returns:
        float64 [2], the same bits on every backend but the reference, whatever the number of threads. Nothing here is
        differentiable.
    """
    _check(mean, spread, ess, weight_decay, temperature)
    chosen = backends.choose(mean.device.type, backend, NAME)
    fits = all(
        tensor.dtype == torch.float32 and has_plain_memory(tensor) and tensor.is_contiguous()
        for tensor in (mean, spread)
    )
    kernel = backends.implementation(NAME, chosen if fits else "reference")
    result: Tensor = kernel(mean.detach(), spread.detach(), ess, weight_decay, temperature, deviations)
    return result


def _check(mean: Tensor, spread: Tensor, ess: float, weight_decay: float, temperature: float) -> None:
    for name, tensor in (("mean", mean), ("spread", spread)):
        floating(NAME, name, tensor)
        same_device(NAME, name, tensor, mean.device)
        check_storage(f"{NAME}: {name}", tensor)
    if spread.shape != mean.shape:
        raise ValueError(
            f"{NAME}: spread must have shape {tuple(mean.shape)} like mean; got {tuple(spread.shape)}"
        )
    for name, value in (("ess", ess), ("weight_decay", weight_decay), ("temperature", temperature)):
        number(NAME, name, value, above=0.0)


def _fake(
    mean: Tensor,
    spread: Tensor,
    ess: float,
    weight_decay: float,
    temperature: float,
    deviations: bool,
    backend: str | None = None,
) -> Tensor:
    return mean.new_empty(2, dtype=torch.float64)


define_functional(
    f"{NAME}(Tensor mean, Tensor spread, float ess, float weight_decay, float temperature, bool deviations, "
    "str? backend=None) -> Tensor",
    variational_kl,
    _fake,
)
