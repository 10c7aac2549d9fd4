"""Which groups sample in a dtype that is too coarse for their steps."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch

from fekernels.optim.shared_noise import is_hot

__all__ = ["lost_steps"]

LOST = {
    torch.bfloat16: "temperature > 0 with bfloat16 parameters and stochastic_rounding=False: a step below 2^-9 of a "
    "weight rounds to nothing, so that the chain hardly moves or stands still. Set stochastic_rounding=True, or keep "
    "float32 parameters.",
    torch.float16: "temperature > 0 with float16 parameters: a step below 2^-12 of a weight rounds to nothing, so that "
    "the chain hardly moves or stands still. Keep float32 parameters, or bfloat16 ones with stochastic_rounding=True, "
    "which does nothing for float16.",
}


def lost_steps(group: dict[str, Any], dtypes: Set[torch.dtype]) -> Iterator[str]:
    """What to warn of in a group whose parameters have these dtypes."""
    if LOST.keys().isdisjoint(dtypes) or not is_hot(group):
        return
    for dtype, message in LOST.items():
        if dtype in dtypes and (dtype != torch.bfloat16 or not group["stochastic_rounding"]):
            yield message
