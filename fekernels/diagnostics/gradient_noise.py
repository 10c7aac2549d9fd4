"""How much noise minibatch gradients bring beside the noise that the temperature asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels._checks import number
from fekernels._runtime.parts import is_sharded, local_tensor
from fekernels._runtime.ranks import exchange, gathered_numbers, numbers_device
from fekernels.diagnostics.langevin_denominator import noise_and_denominator, number_of

__all__ = ["GradientNoiseRatio", "gradient_noise_ratio", "is_measurable", "noise_ratio_here"]

OWNER = "gradient_noise_ratio"

MOST = 1 << 20  # weights that are looked at: their quantiles are known to 0.1% of the weights


@dataclass(frozen=True)
class GradientNoiseRatio:
    """r of every weight, or of a million evenly spread over all.

    Attributes:
        ratios: [weights], float32, on the optimizer's device.
    """

    ratios: Tensor

    @property
    def median(self) -> float:
        """Of r over the weights that have gradients; above 0.1 the variance that is sampled is not the posterior's."""
        return self.quantiles((0.5,))[0]

    def quantiles(self, q: Sequence[float] = (0.05, 0.5, 0.95)) -> list[float]:
        """Of r over the weights that have gradients; 0 where none has, NaN where a gradient was not finite.

        Those that never had one (dead units, inputs that are always 0) have no noise, r = 0, and where they are more
        than half would hide that of all others.

        Args:
            q: numbers in [0, 1].

        Raises:
            TypeError: q is no sequence, or holds what is no number. ValueError: a number outside [0, 1].
        """
        owner = "GradientNoiseRatio.quantiles"
        given = q.tolist() if isinstance(q, (Tensor, np.ndarray)) else q
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(
                f"{owner}: q must be a sequence of numbers in [0, 1], such as (0.05, 0.95); got {type(q).__name__}"
            )
        levels = [
            number(owner, f"q[{i}]", level, least=-math.inf, infinite=True) for i, level in enumerate(given)
        ]
        for i, level in enumerate(levels):
            if not 0 <= level <= 1:
                raise ValueError(f"{owner}: q[{i}] must be in [0, 1]; got {level}")
        places = torch.tensor(levels, dtype=self.ratios.dtype, device=self.ratios.device)
        noisy = self.ratios[self.ratios != 0]
        return noisy.quantile(places).tolist() if len(noisy) else [0.0] * len(levels)


@torch.no_grad()
def gradient_noise_ratio(optimizer: Optimizer) -> GradientNoiseRatio:
    """r = h s^2 / (2 T D) for each weight, of the gradient's variance s^2 and the noise 2 T D / h that a step adds.

    The temperature does not know of a minibatch's noise. The stationary variance is 1 + r times the one that T stands
    for: exactly where the noise is independent from weight to weight, at most so where it is not. s^2 is taken to be
    the mean square v that the optimizer keeps, which the mean gradient makes larger while the weights still travel: ask
    after the burn-in. (A frozen v is that of the steps before it was frozen.) With gradients of the whole data set r
    says nothing.

    Nothing is read back from a GPU until a number of the result is.

    Of DTensors (`fully_shard`, tensor parallel, `fe.Chains` over ranks) it is a collective of every rank of their mesh,
    one gather for all parameters that are split alike, and the ratios are those of the weights of all ranks, the same
    numbers on each.

    Args:
        optimizer: a `fe.LangevinAdam` that has stepped, at T > 0. Groups at T = 0 are left out.

    Raises:
        TypeError: another optimizer. ValueError: no step yet, or no group with noise.
    """
    known = _asked(optimizer)
    found: list[Tensor] = []
    split: dict[Any, list[Tensor]] = {}
    for (_, state), ratios in zip(known, _of_each(known), strict=True):
        second = state["exp_avg_sq"]
        if is_sharded(second):
            split.setdefault((second.device_mesh, _split_dims(second)), []).append(ratios)  # type: ignore[attr-defined]
        else:
            found.append(ratios)
    for (mesh, dims), parts in split.items():
        own = torch.cat(parts)
        for dim in dims:
            own = _gathered(own, mesh.get_group(dim))
        found.append(own)
    device = found[0].device
    return GradientNoiseRatio(torch.cat([ratios.to(device) for ratios in found]))


@torch.no_grad()
def noise_ratio_here(optimizer: Optimizer) -> GradientNoiseRatio:
    """The same of the weights that this rank holds: no collective, for who may be the only rank that asks."""
    found = _of_each(_asked(optimizer))
    return GradientNoiseRatio(torch.cat([ratios.to(found[0].device) for ratios in found]))


def _asked(optimizer: Optimizer) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    # Not by its class: the samplers' package imports this one.
    if not isinstance(optimizer, Optimizer) or "frozen" not in optimizer.defaults:
        raise TypeError(f"{OWNER}: optimizer must be a LangevinAdam; got {type(optimizer).__name__}")
    if not any(_may_be_hot(group["temperature"]) for group in optimizer.param_groups):
        raise ValueError(f"{OWNER}: optimizer must have a group with temperature > 0; got none")
    known = _measured(optimizer)
    if not known:
        raise ValueError(f"{OWNER}: optimizer must have made a step with noise; got none")
    return known


def _of_each(known: list[tuple[dict[str, Any], dict[str, Tensor]]]) -> list[Tensor]:
    """Of what is here of each parameter."""
    stride = -(-sum(state["exp_avg_sq"].numel() for _, state in known) // MOST)
    return [_ratios(group, state, stride) for group, state in known]


def _split_dims(tensor: Tensor) -> tuple[int, ...]:
    """Over which dimensions of its mesh a DTensor is split; over the others ranks have the same."""
    placements = tensor.placements  # type: ignore[attr-defined]
    return tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())


def _gathered(own: Tensor, group: Any) -> Tensor:
    """[numbers] of all ranks of a group, that may have any number of them."""
    import torch.distributed as dist

    sizes = [size for (size,) in gathered_numbers(OWNER, [len(own)], group)]
    place = numbers_device(group) if own.is_cpu else own.device
    padded = own.new_zeros(max(*sizes, 1), device=place)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    exchange(OWNER, dist.all_gather, parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(own.device)


def is_measurable(optimizer: Optimizer) -> bool:
    """Whether a LangevinAdam has stepped and makes noise now."""
    return bool(_measured(optimizer))


def _measured(optimizer: Optimizer) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The states that have a v, of groups with noise."""
    return [
        (group, state)
        for group in optimizer.param_groups
        if _may_be_hot(group["temperature"])
        for state in (optimizer.state.get(p, {}) for p in group["params"])
        if "exp_avg_sq" in state and state["exp_avg_sq"].numel()
    ]


def _may_be_hot(temperature: float | Tensor) -> bool:
    """A temperature on a GPU is not read: there it may be."""
    on_gpu = isinstance(temperature, Tensor) and temperature.device.type != "cpu"
    return on_gpu or float(temperature) > 0


def _ratios(group: dict[str, object], state: dict[str, Tensor], stride: int) -> Tensor:
    """float32 [weights], every ``stride``-th of what is here of it, whatever lies between two of them in memory."""

    def every(name: str) -> Tensor:
        return local_tensor(state[name]).reshape(-1)[::stride].float()

    noise, denominator = noise_and_denominator(group, state, every)
    lr, temperature = (number_of(group, key, noise.device) for key in ("lr", "temperature"))
    ratios = (lr * noise / (2 * temperature * denominator)).float()
    return ratios.masked_fill_(noise == 0, 0.0)  # also of 0 / 0
