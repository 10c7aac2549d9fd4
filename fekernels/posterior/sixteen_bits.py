"""Whether weights of 16 bits can hold the steps of a posterior run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fekernels.posterior.chain_sampler import BETA1, ChainSampler, Plan

__all__ = ["lost_in_rounding"]

SIXTEEN = (torch.bfloat16, torch.float16)


@torch.no_grad()
def lost_in_rounding(walk: ChainSampler, plan: Plan, course: Tensor) -> str | None:
    """What is to be said of weights that lie further apart than the chains' steps; None of others.

    A step is sqrt(h T (1 - b) / ((1 + b) D)) long, of momentum b. As far apart, rounding at random adds some
    .044 h k / D of the variance, and to the nearest nothing that was measured; seven times as far, a third to nine
    tenths.
    """
    if not any(p.dtype in SIXTEEN for p in walk.parameters) or not bool(course.isfinite().all()):
        return None
    denominator = walk.ranks.gather(walk.of_tracked(plan.denominators)).double()
    steps = (plan.lr * walk.temperature * (1 - BETA1) / ((1 + BETA1) * denominator)).sqrt()
    places = course.double().abs().mean(1)
    # Of one chain: a rank may have none.
    units = [torch.full((1, *p.shape[1:]), _unit(p.dtype), device=p.device) for p in walk.parameters]
    apart = torch.exp2(places.clamp_min(1e-30).log2().floor()) * walk.of_tracked(units)
    worst = float((apart / steps).nan_to_num(math.inf).max())
    if worst <= 1.0:
        return None
    names = sorted({str(p.dtype).removeprefix("torch.") for p in walk.parameters if p.dtype in SIXTEEN})
    return (
        f"weights of {' and '.join(names)} lie up to {worst:.2g} steps of the chains apart, so that rounding decides "
        "how far these come: sample a copy of the model in float32"
    )


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype in SIXTEEN else 0.0
